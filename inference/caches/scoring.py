"""Evicting by a score of each token, and the attention weights that most scores come from."""

from collections.abc import Iterator

import torch

from .base import EvictingLayer, Store

AT_ONCE = 2**24  # attention weights that are computed together


class ScoredLayer(EvictingLayer):
    """Holds the first `sinks` tokens, the newest `recent` and those with the best scores between: `budget` in all.

    Each key-value head of each sequence holds tokens of its own choice.
    """

    ROWS = ("born",)  # where in the text each token was, (batch, kv_heads, held); None: 0, 1, 2, …
    needs_birthplaces = False  # for its scores; else they are held for absolute positions alone

    def __init__(
        self,
        budget: int,
        sinks: int = 0,
        recent: int = 0,
        is_by_slot: bool = True,
        store: Store | None = None,
    ):
        super().__init__(budget, sinks, is_by_slot, store)
        self.recent = recent

    def update(self, key_states, value_states, *args, **kwargs):
        self.heads = key_states.shape[:2]
        return super().update(key_states, value_states, *args, **kwargs)

    def birthplaces(self, length: int) -> torch.Tensor:
        if self.born is None:
            return torch.arange(self.seen - length, self.seen, device=self.device)
        new = torch.arange(self.seen - length + self.born.shape[-1], self.seen, device=self.device)
        return torch.cat((self.born, new.to(self.born.dtype).expand(*self.heads, -1)), dim=-1)

    def places(self, length: int, kept: int, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[..., : self.sinks] = torch.inf
        scores[..., length - self.recent :] = torch.inf
        return scores.topk(kept, dim=-1).indices.sort(dim=-1).values.expand(*self.heads, -1)

    def hold(self, places: torch.Tensor) -> None:
        if self.needs_birthplaces or not self.is_by_slot:
            self.born = self.birthplaces(self.store.length).to(torch.int32).expand(*self.heads, -1)
        super().hold(places)


def attention_weights(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> Iterator[torch.Tensor]:
    """What queries attend to, in pieces of some queries: (batch, kv_heads, heads of each, queries, keys), in float32.

    queries: (batch, heads, queries, head_dim), of the last so many keys; keys: (batch, kv_heads, keys, head_dim); both
    turned. Computed anew, as no backend but the eager one returns its weights.
    """
    (batch, heads, count, _), (kv_heads, length) = queries.shape, keys.shape[1:3]
    grouped = (queries * scaling).to(keys.dtype).unflatten(1, (kv_heads, heads // kv_heads))
    places = torch.arange(length, device=keys.device)
    for piece in torch.arange(count, device=keys.device).split(max(1, AT_ONCE // (batch * heads * length))):
        logits = (grouped[..., piece, :] @ keys[:, :, None].transpose(-1, -2)).float()
        is_later = places > (piece + length - count)[:, None]
        yield logits.masked_fill(is_later, -torch.inf).softmax(dim=-1)
