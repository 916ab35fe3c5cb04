"""Caches that hold keys as they were before their positions turned them, and Transformer-XL's memory, which is one.

What is evicted, moved or carried into another segment needs that: a key can then be turned for the place it has now.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, DynamicLayer


class HoldsRows(ABC):
    """What a cache layer with a state of its own does with the sequences of a batch, its tensors' rows."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """Everything that is held, by name."""

    @abstractmethod
    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `change` of each tensor, whose first axis is the batch, in its place."""

    def state_bits(self) -> int:
        """The size of `state()`, in bits."""
        return 8 * sum(tensor.nbytes for tensor in self.state().values())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.change_rows(lambda tensor: tensor[indices.to(tensor.device)])

    reorder_cache = batch_select_indices  # to the rows that beams go on from

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))


def kept_of(seen: int, tokens_to_remove: int) -> int:
    """How many of the tokens seen a `crop` leaves; as in transformers the number comes negative, or is that to keep."""
    return min(seen, tokens_to_remove if tokens_to_remove > 0 else seen + tokens_to_remove)


class UnrotatedCache(Cache):
    """A cache all of whose layers are UnrotatedLayers, or hold nothing."""

    holds_unrotated = True  # the model looks for it, and gives the layers what they turn keys with


class UnrotatedLayer(DynamicLayer):
    """All keys and values, the keys un-rotated: what eviction policies and memories build on.

    A subclass decides how they are held (`extend`, `length`), what stays (`keep`), and where in the text it is said to
    be (`positions`).
    """

    is_croppable = False

    def __init__(self):
        super().__init__()
        self.seen = 0

    @property
    def length(self) -> int:
        """The tokens held."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def update(self, key_states, value_states, query_states=None, rotate=None, scaling=None, **more):
        """The keys, turned, and values of what was held and of the new tokens: two (batch, kv_heads, keys, head_dim).

        key_states, value_states: (batch, kv_heads, tokens, head_dim), as they were before positions turned them.
        query_states: (batch, heads, tokens, head_dim), turned. rotate: (keys, their positions) to keys that are turned;
        positions are (keys,), or one a key, (batch, kv_heads, keys). scaling: of the queries, as attention scales them.
        more: for `extend`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.extend(key_states, value_states, **more)
        self.seen += key_states.shape[-2]
        turned = keys if rotate is None else rotate(keys, self.positions(keys.shape[-2]))
        self.keep(turned, query_states, scaling)
        return turned, values

    def extend(self, key_states, value_states, **more) -> tuple[torch.Tensor, torch.Tensor]:
        """Hold the new tokens too; returns the keys, un-rotated, and values of all, as they are read back."""
        self.keys = torch.cat((self.keys, key_states), dim=-2)
        self.values = torch.cat((self.values, value_states), dim=-2)
        return self.keys, self.values

    def positions(self, length: int) -> torch.Tensor:
        """Positions, (length,), of that many keys, the newest last: the places right before the next token."""
        return torch.arange(self.seen - length, self.seen, device=self.device)

    def keep(self, turned, query_states, scaling) -> None:
        """Choose what stays of all that is held; here, all.

        turned: the keys as attention reads them, (batch, kv_heads, keys, head_dim), those of the new tokens last.
        query_states: (batch, heads, new tokens, head_dim), turned. scaling: of the queries.
        """

    def get_seq_length(self) -> int:
        """The tokens seen, held or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` will return, and how many tokens came before the first of them."""
        return self.length + query_length, self.seen - self.length

    def reset(self) -> None:
        super().reset()
        self.seen = 0


def refuse_padding(attention_mask: torch.Tensor | dict | None, cache: Cache | None) -> None:
    """Refuse padded rows with a cache that would lose track of where the padding is.

    That is at a text's beginning one that drops tokens, and a memory where it has let go of any.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return
    is_first = getattr(cache, "has_gaps", False) and cache.get_seq_length() == 0
    is_memory = isinstance(cache, SegmentMemory) and cache.has_let_go(attention_mask.shape[1])
    if (is_first or is_memory) and not attention_mask.all():
        why = "a memory, whose segments begin with the padding" if is_memory else "a cache that drops tokens"
        raise ValueError(f"padded rows do not go with {why}; give rows of one length, or one by one")


def memory_obstacle(config) -> str:
    """Why a model of this configuration cannot keep a memory of segments, and the mend; empty where it can."""
    if config.position_encoding not in ("rope", "none"):
        how = "numbers a text from its beginning, and a memory goes on past all numbers"
        return f"position_encoding={config.position_encoding!r} {how}; set it to rope or none"
    if "linear_attention" in config.layer_types:
        return "layer_types has 'linear_attention', which keeps a state of its own; use other layers"
    if config.bigram_vocab_size:
        return "a memory does not hold the tokens that bigram_vocab_size needs; leave that out"
    return "a memory is not held in codes; leave kv_quantization out" if config.kv_quantization else ""


class MemoryLayer(UnrotatedLayer):
    """The tokens of the segment that is being read, and the `memory_length` before it."""

    def __init__(self, memory_length: int, segment_length: int):
        super().__init__()
        self.memory_length, self.segment_length = memory_length, segment_length
        self.read = 0  # tokens of the segment that is being read

    def keep(self, turned, query_states, scaling):
        """Where a segment is full the next one begins: of all before it the last `memory_length` tokens stay."""
        self.read = (self.read + query_states.shape[-2]) % self.segment_length
        start = max(0, self.keys.shape[-2] - self.memory_length - self.read)
        keys, values = (states[..., start:, :].detach() for states in (self.keys, self.values))
        # A view of what was cut would hold on to all of it.
        self.keys, self.values = (keys.clone(), values.clone()) if start else (keys, values)

    def reset(self) -> None:
        super().reset()
        self.read = 0


class SegmentMemory(UnrotatedCache):
    """Transformer-XL's memory (arXiv 1901.02860): what each layer knew of the tokens before the segment it reads.

    A text is read in segments of `max_position_embeddings` tokens. All tokens of a segment attend to those before them
    in it, and to the last `memory_length` tokens before it, through which no gradient flows. So a layer sees
    `memory_length` tokens further than the one below it, and a text without end takes a state of bounded size. Read
    token by token, or in pieces that end where segments do, a text gives the same as segment by segment.

    Unlike the paper's, it holds keys and values and not the hidden states that they are made of: those of a memory are
    not made again with today's weights, and the projections learn from the segment alone. Positions are the model's own
    (rotary, or none), not the paper's relative sinusoids with biases of their own.

    memory_length: tokens, in place of the configuration's. reach: how many before its segment a token may have seen in
    training (default: the configuration's memory). With a longer memory each token sees as far back as half of those of
    a segment did, and no further: distances that few or none saw cost more than an older token is worth.
    """

    def __init__(self, config, memory_length: int | None = None, reach: int | None = None):
        length = config.memory_length if memory_length is None else memory_length
        segment = config.max_position_embeddings
        reach = config.memory_length if reach is None else reach
        super().__init__(layers=[MemoryLayer(length, segment) for _ in range(config.num_hidden_layers)])
        # Of how many tokens up to itself, itself among them, each sees no more; None: all that is held.
        self.sight = reach + segment // 2 if 0 < reach < length else None
        # (batch,): how many of the tokens that are held a row has read since it began
        self.known: torch.Tensor | int = 0

    def has_let_go(self, tokens: int) -> bool:
        """Whether the last of so many tokens of a text no longer sees all; `begin_segment` tells that apart by row."""
        first = self.layers[0]
        kept = first.segment_length * (first.memory_length // first.segment_length + 1)
        return self.get_seq_length() > 0 and tokens > kept and not torch.is_tensor(self.known)

    def prefill_size(self, inputs_embeds: torch.Tensor | None) -> int | None:
        """In pieces of how many tokens generate() is to read a prompt; it cannot cut one of inputs_embeds up."""
        segment = self.layers[0].segment_length
        if inputs_embeds is None:
            return segment
        if (tokens := inputs_embeds.shape[1]) > segment:
            why = f"{tokens} tokens are read in segments of {segment}"
            raise ValueError(f"inputs_embeds: {why}; give input_ids, or read all but the last segment before")
        return None

    def begin_segment(self, is_new: torch.Tensor, tokens: int) -> torch.Tensor:
        """Make ready for one more segment of a batch whose rows go on where they stood.

        is_new: (batch,), true or 1 where a row is another text, of which nothing is known. tokens: of the segment.
        Returns its attention mask, (batch, held + tokens): what a row held before it began anew is hidden from it.
        """
        held = self.layers[0].length
        for layer in self.layers:
            layer.seen = layer.length  # numbered anew: positions stay small however long the text is
        known = torch.as_tensor(self.known, device=is_new.device).clamp(max=held)
        known = torch.where(is_new.bool(), 0, known)
        self.known = known + tokens
        return (torch.arange(held + tokens, device=is_new.device) >= held - known[:, None]).long()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it holds between two segments, by name, each with the batch first."""
        held = {"known": self.known}
        for number, layer in enumerate(self.layers):
            if layer.is_initialized:  # one that reuses another's keys holds nothing
                held |= {f"keys.{number}": layer.keys, f"values.{number}": layer.values}
        return held

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave; they are on the device, and of the type, that the model computes with."""
        self.known = tensors["known"]
        for number, layer in enumerate(self.layers):
            if f"keys.{number}" in tensors:
                layer.lazy_initialization(tensors[f"keys.{number}"], tensors[f"values.{number}"])
                layer.keys, layer.values = tensors[f"keys.{number}"], tensors[f"values.{number}"]
                layer.seen = layer.length


__all__ = [
    "HoldsRows",
    "MemoryLayer",
    "SegmentMemory",
    "UnrotatedCache",
    "UnrotatedLayer",
    "kept_of",
    "memory_obstacle",
    "refuse_padding",
]
