"""Softmax attention: full or sliding, grouped heads, keys and values shared between layers, value embeddings."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .compat import CACHE_NAME, KVSharingDict
from .kv_quantization import build_quantizer
from .positions import POSITIONS


def create_document_mask(config, inputs_embeds, attention_mask, cache=None, position_ids=None):
    """Which document each token belongs to, (batch, tokens), from 1, and 0 for padding; None: all to one.

    Documents are told apart by positions that start anew, where neither mask nor cache is given. Raises ValueError for
    masks of another kind.
    """
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            shape = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask of shape {shape}: linear_attention takes (batch, tokens), ones and zeros")
        return create_recurrent_attention_mask(config, inputs_embeds, attention_mask, cache)
    if position_ids is None or cache is not None or inputs_embeds.shape[1] == 1:
        return None
    starts_anew = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    return (1 + starts_anew.cumsum(dim=-1)).expand(inputs_embeds.shape[0], -1)


MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "linear_attention": create_document_mask,
}


def build_masks(config, inputs_embeds, attention_mask, cache, position_ids) -> dict:
    """One mask a layer type; masks that come ready (from generate) pass through."""
    if isinstance(attention_mask, dict):
        return attention_mask
    sight = getattr(cache, "sight", None)
    more = {} if sight is None else {"and_mask_function": sliding_window_overlay(sight)}
    return {  # by position, as the fourth argument has two names
        layer_type: MASKS[layer_type](config, inputs_embeds, attention_mask, cache, position_ids, **more)
        for layer_type in dict.fromkeys(config.layer_types)
    }


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention by plain matmuls, the one backend that returns its weights.

    query: (batch, heads, queries, head_dim); key, value: (batch, kv_heads, keys, head_dim); attention_mask: additive,
    (batch, 1, queries, keys) or None. Returns ((batch, queries, heads, head_dim), (batch, heads, queries, keys)).
    """
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = (query * scaling) @ key.transpose(2, 3)  # scaling the queries touches fewer numbers than the scores
    if attention_mask is not None:
        lowest = torch.finfo(scores.dtype).min  # float32's would round to -inf, and a row of them to NaN
        scores = scores + attention_mask.clamp(min=lowest).to(scores.dtype)
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)  # float32 inside, whatever goes in
    weights = module.drop(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ValueEmbedding(nn.Embedding):
    """A token's own part of its value in one layer, whatever its context: (batch, tokens) to (…, heads * head_dim).

    The tables are modded-nanogpt's (https://github.com/KellerJordan/modded-nanogpt), in place of the first layer's
    values that value residual learning carries on (arXiv 2410.17897).
    """

    def __init__(self, config):
        super().__init__(config.vocab_size, config.num_key_value_heads * config.head_dim)
        self.factor = nn.Parameter(torch.empty(1))

    def init_weights(self) -> None:
        init.constant_(self.factor, 0.5)  # of the size that values have where what they come from is normed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.factor * super().forward(input_ids)


class SoftmaxAttention(nn.Module):
    """Causal attention of one layer; the mask and the cache layer follow from `config.layer_types`.

    A layer whose `kv_sharing_modes` entry is "reuse" has no key and value projections: it reads those of its source
    layer from the `shared_key_values` that travel through the forward.
    """

    drop = staticmethod(nn.functional.dropout)  # the eager backend's

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None  # flash attention reads it
        self.kv_sharing_mode = config.kv_sharing_modes[layer_idx] if config.kv_sharing_modes else None
        self.kv_source = config.kv_source(layer_idx) if self.kv_sharing_mode == "reuse" else None
        self.rotate = POSITIONS[config.position_encoding].rotate
        has_own = self.kv_source is None
        self.key_quantizer, self.value_quantizer = (build_quantizer(config, has_own) for _ in range(2))
        self._build_projections(config)
        self.o_proj.is_residual_projection = True  # read by _init_weights, which meets leaves only

    def _build_projections(self, config) -> None:
        heads_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, heads_size, bias=config.bias)
        if self.kv_source is None:
            self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
            self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.o_proj = nn.Linear(heads_size, config.hidden_size, bias=config.bias)
        norm = config.qk_norm
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps, config.norm_gain) if norm else nn.Identity()
        has_key_norm = norm and self.kv_source is None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps, config.norm_gain) if has_key_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        shared_key_values: KVSharingDict | None = None,
        rotate_keys: Callable | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (batch, tokens, hidden_size). Returns the same shape, and under eager the attention weights.

        attention_mask: of the backend's kind, or None for causal alone. position_embeddings: the angles of this kind of
        layer, see positions.py. shared_key_values: layer index to (key, value), (batch, kv_heads, keys, head_dim) each.
        rotate_keys: (keys, positions) to turned keys, where the cache holds them as they were, see segment_memory.py.
        Among the rest: value_embedding, (batch, tokens, kv_heads * head_dim), what is added to the values; and the
        cache, by its name in the installed transformers, as their gradient checkpointing looks for it there.
        """
        query = self.q_norm(self._split_heads(self.q_proj(hidden_states)))
        held = self._held(hidden_states, query, position_embeddings, shared_key_values, rotate_keys, kwargs)
        attended, weights = self._attend(*held, attention_mask, **kwargs)
        return self.o_proj(attended.flatten(2)), weights

    def _held(self, hidden_states, query, angles, shared_key_values, rotate_keys, kwargs) -> tuple[torch.Tensor, ...]:
        """The turned queries, and the keys and values of the cache and of the new tokens: its own, or another layer's.

        kwargs: attention's, and the cache, which is taken out of them.
        """
        cache = kwargs.pop(CACHE_NAME, None)
        if self.kv_source is not None:
            query, _ = self.rotate(query, None, angles)
            return query, *shared_key_values[self.kv_source]
        query, key, value = self._own(hidden_states, query, angles, cache, rotate_keys, kwargs)
        if self.kv_sharing_mode == "store":
            shared_key_values[self.layer_idx] = (key, value)
        return query, key, value

    def _own(self, hidden_states, query, angles, cache, rotate_keys, kwargs) -> tuple[torch.Tensor, ...]:
        """The turned queries, and the layer's own keys and values, of the cache and of the new tokens.

        kwargs: attention's, which paged caches read and change, and a value embedding, which is taken out of them.
        """
        key, value = self._keys_and_values(hidden_states)
        if (embedding := kwargs.pop("value_embedding", None)) is not None:
            value = value + self._split_heads(embedding).to(value.dtype)
        given = {}
        if getattr(cache, "holds_codes", False):
            given = {"quantizers": (self.key_quantizer, self.value_quantizer)}
        else:
            key, value = self.key_quantizer(key), self.value_quantizer(value)
        if rotate_keys is None:
            query, key = self.rotate(query, key, angles)
            given |= {"kwargs": kwargs}  # read by paged caches
        else:
            query, _ = self.rotate(query, None, angles)
            given |= {"query_states": query, "rotate": rotate_keys, "scaling": self.scaling}
        key = key.to(value.dtype)  # a norm under autocast gives float32
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, **given)
        return query, key, value

    def _keys_and_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a cache is to hold of new tokens, keys un-turned: two (batch, kv_heads, tokens, head_dim)."""
        key = self.k_norm(self._split_heads(self.k_proj(hidden_states)))
        return key, self._split_heads(self.v_proj(hidden_states))

    def _attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the heads put out, (batch, tokens, heads, head_dim), and under eager the attention weights."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attend(
            self,
            query.to(value.dtype),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads * head_dim) to (batch, heads, tokens, head_dim)."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
