"""Caches that hold keys as they were before their positions turned them.

What is evicted, moved or carried into another segment needs that: a key can then be turned for the place it has now.
"""

import torch
from transformers.cache_utils import Cache, DynamicLayer


class UnrotatedCache(Cache):
    """A cache all of whose layers are UnrotatedLayers, or hold nothing."""

    holds_unrotated = True  # the model looks for it, and gives the layers what they turn keys with


class UnrotatedLayer(DynamicLayer):
    """All keys and values, the keys un-rotated: what eviction policies and memories build on.

    A subclass decides what stays (`keep`), and where in the text it is said to be (`positions`).
    """

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.seen = 0

    def update(self, key_states, value_states, query_states=None, rotate=None, scaling=None, **kwargs):
        """The keys, turned, and values of what was held and of the new tokens: two (batch, kv_heads, keys, head_dim).

        key_states, value_states: (batch, kv_heads, tokens, head_dim), as they were before positions turned them.
        query_states: (batch, heads, tokens, head_dim), turned. rotate: (keys, their positions) to keys that are turned;
        positions are (keys,), or one a key, (batch, kv_heads, keys). scaling: of the queries, as attention scales them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = torch.cat((self.keys, key_states), dim=-2)
        values = torch.cat((self.values, value_states), dim=-2)
        self.seen += key_states.shape[-2]
        turned = keys if rotate is None else rotate(keys, self.positions(keys.shape[-2]))
        self.keep(keys, values, turned, query_states, scaling)
        return turned, values

    def positions(self, length: int) -> torch.Tensor:
        """Positions, (length,), of that many keys, the newest last: the places right before the next token."""
        return torch.arange(self.seen - length, self.seen, device=self.device)

    def keep(self, keys, values, turned, query_states, scaling) -> None:
        """Choose what stays of all the keys and values; here, all.

        keys, values, turned: (batch, kv_heads, keys, head_dim); the new tokens, as many as queries, are the last.
        """
        self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        """The tokens seen, held or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` will return, and how many tokens came before the first of them."""
        held = self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0
        return held + query_length, self.seen - held

    def reset(self) -> None:
        super().reset()
        self.seen = 0


__all__ = ["UnrotatedCache", "UnrotatedLayer"]
