"""Tokens at random, and the newest ones: the control that a policy has to beat."""

import torch

from .base import Store
from .scoring import ScoredLayer

STRIDE = 1_000_003  # a prime, so that seeds, layers and lengths do not meet


class RandomLayer(ScoredLayer):
    """Scores tokens by numbers drawn anew at each eviction, the same ones for every sequence of a batch.

    They follow from the seed, the layer and the number of tokens seen, so that nothing is held for them.
    """

    def __init__(self, *args, seed: int, layer: int, store: Store | None = None, **kwargs):
        super().__init__(*args, store=store, **kwargs)
        self.seed = seed * STRIDE + layer

    def scores(self, turned, query_states, scaling) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self.seed * STRIDE + self.seen) % 2**63)
        return torch.rand(1, *turned.shape[1:3], generator=generator).to(turned.device)
