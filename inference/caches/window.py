"""The newest tokens, and the first ones as sinks (StreamingLLM, arXiv 2309.17453)."""

import torch

from .base import EvictingLayer, Store


class WindowLayer(EvictingLayer):
    """Holds the first `sinks` tokens and the newest, `budget` in all."""

    def birthplaces(self, length: int) -> torch.Tensor:
        places = torch.arange(self.seen - length, self.seen, device=self.device)
        sinks = min(self.sinks, length)
        return torch.cat((torch.arange(sinks, device=self.device), places[sinks:]))

    def places(self, length: int, kept: int, scores) -> torch.Tensor:
        newest = torch.arange(length - kept + self.sinks, length, device=self.device)
        return torch.cat((torch.arange(self.sinks, device=self.device), newest))


class SlidingLayer(WindowLayer):
    """The newest tokens of a layer whose attention slides: what its mask lets the next token see, or less."""

    is_sliding = True  # which transformers asks for, to find the cache's length for this kind of mask
    has_gaps = False

    def __init__(self, budget: int, store: Store | None = None):
        super().__init__(budget, store=store)


POSITIONS = ("slot", "absolute")
