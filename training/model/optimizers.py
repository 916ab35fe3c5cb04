"""Optimizer name to builder: AdamW with nanoGPT's decay groups, Muon and NorMuon; and Muon's momentum in a run."""

from collections import defaultdict

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .devices import newton_schulz_dtype

# Coefficients of the quintic Newton–Schulz iteration, https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay, biases and gains do not: two groups with `params` and `weight_decay`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def orthogonalize(matrices: torch.Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Push the singular values of each matrix towards one, by Newton–Schulz in `dtype`.

    matrices: (count, rows, columns). Returns the same shape in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(dtype)
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon for groups marked `use_muon`, AdamW for the others, in one optimizer with one state.

    Momentum of the hidden matrices is orthogonalised before it is applied (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/); matrices of equal shape, transposed ones too, go through one stacked
    Newton–Schulz. The step is scaled by sqrt(max(1, rows / columns)) as in the original. precision: the run's; under
    auto Newton–Schulz is in what the parameters' device multiplies natively.
    """

    def __init__(self, groups: list[dict], adamw_kwargs: dict, precision: str = "auto"):
        # Schedules that end at a rate, not at a share, take it for a share of this one: AdamW's, where it has a group.
        defaults = {"lr": groups[-1]["lr"], "weight_decay": 0.0, "momentum": 0.95, "use_muon": False}
        super().__init__(groups, defaults)
        self._adamw = torch.optim.AdamW([g for g in self.param_groups if not g["use_muon"]], **adamw_kwargs)
        self._dtype = newton_schulz_dtype(precision, self.param_groups[0]["params"][0].device)
        for group, filled in zip(self._adamw_groups(), self._adamw.param_groups, strict=True):
            group.update({key: value for key, value in filled.items() if key not in group})

    def _adamw_groups(self) -> list[dict]:
        return [group for group in self.param_groups if not group["use_muon"]]

    @torch.no_grad()
    def step(self, closure=None):
        """Apply one update; `closure` re-evaluates the loss, as everywhere in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["use_muon"]:
                self._muon_step(group)
        # One state for both: a loaded state_dict replaces these objects, so they are linked here, not once.
        self._adamw.state, self._adamw.param_groups = self.state, self._adamw_groups()
        self._adamw.step()
        return loss

    def _muon_step(self, group: dict) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov: look ahead along the momentum

        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for indices in self._same_shape(updates).values():
            stacked = orthogonalize(torch.stack([_wide(_whole(updates[i])) for i in indices]), dtype=self._dtype)
            for i, update in zip(indices, stacked, strict=True):
                parameter, (rows, columns) = parameters[i], parameters[i].shape
                step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
                update = self._evened(parameter, (update.mT if rows > columns else update).to(parameter.dtype), group)
                parameter.add_(shard_like(update, parameter), alpha=-step_size)

    def _evened(self, parameter: nn.Parameter, update: torch.Tensor, group: dict) -> torch.Tensor:
        """What a subclass makes of the whole orthogonalised update."""
        return update

    @staticmethod
    def _same_shape(updates: list[torch.Tensor]) -> dict[tuple, list[int]]:
        """Indices of the updates that can be stacked, by shape and device."""
        groups = defaultdict(list)
        for i, update in enumerate(updates):
            groups[(*sorted(update.shape), update.device)].append(i)
        return groups


class NorMuon(Muon):
    """Muon whose steps are evened out over the neurons (Li et al. 2025, arXiv 2510.05491).

    Each row of an orthogonalised update, the weights into one neuron, is divided by the root of its running mean
    square, of decay `beta2`; the whole keeps the norm that it had, so that Muon's learning rate fits.
    """

    def _evened(self, parameter: nn.Parameter, update: torch.Tensor, group: dict) -> torch.Tensor:
        state, squares = self.state[parameter], update.square().mean(1)
        if "row_squares" not in state:
            state["row_squares"] = torch.zeros_like(squares)
        state["row_squares"].lerp_(squares, 1 - group["beta2"])
        factors = (state["row_squares"] + 1e-16).rsqrt()
        norm_ratio = (squares.sum() / (squares * factors.square()).sum().clamp(min=1e-16)).sqrt()
        return update * (factors * norm_ratio)[:, None]


def _whole(matrix: torch.Tensor) -> torch.Tensor:
    """All of a matrix that FSDP has shared out: singular values are those of the whole."""
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def shard_like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's shard of `whole`, which all processes have, where the parameter is sharded and it is not."""
    if not isinstance(parameter, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def build_adamw(model: nn.Module, args) -> torch.optim.Optimizer:
    """AdamW over nanoGPT's two decay groups, fused."""
    return torch.optim.AdamW(decay_groups(model, args.weight_decay), lr=args.learning_rate, **_adamw_kwargs(args))


def build_muon(model: nn.Module, args, kind: type[Muon] = Muon, **more) -> torch.optim.Optimizer:
    """Muon at `muon_learning_rate` for the matrices inside the blocks, AdamW at `learning_rate` for the rest.

    `weight_decay` is the hidden matrices'; embeddings, head, gains and biases are not decayed. more: of their group.
    """
    inside = {id(p) for layer in model.get_decoder().layers for p in layer.parameters() if p.dim() == 2}
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in parameters if id(p) in inside]
    rest = [p for p in parameters if id(p) not in inside]
    muon = {"use_muon": True, "lr": args.muon_learning_rate, "momentum": args.muon_momentum, **more}
    groups = [
        {"params": hidden, "weight_decay": args.weight_decay, **muon},
        {"params": rest, "weight_decay": 0.0, "lr": args.learning_rate, "use_muon": False},
    ]
    return kind([group for group in groups if group["params"]], _adamw_kwargs(args), getattr(args, "precision", "auto"))


def build_normuon(model: nn.Module, args) -> torch.optim.Optimizer:
    """NorMuon in Muon's place; `muon_beta2` is the decay of its rows' mean squares."""
    return build_muon(model, args, NorMuon, beta2=args.muon_beta2)


def _adamw_kwargs(args) -> dict:
    return {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon, "fused": True}


OPTIMIZERS = {"adamw": build_adamw, "muon": build_muon, "normuon": build_normuon}


def build_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """The optimizer that `args.optimizer` names, over the trainable parameters of `model`."""
    return OPTIMIZERS[args.optimizer](model, args)


FIRST_MOMENTUM = 0.85


def set_momentum(optimizer: torch.optim.Optimizer, args, step: int) -> None:
    """Set Muon's momentum of the step after so many, by the step alone: it rises from FIRST_MOMENTUM."""
    share = min(1.0, step / args.muon_momentum_warmup_steps)
    for group in optimizer.param_groups:
        if group.get("use_muon"):
            group["momentum"] = (1 - share) * FIRST_MOMENTUM + share * args.muon_momentum
