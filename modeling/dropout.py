"""Dropout that is cheap on a CPU, where torch's draws one random number an element."""

import torch
from torch import nn


def dropout(states: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """As torch.nn.functional.dropout; on a CPU each random 64-bit number decides eight elements.

    There the rate is p rounded to a 256th (0.2 is 0.1992), and what is kept is scaled by the rate in fact used.
    """
    if not training or p == 0.0:
        return states
    if states.device.type != "cpu":
        return nn.functional.dropout(states, p)
    threshold = min(max(round(p * 256), 1), 255)
    count = states.numel()
    numbers = torch.randint(-(2**63), 2**63 - 1, ((count + 7) // 8,), dtype=torch.int64)
    is_kept = numbers.view(torch.uint8)[:count].view(states.shape) >= threshold
    return states * is_kept * (256 / (256 - threshold))


class Dropout(nn.Dropout):
    """Module form of `dropout`."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return dropout(states, self.p, self.training)
