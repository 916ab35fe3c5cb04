"""Weights as a CPU reads them quickly, all of them for every token: in eight bits, and in huge pages of memory."""

import mmap
from contextlib import suppress

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from training.system.errors import UserError

SMALLEST = 1e-12  # scale of a row of zeros
AT_ONCE = 32  # numbers of a row that torch's kernel reads at once, past the end of a shorter one


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers of eight bits with a scale an output; a bias stays as it was.

    Multiplied by torch's own kernel for that, which takes its input in bfloat16 and has vector code for AVX2 too.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        """weight: (out_features, in_features); bias: (out_features,)."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = (weight.abs().amax(dim=1).float().clamp(min=SMALLEST) / 127).to(torch.bfloat16)
        rounded = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous()
        self.register_buffer("weight", rounded)
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states: (…, in_features). Returns (…, out_features) in the same dtype."""
        rows = states.reshape(-1, self.in_features).to(torch.bfloat16)
        product = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        product = product.to(states.dtype).view(*states.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


@torch.no_grad()
def in_int8(model):
    """The model with the weights of its linear layers in int8, the head's among them.

    Embeddings stay as they are, and layers whose number of inputs is no multiple of 32. Raises UserError away from
    CPUs, for adapters, and for a model without such layers.
    """
    if model.device.type != "cpu":
        raise UserError(f"quantization=int8: is for CPUs; on {model.device.type} take --dtype bfloat16")
    if hasattr(model, "get_base_model"):
        raise UserError("quantization=int8: not on an adapter; put it into its base with `acorn merge` first")
    weights = {
        name: (module.weight.T if isinstance(module, Conv1D) else module.weight, module.bias)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)  # not what others have made of them
    }
    found = {name: each for name, each in weights.items() if each[0].shape[1] % AT_ONCE == 0}
    if not found:
        raise UserError(f"quantization=int8: {type(model).__name__} has no linear layer of {AT_ONCE}, 64, … inputs")
    for name, (weight, bias) in found.items():
        model.set_submodule(name, Int8Linear(weight, bias))
    return model


QUANTIZATIONS = {"int8": in_int8}


def quantized(model, quantization: str | None):
    """The model with its weights as `quantization` names it, one of QUANTIZATIONS; None leaves them."""
    return model if quantization is None else QUANTIZATIONS[quantization](model)


# ---- where they lie

LINE = 64  # bytes of a cache line, at which tensors begin
HUGE_PAGE = 2**21  # bytes


@torch.no_grad()
def in_huge_pages(model):
    """The model with its weights one after the other in huge pages of memory, where Linux has them.

    With pages of 4 KB a processor looks an address up, and begins to read ahead anew, after every 4 KB of weights.
    """
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
    moved = [each for each in tensors if type(each) in (nn.Parameter, torch.Tensor) and each.is_contiguous()]
    sizes = [-(-each.nbytes // LINE) * LINE for each in moved]
    if model.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or sum(sizes) < HUGE_PAGE:
        return model
    memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: the memory is as good as any other
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = 0
    for tensor, size in zip(moved, sizes, strict=True):
        if tensor.numel():
            place = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
            tensor.data = place.view(tensor.shape).copy_(tensor)
        start += size
    return model
