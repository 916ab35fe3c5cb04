"""The tokens that have been attended to most, and the newest ones (H2O, arXiv 2306.14048)."""

import torch

from .scoring import ScoredLayer, attention_weights


class HeavyHitterLayer(ScoredLayer):
    """Scores a token by the attention that all queries since have given it, averaged over the heads of its group."""

    ROWS = (*ScoredLayer.ROWS, "mass")  # (batch, kv_heads, held), in float32

    def scores(self, turned, query_states, scaling) -> torch.Tensor:
        pieces = attention_weights(query_states, turned, scaling)
        mass = sum(weights.mean(2).sum(-2) for weights in pieces)
        if self.mass is not None:
            mass[..., : self.mass.shape[-1]] += self.mass
        self.mass = mass
        return mass


class AverageHitterLayer(HeavyHitterLayer):
    """Scores a token by that attention over the number of queries that gave it, so that age earns nothing."""

    needs_birthplaces = True

    def scores(self, turned, query_states, scaling) -> torch.Tensor:
        mass = super().scores(turned, query_states, scaling)
        return mass / (self.seen - self.birthplaces(mass.shape[-1]))


SCORES = {"sum": HeavyHitterLayer, "mean": AverageHitterLayer}
