"""Attention with a fixed-size state in place of keys and values: what a sequence holds does not grow with its length.

A token writes the outer product of its key and value into a matrix, head_dim by head_dim a head, and its query reads
it. Computed one token after the other in generation, and in training by chunks: within a chunk as softmax attention is,
but without the softmax, and from chunk to chunk through the state. With one chunk for all tokens this is the parallel
form, and all three give the same numbers.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, LinearAttentionLayer, StaticCache
from transformers.utils.generic import maybe_autocast

from .compat import CACHE_NAME
from .positions import POSITIONS
from .segment_memory import HoldsRows, kept_of

CHUNK = 64  # tokens: work within a chunk grows with it, the number of steps through the state falls
TINY = 1e-20  # what a normaliser is at least: of a row of padding it is zero
SHORTEST_MEMORY, LONGEST_MEMORY = 4, 1024  # tokens in which the first and the last head, untrained, forget to 1/e


# ---- the three forms


def passed_on(log_decay: torch.Tensor, documents: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """How much is passed on, from 0 to 1, of what is written: within chunks, and from one to the next.

    log_decay: (batch, heads, 1, chunks, size, 1), at most 0; documents: numbers, (batch, 1, 1, chunks, size). Returns:
    of token j's at token i, (…, chunks, size, size); of the state before the chunk at token i, and of token j's in the
    state after it, (…, chunks, size, 1); of the state before in the state after, (…, chunks, 1, 1).
    """
    total = log_decay.cumsum(dim=-2)
    later = torch.ones(total.shape[-2], total.shape[-2], dtype=torch.bool, device=total.device).triu(1)
    within = (total - total.mT).masked_fill(later, -torch.inf).exp()  # differences first: e^total alone would underflow
    entering, leaving, carried = total.exp(), (total[..., -1:, :] - total).exp(), total[..., -1:, :].exp()
    if documents is not None:
        last = documents[..., -1:]
        before = torch.cat((torch.ones_like(last[..., :1, :]), last[..., :-1, :]), dim=-2)
        within = within * (documents[..., :, None] == documents[..., None, :])
        entering, leaving = entering * (documents == before)[..., None], leaving * (documents == last)[..., None]
        carried = carried * (before == last)[..., None]
    return within, entering, leaving, carried


def chunked(query, key, value, state, log_decay=None, strength=None, documents=None, size: int = CHUNK):
    """What the queries read, (batch, heads, groups, tokens, value_dim), and the state after all tokens.

    query: (batch, heads, groups, tokens, key_dim); key, value: (batch, heads, tokens, …); state: (batch, heads,
    key_dim, value_dim). log_decay, (batch, heads, tokens): the logarithm of how much of the state a token keeps; None:
    all. strength, (batch, heads, tokens), from 0 to 1: each token first takes that much of what its key reads out of
    the state, and puts as much of its value there (delta rule); None: it adds its value. documents: (batch, tokens),
    numbers from 1 that rise: nothing passes from one to the next. All in float32.
    """
    tokens = query.shape[-2]
    size = min(size, tokens)

    def cut(states: torch.Tensor) -> torch.Tensor:
        """(…, tokens, dim) to (…, chunks, size, dim); a chunk is filled with tokens that write nothing."""
        return nn.functional.pad(states, (0, 0, 0, -tokens % size)).unflatten(-2, (-1, size))

    query, key, value = cut(query), cut(key[:, :, None]), cut(value[:, :, None])
    log_decay = key.new_zeros(1, 1, 1, 1, size, 1) if log_decay is None else cut(log_decay[:, :, None, :, None])
    if documents is not None:
        filled = torch.cat((documents, documents[:, -1:].expand(-1, -tokens % size)), dim=-1)
        documents = filled[:, None, None].unflatten(-1, (-1, size))
    within, entering, leaving, carried = passed_on(log_decay, documents)
    kept_keys = (key * leaving).mT
    if strength is None:
        states, state = through_chunks(state, carried, kept_keys @ value)
    else:
        strength = cut(strength[:, :, None, :, None])
        # What each token finds of the earlier ones of its chunk is solved for all of them at once (arXiv 2412.06464).
        found = strength * within * (key @ key.mT)
        sides = torch.cat((strength * value, strength * entering * key), dim=-1)
        solved = torch.linalg.solve_triangular(found.tril(-1), sides, upper=False, unitriangular=True)
        value, taken = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
        kept = torch.eye(key.shape[-1], device=key.device) * carried - kept_keys @ taken
        states, state = through_chunks(state, kept, kept_keys @ value)
        value = value - taken @ states
    read = (query * entering) @ states + ((query @ key.mT) * within) @ value
    return read.flatten(-3, -2)[..., :tokens, :], state


def through_chunks(state: torch.Tensor, kept: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states before each chunk, (batch, heads, 1, chunks, key_dim, value_dim), and the one after the last.

    kept: what a chunk keeps of the state, a factor (…, chunks, 1, 1) or a matrix (…, chunks, key_dim, key_dim); added:
    what it adds to it, (…, chunks, key_dim, value_dim).
    """
    states, state, keep = [], state[:, :, None], torch.mul if kept.shape[-1] == 1 else torch.matmul
    kept = kept.expand(-1, -1, -1, added.shape[3], -1, -1)
    for kept_here, added_here in zip(kept.unbind(3), added.unbind(3), strict=True):
        states.append(state)
        state = keep(kept_here, state) + added_here
    return torch.stack(states, dim=3), state[:, :, 0]


def recurrent(query, key, value, state, log_decay=None, strength=None):
    """As `chunked`, one token after the other."""
    reads = []
    for token in range(query.shape[-2]):
        here = slice(token, token + 1)
        new_key, new_value = key[:, :, here], value[:, :, here]
        if log_decay is not None:
            state = state * log_decay[:, :, here, None].exp()
        if strength is not None:
            new_value = strength[:, :, here, None] * (new_value - new_key @ state)
        state = state + new_key.mT @ new_value
        reads.append(query[..., here, :] @ state[:, :, None])
    return torch.cat(reads, dim=-2), state


# ---- what a sequence holds


class StateLayer(HoldsRows, CacheLayerMixin):
    """Tensors of a fixed size by their names, and how many tokens they have seen.

    Where a mask is made for softmax layers this one may be asked for its sizes, as the first that does not slide: it
    answers for the first that keeps all keys (`guide`).
    """

    is_sliding = supports_early_init = False

    def __init__(self, guide: CacheLayerMixin | None = None, is_static: bool = False):
        super().__init__()
        self.guide, self.is_compileable = guide, is_static
        self.tensors: dict[str, torch.Tensor] = {}
        self.seen = torch.tensor(0) if is_static else 0

    def put(self, tokens: int, **tensors: torch.Tensor) -> None:
        """Replace tensors, (batch, …) each, after so many more tokens; those of a static cache stay where they are."""
        for name, tensor in tensors.items():
            if self.is_compileable and name in self.tensors:
                self.tensors[name].copy_(tensor)
            else:
                self.tensors[name] = tensor.clone() if self.is_compileable else tensor
                self.seen = self.seen.to(tensor.device) if self.is_compileable else self.seen
        self.seen += tokens

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the sequences hold here, and go on from."""
        return dict(self.tensors)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.seen + query_length, 0) if self.guide is None else self.guide.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1  # none: transformers' sign for that

    def reset(self) -> None:
        self.change_rows(torch.Tensor.zero_)
        self.seen = self.seen * 0

    def change_rows(self, change) -> None:
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}

    def offload(self) -> None:
        """Nothing is moved: it is small, and every token needs all of it."""

    prefetch = offload

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("linear_attention: its state holds no single tokens, so none can be taken back")

    def update(self, *args, **kwargs):
        raise ValueError("linear_attention: its state takes no keys and values; layer types and cache do not agree")

    lazy_initialization = update


class TokenLayer(StateLayer):
    """The tokens that were seen, of which embeddings of pairs need the last; a static cache holds that one alone."""

    is_croppable = property(lambda self: not self.is_compileable)

    def last(self) -> torch.Tensor | None:
        """(batch, 1), or None before the first."""
        return self.tensors["ids"][:, -1:] if self.tensors else None

    def put_ids(self, ids: torch.Tensor) -> None:
        """Hold (batch, tokens) more."""
        held = [] if self.is_compileable or not self.tensors else [self.tensors["ids"]]
        self.put(ids.shape[1], ids=ids[:, -1:] if self.is_compileable else torch.cat((*held, ids), dim=1))

    def reset(self) -> None:
        self.seen = self.seen * 0  # the next token is the first of a text, which asks for none before it
        self.tensors = self.tensors if self.is_compileable else {}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        if self.is_compileable:
            raise ValueError("bigram_vocab_size: a static cache holds the last token alone, which cannot be taken back")
        self.seen = kept_of(self.seen, tokens_to_remove)
        self.change_rows(lambda ids: ids[:, : self.seen])


def with_state_layers(cache: Cache | None, config) -> Cache | None:
    """The same cache, with a StateLayer in place of what transformers provides for linear layers.

    That knows no sequence length, which a model of linear layers alone is asked for. For embeddings of pairs a
    TokenLayer follows all layers. Raises ValueError for a cache that holds something else there.
    """
    if cache is None or not (config.bigram_vocab_size or "linear_attention" in config.layer_types):
        return cache
    if not isinstance(cache, Cache):
        what = (
            "bigram_vocab_size: needs the last token" if config.bigram_vocab_size else "linear_attention: has a state"
        )
        raise ValueError(f"{what}, and a paged cache holds keys and values alone; use generate() for each prompt")
    if not cache.layers:
        cache.layers.extend(DynamicCache(config=config).layers)
    if config.bigram_vocab_size and not isinstance(cache.layers[-1], TokenLayer):
        cache.layers.append(TokenLayer(is_static=isinstance(cache, StaticCache)))
    guide = next((cache.layers[i] for i, kind in enumerate(config.layer_types) if kind == "full_attention"), None)
    for i in (i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"):
        if isinstance(cache.layers[i], LinearAttentionLayer):
            cache.layers[i] = StateLayer(guide, isinstance(cache, StaticCache))
        elif not isinstance(cache.layers[i], StateLayer):
            raise ValueError(
                f"linear_attention: layer {i} has a state and no keys for {type(cache.layers[i]).__name__} to hold; "
                "leave that cache to the softmax layers"
            )
    return cache


# ---- the layers


class ShortConvolution(nn.Module):
    """Each channel's weighted sum over its last few tokens; untrained, it passes on what it is given."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))

    def init_weights(self) -> None:
        newest = torch.zeros_like(self.weight)
        newest[..., -1] = 1
        init.copy_(self.weight, newest)

    def forward(self, states: torch.Tensor, before: torch.Tensor | None, documents: torch.Tensor | None):
        """(batch, tokens, channels) to the same, and the last (batch, kernel - 1, channels) that went in.

        before: those of earlier tokens. documents: as in `chunked`.
        """
        reach, tokens = self.weight.shape[-1] - 1, states.shape[1]
        before = states.new_zeros(len(states), reach, states.shape[-1]) if before is None else before.to(states.dtype)
        whole = torch.cat((before, states), dim=1)
        summed = states * self.weight[:, 0, -1].to(states.dtype)
        for back in range(1, reach + 1):
            earlier = whole[:, reach - back : reach - back + tokens]
            if documents is not None:
                numbers = nn.functional.pad(documents, (back, 0), value=1)[:, :tokens]
                earlier = earlier * (numbers == documents)[..., None]
            summed = summed + earlier * self.weight[:, 0, -1 - back].to(states.dtype)
        return summed, whole[:, tokens:]


class LinearAttention(nn.Module):
    """Softmax's exponential replaced by a product of features, elu(x) + 1 (arXiv 2006.16236).

    Where positions rotate, they turn the features that are summed, and not those of the normaliser, which therefore
    stays positive (arXiv 2104.09864, section 3.3).
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.rotate = POSITIONS[config.position_encoding].rotate
        heads_size, kv_size = config.num_attention_heads * config.head_dim, self.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads_size, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.bias)
        self.o_proj = nn.Linear(heads_size, config.hidden_size, bias=config.bias)
        self.o_proj.is_residual_projection = True
        norm, kernel = config.qk_norm, config.linear_conv_kernel_dim
        self.q_norm = nn.RMSNorm(self.head_dim, config.norm_eps, config.norm_gain) if norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, config.norm_eps, config.norm_gain) if norm else nn.Identity()
        self.conv = ShortConvolution(heads_size + 2 * kv_size, kernel) if kernel else None
        self.dropout = nn.Dropout(config.attention_dropout)  # of what is read: there are no weights to drop

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        """hidden_states: (batch, tokens, hidden_size). Returns the same shape, and None: there are no weights to show.

        attention_mask: from `create_document_mask`. position_embeddings: the angles of this kind of layer.
        """
        cache = kwargs.get(CACHE_NAME)
        layer = None if cache is None else cache.layers[self.layer_idx]
        held = {} if layer is None else layer.tensors
        documents = is_written = None
        if attention_mask is not None:
            documents, is_written = attention_mask.long().cummax(dim=-1).values.clamp(min=1), attention_mask > 0
        states, new = self._projected(hidden_states, held, documents, is_written)
        heads = (states_.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states_ in states)
        read, memory = self.mix(*heads, hidden_states, held, documents, is_written, position_embeddings)
        if layer is not None:
            layer.put(hidden_states.shape[1], **new, **memory)
        return self.o_proj(self.dropout(read.transpose(1, 2).flatten(2).to(hidden_states.dtype))), None

    def _projected(self, hidden_states, held: dict, documents, is_written) -> tuple[tuple, dict]:
        """Queries, keys and values, (batch, tokens, heads * head_dim) each, and what a convolution keeps of them."""
        projected = tuple(projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.conv is None:
            return projected, {}
        states = torch.cat(projected, dim=-1)
        if is_written is not None:
            states = states * is_written[..., None]
        states, last = self.conv(states, held.get("conv"), documents)
        return states.split([part.shape[-1] for part in projected], dim=-1), {"conv": last}

    def mix(self, query, key, value, hidden_states, held: dict, documents, is_written, angles):
        """What the queries read, (batch, heads, tokens, head_dim), and the state after, by names.

        query: (batch, heads, tokens, head_dim); key, value: (batch, kv_heads, tokens, head_dim).
        """
        query, key = features(self.q_norm(query)), features(self.k_norm(key))
        if is_written is not None:
            key = key * is_written[:, None, :, None]
        turned_query, turned_key = self.rotate(query, key, angles)
        ones = torch.ones_like(value[..., :1])
        read, state = self.through_state(turned_query, turned_key, value, held.get("state"), documents=documents)
        weight, total = self.through_state(query, key, ones, held.get("total"), documents=documents)
        return read / weight.clamp(min=TINY), {"state": state, "total": total}

    def through_state(self, query, key, value, state, documents=None, **gates):
        """What the queries read, (batch, heads, tokens, value_dim), and the state after; in float32 throughout."""
        query, key, value = (states.float() for states in (query, key, value))
        if state is None:
            state = key.new_zeros(len(key), self.kv_heads, key.shape[-1], value.shape[-1])
        query = query.unflatten(1, (self.kv_heads, -1))
        with maybe_autocast(query.device.type, enabled=False):
            if query.shape[-2] == 1:
                read, state = recurrent(query, key, value, state, **gates)
            else:
                read, state = chunked(query, key, value, state, documents=documents, **gates)
        return read.flatten(1, 2), state


def features(states: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 in float32, above zero where expm1 has lost all that is left of e^x."""
    states = states.float()
    return torch.where(states > 0, states + 1, states.clamp(max=0).exp())


class GatedDeltaAttention(LinearAttention):
    """Each head forgets by a gate, and a token's value replaces what the state has at its key (arXiv 2412.06464).

    Queries and keys have length one, so nothing needs a normaliser: what is read is normed, and gated once more.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.g_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=config.bias)
        self.b_proj = nn.Linear(config.hidden_size, self.kv_heads, bias=config.bias)
        self.f_proj = nn.Linear(config.hidden_size, self.kv_heads)  # its bias says how long an untrained head remembers
        self.f_proj.is_forget_gate = True
        self.o_norm = nn.RMSNorm(self.head_dim, config.norm_eps, config.norm_gain)

    def mix(self, query, key, value, hidden_states, held, documents, is_written, angles):
        strength = self.b_proj(hidden_states).float().sigmoid().transpose(1, 2)
        log_decay = nn.functional.logsigmoid(self.f_proj(hidden_states).float()).transpose(1, 2)
        if is_written is not None:
            strength, log_decay = strength * is_written[:, None], log_decay * is_written[:, None]
        query, key = (unit(nn.functional.silu(states)) for states in (self.q_norm(query), self.k_norm(key)))
        query, key = self.rotate(query, key, angles)
        gates = {"log_decay": log_decay, "strength": strength, "documents": documents}
        read, state = self.through_state(query, key, nn.functional.silu(value), held.get("state"), **gates)
        gate = nn.functional.silu(self.g_proj(hidden_states)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return self.o_norm(read.to(gate.dtype)) * gate, {"state": state}


def unit(states: torch.Tensor) -> torch.Tensor:
    """Vectors of length one, in float32."""
    return nn.functional.normalize(states.float(), dim=-1, eps=1e-6)


def forget_bias(heads: int) -> torch.Tensor:
    """The bias of the gates of heads that remember from the shortest to the longest, in equal ratios: (heads,)."""
    ends = torch.tensor([SHORTEST_MEMORY, LONGEST_MEMORY], dtype=torch.float).log()
    return torch.lerp(*ends, torch.linspace(0, 1, heads))  # sigmoid(log n) = 1 - 1 / (n + 1)


LINEAR_ATTENTION = {"elu": LinearAttention, "gated_delta": GatedDeltaAttention}


def build_linear_attention(config, layer_idx: int) -> LinearAttention:
    """The kind that the configuration names."""
    return LINEAR_ATTENTION[config.linear_attention](config, layer_idx)


__all__ = ["StateLayer", "TokenLayer", "build_linear_attention", "with_state_layers"]
