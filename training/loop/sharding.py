"""Sharded training keeps whole models: FSDP's shards are gathered for what people load, and cut anew by who resumes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as shards
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

OPTIMIZER_SHARDS = "optimizer-shards"  # beside optimizer.pt, which then holds the groups alone


class SavesWhole:
    """A Trainer's files under FSDP; goes before Trainer in the bases of a class.

    Trainer's own are FSDP's: no model that anyone could load, and nothing that another launch could go on from. Here a
    checkpoint is the same files whatever launch wrote it. The one difference is SHARDED_STATE_DICT, under which each
    process writes its own part of the optimizer's state, the largest of them.
    """

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As in Trainer; an adapter is read before its model is shared out, as a whole model is."""
        if resume_from_checkpoint is not None and self.is_fsdp_enabled and hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; a sharded model is gathered, a weight at a time, and saved as what it was before."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        weights = whole_weights(model, is_kept=self.args.should_save)
        with as_before(model):
            self._save(output_dir, state_dict=weights)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """As in Trainer; a sharded model was read whole, before it was shared out."""
        if not isinstance(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), FSDPModule):
            super()._load_from_checkpoint(checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in Trainer, in one form for all launches."""
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        in_shards = "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        save_optimizer(self.optimizer, Path(output_dir), in_shards, is_first=self.args.should_save)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer, from what any launch wrote (ZeRO's own form is ZeRO's alone)."""
        is_plain = not self.is_fsdp_enabled and not Path(checkpoint, OPTIMIZER_SHARDS).is_dir()
        if is_plain or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))


# ---- the model


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Give a sharded model back its own class, whose module is the code that is saved, and the names of its blocks.

    FSDP derived a class from it; Accelerate put each block into a wrapper, by whose name PEFT would look for weights.
    """
    given = type(model)
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, CheckpointWrapper)
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child._checkpoint_wrapped_module
    if isinstance(model, FSDPModule):
        model.__class__ = given.__mro__[2]  # torch: FSDP<name>, FSDPModule, <name>
    try:
        yield
    finally:
        model.__class__ = given
        for parent, name, child in wrapped:
            parent._modules[name] = child


def whole_weights(model: nn.Module, is_kept: bool) -> dict[str, torch.Tensor]:
    """The state dict of a sharded model in one piece, on the CPU; all processes gather, and who does not keep drops."""
    gathered: dict[int, torch.Tensor] = {}  # tied weights are one tensor under two names, and stay one
    weights = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) not in gathered:
            gathered[id(weight)] = _whole(weight.detach(), is_kept)
        weights[name] = gathered[id(weight)]
    return weights if is_kept else {}


def _whole(value, is_kept: bool):
    """A tensor's own memory on the CPU; None from a sharded one in a process that does not keep it."""
    if isinstance(value, DTensor):
        value = value.to(value.device_mesh.device_type).full_tensor()
        return value.cpu() if is_kept else None
    return value.cpu() if isinstance(value, torch.Tensor) else value


def is_finite(model: nn.Module) -> torch.Tensor:
    """Whether this process's weights are all numbers: a scalar, 1.0 or 0.0."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.stack([torch.isfinite(p).all() for p in local]).all().float()


# ---- the optimizer


def save_optimizer(optimizer, folder: Path, in_shards: bool, is_first: bool) -> None:
    """Write `optimizer.pt` as one process would; `in_shards` its tensors go to OPTIMIZER_SHARDS instead, from all."""
    saved = optimizer.state_dict()
    state = {(number, key): value for number, values in saved["state"].items() for key, value in values.items()}
    if in_shards:
        named = {f"{number}.{key}": value for (number, key), value in state.items()}
        shards.save(named, checkpoint_id=folder / OPTIMIZER_SHARDS)
        state = {}
    state = {place: _whole(value, is_first) for place, value in state.items()}
    if is_first:
        torch.save({**saved, "state": _nested(state)}, folder / OPTIMIZER_NAME)


def load_optimizer(optimizer, folder: Path) -> None:
    """Read what `save_optimizer` wrote, on however many processes; each takes its own part alone."""
    saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if (folder / OPTIMIZER_SHARDS).is_dir():
        saved["state"] = _read_shards(folder / OPTIMIZER_SHARDS, parameters)
    for number, values in saved["state"].items():
        for key, value in values.items():
            values[key] = _shared_out(value, parameters[number])
    optimizer.load_state_dict(saved)


def _read_shards(folder: Path, parameters: list[nn.Parameter]) -> dict[int, dict]:
    """The tensors of all processes' files, cut as the parameters are."""
    described = shards.FileSystemReader(folder).read_metadata().state_dict_metadata
    room = {}
    for name, tensor in described.items():
        empty = torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        parameter = parameters[int(name.split(".")[0])]
        is_cut = isinstance(parameter, DTensor) and empty.shape == parameter.shape
        room[name] = torch.empty_like(parameter, dtype=empty.dtype) if is_cut else torch.empty_like(empty, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process only
        shards.load(room, checkpoint_id=folder, no_dist=not dist.is_initialized())
    places = {tuple(name.split(".", 1)): value for name, value in room.items()}
    return _nested({(int(number), key): value for (number, key), value in places.items()})


def _shared_out(value, parameter: nn.Parameter):
    """This process's part of a tensor that has the shape of a sharded parameter; anything else as it is."""
    is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
    if not is_whole or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _nested(state: dict[tuple[int, str], object]) -> dict[int, dict]:
    numbers = dict.fromkeys(number for number, _ in state)
    return {number: {key: value for (n, key), value in state.items() if n == number} for number in numbers}
