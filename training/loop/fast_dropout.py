"""Dropout that is cheap on a CPU, where torch's draws one random number an element; training alone puts it in."""

import torch
from torch import nn

from modeling.attention import SoftmaxAttention
from modeling.linear_attention import LinearAttention
from modeling.modeling_gpt import GPTModel, PreNormBlock


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
    return states * is_kept * (256 / (256 - threshold))


class FastDropout(nn.Dropout):
    """Module form of `fast_dropout`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return fast_dropout(states, self.p, self.training)


def use_fast_dropout(model: nn.Module) -> None:
    """Put it in the place of every dropout that is a GPT's own; adapters and other models keep torch's."""
    for module in model.modules():
        if isinstance(module, GPTModel | PreNormBlock | LinearAttention):
            module.dropout.__class__ = FastDropout
        elif isinstance(module, SoftmaxAttention):
            module.drop = fast_dropout
