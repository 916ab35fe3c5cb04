"""Dropout, norms and ReLU² that are cheap on a CPU, where each pass over the activations is dear; for training alone.

A model's own parts take another class while it is trained, and are what they were when it is evaluated or saved.
"""

import torch
from torch import nn
from transformers.activations import ReLUSquaredActivation

from modeling.attention import SoftmaxAttention
from modeling.linear_attention import LinearAttention
from modeling.modeling_gpt import MLP, GPTModel, PreNormBlock

# ---- dropout


def fast_dropout(states: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """As torch.nn.functional.dropout on a CPU, but each random 64-bit number decides eight elements.

    The rate is p rounded to a 256th (0.2 is 0.1992), and what is kept is scaled by the rate in fact used.
    """
    if not training or p == 0.0:
        return states
    threshold = min(max(round(p * 256), 1), 255)
    count = states.numel()
    numbers = torch.randint(-(2**63), 2**63 - 1, ((count + 7) // 8,), dtype=torch.int64)
    is_kept = numbers.view(torch.uint8)[:count].view(states.shape) >= threshold
    return (states * is_kept).mul_(256 / (256 - threshold))


class FastDropout(nn.Dropout):
    """Module form of `fast_dropout`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return fast_dropout(states, self.p, self.training)


# ---- norms and the activation: a backward pass of two or three operations, where autograd's own has up to ten


class RootMeanSquare(torch.autograd.Function):
    """RMSNorm without a gain: float32 inside, the result in `dtype`."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        states = states.float()
        squares = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_()
        scale = squares.div_(states.shape[-1]).add_(eps).rsqrt_()
        normed = states * scale
        ctx.save_for_backward(normed, scale)
        return normed.to(dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        normed, scale = ctx.saved_tensors
        gradient = gradient.float()
        along = torch.linalg.vecdot(gradient, normed).unsqueeze(-1).div_(-normed.shape[-1])
        return torch.addcmul(gradient, normed, along).mul_(scale), None, None


class FastRMSNorm(nn.RMSNorm):
    """Root mean square normalised, in the type of the input."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return RootMeanSquare.apply(states, self.eps, states.dtype) if self.training else super().forward(states)


class FastRMSNormOfMatmuls(nn.RMSNorm):
    """The same, read by matmuls alone: under autocast it is rounded once for all of them."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(states)
        is_half = torch.is_autocast_enabled("cpu")
        return RootMeanSquare.apply(states, self.eps, torch.get_autocast_dtype("cpu") if is_half else states.dtype)


class SquaredReLU(torch.autograd.Function):
    """relu(x)², to the bit."""

    @staticmethod
    def forward(ctx, states: torch.Tensor) -> torch.Tensor:
        positive = states.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (positive,) = ctx.saved_tensors
        return (gradient * positive).mul_(2)


class FastReLUSquared(ReLUSquaredActivation):
    """Module form of `SquaredReLU`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return SquaredReLU.apply(states) if self.training else super().forward(states)


# ---- put in


def use_fast_dropout(model: nn.Module) -> None:
    """Put it in the place of every dropout that is a GPT's own; adapters and other models keep torch's."""
    for module in model.modules():
        if isinstance(module, GPTModel | PreNormBlock | LinearAttention):
            module.dropout.__class__ = FastDropout
        elif isinstance(module, SoftmaxAttention):
            module.drop = fast_dropout


def use_fast_norms(model: nn.Module) -> None:
    """The same of RMSNorms without a gain, and of ReLU²; what is compiled needs none, as its passes are fused."""
    for module in model.modules():
        if isinstance(module, GPTModel | SoftmaxAttention):
            for norm in module.children():
                _take_class(norm, FastRMSNorm)
        elif type(module) is PreNormBlock:  # what the norms of another block put out is the residual stream
            for norm in (module.attn_norm, module.mlp_norm):
                _take_class(norm, FastRMSNormOfMatmuls)
        elif isinstance(module, MLP) and type(module.act_fn) is ReLUSquaredActivation:
            module.act_fn.__class__ = FastReLUSquared


def _take_class(norm: nn.Module, fast: type[nn.RMSNorm]) -> None:
    if type(norm) is nn.RMSNorm and norm.weight is None:
        norm.__class__ = fast
