"""How a position enters the model: a table of classes with two hooks, of which each overrides one.

`add(hidden_states, position_ids)` changes the embeddings; `rotate(query, key, angles)` turns queries and keys, with
`angles(hidden_states, position_ids)` computed once a forward for each kind of layer.

Shapes, in all classes: hidden_states (batch, tokens, hidden_size); position_ids (batch or 1, tokens), integers that
count tokens from 0; query (batch, heads, tokens, head_dim), key (batch, kv_heads, tokens, head_dim), or None where a
layer reuses another's; angles of a layer: cosines and sines, each (batch or 1, 1, tokens, head_dim), or None.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

ROPE_NEEDS = {  # rope_type: what rope_parameters must hold beside rope_theta
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


class NoPositions(nn.Module):
    """No position information but the causal mask (NoPE, arXiv 2305.19466)."""

    def __init__(self, config):
        super().__init__()
        self.layer_types = tuple(dict.fromkeys(config.layer_types))

    def add(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings with their positions: the shape of hidden_states."""
        return hidden_states

    def angles(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> dict[str, tuple | None]:
        """Layer type to the angles of its layers, in the dtype of hidden_states."""
        return dict.fromkeys(self.layer_types)

    @staticmethod
    def rotate(query: torch.Tensor, key: torch.Tensor | None, angles: tuple | None) -> tuple:
        """(query, key) turned by the angles, in their shapes."""
        return query, key

    def turned(self, layer_type: str, keys: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Keys of a layer of that type, (batch, kv_heads, tokens, head_dim), turned by their positions.

        position_ids: (tokens,), or one a key, (batch, kv_heads, tokens).
        """
        return keys

    def key_rotations(self, cache: Cache | None, position_ids: torch.Tensor | None) -> dict[str, Callable]:
        """Layer type to what turns keys, (keys, places), for a cache that holds them as they were; else nothing."""
        if not getattr(cache, "holds_unrotated", False):
            return {}
        shift = 0
        if position_ids is not None:  # by padding, a row's positions may be others than the cache counts
            last = cache.get_seq_length() + position_ids.shape[1] - 1
            shift = (position_ids[:, -1] - last)[:, None, None]
        return {
            kind: lambda keys, places, kind=kind: self.turned(kind, keys, places + shift) for kind in self.layer_types
        }

    def next(self, inputs_embeds: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Positions (1, tokens) that follow what the cache has seen."""
        seen = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

    def init_weights(self) -> None:
        """Fill what a checkpoint does not hold; nothing here."""


class BigramEmbedding(nn.Embedding):
    """A vector for each token and the one before it, by a hash of the two, that is added to the token's embedding.

    As in modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt/pull/201): pairs share the rows there are. The
    first token of a text, at position 0, has none before it, and gets nothing.
    """

    def __init__(self, config):
        super().__init__(config.bigram_vocab_size, config.hidden_size)

    def init_weights(self) -> None:
        init.zeros_(self.weight)

    def forward(self, hidden_states, input_ids, position_ids, cache: Cache | None) -> torch.Tensor:
        """The embeddings with those of the pairs. cache: its last layer, a TokenLayer, knows and learns the tokens."""
        held = None if cache is None else cache.layers[-1]
        last = None if held is None else held.last()
        has_one = position_ids > 0
        if last is None:
            last = torch.zeros_like(input_ids[:, :1])
            has_one = torch.cat((torch.zeros_like(has_one[:, :1]), has_one[:, 1:]), dim=1)
        before = torch.cat((last, input_ids[:, :-1]), dim=1)
        if held is not None:
            held.put_ids(input_ids)  # after: a static cache writes over what `last` shows
        return hidden_states + super().forward(self.rows(before, input_ids)) * has_one[..., None]

    def rows(self, before: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The row of each pair: a multiplicative hash's upper bits (Knuth, volume 3, section 6.4)."""
        hashed = (before * 1_000_003 + input_ids) * 2_654_435_761 & 0xFFFF_FFFF
        return hashed * self.num_embeddings >> 32


def no_bigrams(hidden_states, input_ids, position_ids, cache) -> torch.Tensor:
    """The embeddings as they are."""
    return hidden_states


class LearnedPositions(NoPositions):
    """One trained vector a position (GPT-2); positions end at `max_position_embeddings`."""

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def add(self, hidden_states, position_ids):
        try:
            return hidden_states + self.embed(position_ids)
        except IndexError as error:  # on a CPU; a GPU ends in a device-side assertion, and looking first would stall it
            raise ValueError(
                f"position {int(position_ids.max())} is past max_position_embeddings={self.embed.num_embeddings}: "
                "learned positions end there; shorten the input or generate fewer tokens"
            ) from error

    def next(self, inputs_embeds, cache):
        end = inputs_embeds.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        limit = self.embed.num_embeddings
        if isinstance(end, int) and end > limit:
            raise ValueError(
                f"{end} tokens do not fit max_position_embeddings={limit}: learned positions end there; "
                "shorten the input"
            )
        return super().next(inputs_embeds, cache)


class SinusoidalPositions(NoPositions):
    """Fixed sines and cosines, interleaved (Attention Is All You Need, section 3.5); any position."""

    def __init__(self, config):
        super().__init__(config)
        self.hidden_size = config.hidden_size
        self.register_buffer("inv_freq", self._inv_freq(), persistent=False)

    def _inv_freq(self) -> torch.Tensor:
        """Radians a position: (hidden_size / 2,)."""
        return 1.0 / 10000 ** (torch.arange(0, self.hidden_size, 2, dtype=torch.float) / self.hidden_size)

    def add(self, hidden_states, position_ids):
        phases = position_ids[..., None].float() * self.inv_freq.float()
        waves = torch.stack((phases.sin(), phases.cos()), dim=-1).flatten(-2)
        return hidden_states + waves.to(hidden_states.dtype)

    def init_weights(self):
        # Non-persistent buffers are uninitialised memory after from_pretrained.
        init.copy_(self.inv_freq, self._inv_freq())


class RotaryPositions(NoPositions):
    """Rotary embedding (RoFormer, arXiv 2104.09864), half-split as in Llama, with transformers' scaling types."""

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self._frequencies()
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @property
    def rope_init_fn(self):
        """The scaling function; transformers' dynamic update calls it too."""
        return ROPE_INIT_FUNCTIONS.get(self.rope_type, default_frequencies)

    def _frequencies(self) -> tuple[torch.Tensor, float]:
        """Radians a position, (head_dim / 2,), and the factor of cosines and sines."""
        return self.rope_init_fn(self.config)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The angles of a layer."""
        phases = position_ids[..., None].float() * self.inv_freq.float()
        phases = torch.cat((phases, phases), dim=-1)[:, None]  # one axis for the heads
        cos, sin = phases.cos() * self.attention_scaling, phases.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)

    def angles(self, hidden_states, position_ids):
        return dict.fromkeys(self.layer_types, self(hidden_states, position_ids))

    @staticmethod
    def rotate(query, key, angles):
        return turn(query, *angles), None if key is None else turn(key, *angles)

    def turned(self, layer_type, keys, position_ids):
        rows = position_ids.reshape(-1, position_ids.shape[-1])
        shape = (*position_ids.shape, -1)  # without the axis of the heads, which the positions have or do not need
        return turn(keys, *(angle[:, 0].reshape(shape) for angle in self(keys, rows)))

    def init_weights(self):
        inv_freq, _ = self._frequencies()
        init.copy_(self.inv_freq, inv_freq)
        init.copy_(self.original_inv_freq, inv_freq)


class RotaryPositionsByLayer(NoPositions):
    """Rotary embedding whose parameters `config.rope_parameters` names for each kind of layer."""

    def __init__(self, config):
        super().__init__(config)
        self.by_type = nn.ModuleDict()
        for layer_type in self.layer_types:
            own = copy.copy(config)
            own.rope_parameters = config.rope_parameters[layer_type]
            self.by_type[layer_type] = RotaryPositions(own)

    def angles(self, hidden_states, position_ids):
        return {layer_type: own(hidden_states, position_ids) for layer_type, own in self.by_type.items()}

    def turned(self, layer_type, keys, position_ids):
        return self.by_type[layer_type].turned(layer_type, keys, position_ids)

    def init_weights(self):
        for own in self.by_type.values():
            own.init_weights()


def build_positions(config) -> NoPositions:
    """The positions that a configuration names."""
    return RotaryPositionsByLayer(config) if config.rope_layer_types() else POSITIONS[config.position_encoding](config)


def check_rope(parameters: dict, name: str) -> None:
    """Raise ValueError, with the parameters called `name`, for rotary parameters that are unknown or incomplete."""
    rope_type = parameters.get("rope_type")
    if rope_type not in ROPE_NEEDS:
        raise ValueError(f"{name}.rope_type={rope_type!r}: choose one of {', '.join(ROPE_NEEDS)}")
    for key in ROPE_NEEDS[rope_type]:
        if not isinstance(parameters.get(key), float | int) or not 0 < parameters[key] < math.inf:
            raise ValueError(f"{name}.{key}={parameters.get(key)!r}: {rope_type} needs a number above 0 here")
    if "partial_rotary_factor" in parameters:
        raise ValueError(f"{name}.partial_rotary_factor: heads are rotated whole; leave it out")


def default_frequencies(config, device=None, seq_len=None, **kwargs) -> tuple[torch.Tensor, float]:
    """Unscaled rotary frequencies: (head_dim / 2,) and an attention factor of one."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0


def turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + head_dim / 2) of `states`, (batch, heads, tokens, head_dim), by their tokens' angles."""
    first, second = states.chunk(2, dim=-1)
    cos, sin = cos.to(states.dtype), sin.to(states.dtype)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


POSITIONS = {
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "rope": RotaryPositions,
    "none": NoPositions,
}
