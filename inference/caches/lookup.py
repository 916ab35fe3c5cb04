"""Keys and values of the first layer, looked up by token: where the token alone decides them, no cache need hold them.

Rotary positions turn a key after it is read, so that before its first attention a token is what it is anywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from modeling.compat import CACHE_NAME
from training.model.sizes import text_config
from training.system.errors import UserError

from .base import PolicyCache, PolicyLayer, Store
from .policies import build_cache

AT_ONCE = 1024  # tokens of the vocabulary whose keys and values are computed in one pass


class Reading:
    """The ids that the model was given last, (batch, tokens)."""

    ids: torch.Tensor

    def __call__(self, embeddings, inputs) -> None:
        self.ids = inputs[0]


class TokenStore(Store):
    """Holds token ids, in as few bytes as the vocabulary needs, in the place of their keys and values.

    keys, values: of the whole vocabulary, (kv_heads, vocabulary, head_dim); they are the model's, and no sequence's.
    """

    ROWS = ("ids",)

    def __init__(self, reading: Reading, keys: torch.Tensor, values: torch.Tensor):
        self.reading, self.table = reading, (keys, values)
        self.type = torch.uint8 if keys.shape[1] <= 256 else torch.uint16 if keys.shape[1] <= 2**16 else torch.int32
        self.clear()

    @property
    def length(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    def extend(self, keys, values):
        new = self.reading.ids.to(self.type)
        self.ids = new if self.ids is None else torch.cat((self.ids, new), dim=1)
        places = self.ids.long()
        return tuple(table[:, places].transpose(0, 1) for table in self.table)


@contextmanager
def looking_up(model, dtype: torch.dtype | None = None) -> Iterator:
    """Within, what is yielded makes empty caches for the model, whose first layer holds token ids alone.

    dtype: of the other layers' keys and values. Raises UserError where positions decide the first layer's keys too.
    """
    config = text_config(model.config)
    build_cache(config, "full", dtype)  # refuses models whose caches hold something else
    if config.position_encoding not in ("rope", "none"):
        raise UserError(
            f"position_encoding={config.position_encoding}: positions are in the first layer's keys already"
        )
    table, reading = first_layer(model), Reading()
    handle = model.get_input_embeddings().register_forward_pre_hook(reading)

    def new_cache() -> PolicyCache:
        cache = build_cache(config, "full", dtype)
        cache.layers[0] = PolicyLayer(TokenStore(reading, *table))
        return cache

    try:
        yield new_cache
    finally:
        handle.remove()


@torch.no_grad()
def first_layer(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, un-rotated, and values that every token of the vocabulary has in the first layer, as the model says it."""
    parts = []
    for ids in torch.arange(text_config(model.config).vocab_size, device=model.device).split(AT_ONCE):
        cache = build_cache(model.config, "full")
        model(input_ids=ids[:, None], use_cache=True, **{CACHE_NAME: cache})
        held = cache.layers[0].store
        parts.append((held.keys[:, :, 0], held.values[:, :, 0]))
    keys, values = (torch.cat(part).transpose(0, 1) for part in zip(*parts, strict=True))
    return keys, values
