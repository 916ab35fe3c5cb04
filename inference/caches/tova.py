"""The tokens that the newest one attends to most (TOVA, arXiv 2401.06104)."""

import torch

from .scoring import ScoredLayer, attention_weights


class LastAttentionLayer(ScoredLayer):
    """Scores a token by the newest query's attention, averaged over all heads: they hold the same tokens.

    Nothing is noted from one token to the next.
    """

    def scores(self, turned, query_states, scaling) -> torch.Tensor:
        (weights,) = attention_weights(query_states[:, :, -1:], turned, scaling)
        return weights.mean(dim=(1, 2))[..., 0, :][:, None]
