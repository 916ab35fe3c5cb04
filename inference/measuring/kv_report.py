"""The one measure of caches: loss by decoding through each, on the same tokens, with the bits that it holds.

A pass over whole sequences would not go through a cache at all (transformers' quantized ones return what they were
given), so every token is decoded by itself, over many streams of running text at once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache

from modeling.compat import CACHE_NAME
from training.system.errors import UserError

FEWEST_STREAMS = 8  # of fewer an interval would say nothing
DRAWS, CONFIDENCE = 4000, 0.95  # of the bootstrap
FULL_BITS = 16  # of a number that is not quantized: what the baseline stores


class Streams(NamedTuple):
    """Stretches of running text, and from which place on their tokens are predicted from enough context to count.

    ids: (streams, length + 1). first: the first target that counts is ids[:, first + 1]. bytes_per_token: of the text.
    """

    ids: torch.Tensor
    first: int
    bytes_per_token: float

    @property
    def length(self) -> int:
        return self.ids.shape[1] - 1

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that count, (streams, length - first)."""
        return self.ids[:, self.first + 1 :]


def cut_streams(ids: torch.Tensor, length: int, most: int, bytes_per_token: float) -> Streams:
    """At most `most` streams of `length` tokens and one to predict, spread over the text; their last half counts.

    ids: (tokens,). Raises UserError for a text that is too short.
    """
    if most < FEWEST_STREAMS:
        raise UserError(f"streams={most}: must be at least {FEWEST_STREAMS}, or an interval would say nothing")
    count = min(most, (len(ids) - 1) // length)
    if count < FEWEST_STREAMS:
        needed = f"{FEWEST_STREAMS} streams of {length} need {FEWEST_STREAMS * length + 1:,}"
        raise UserError(f"the text has {len(ids):,} tokens: {needed}; give a longer text, or a shorter --length")
    starts = torch.linspace(0, len(ids) - 1 - length, count).long()
    return Streams(ids[starts[:, None] + torch.arange(length + 1)], length // 2, bytes_per_token)


class Decoded(NamedTuple):
    """What was said of the tokens that count, (rows, targets): nats, and whether the likeliest token was right.

    bits: what the cache held of one row in the end; mean_bits: on average, when those tokens were predicted.
    """

    nats: torch.Tensor
    right: torch.Tensor
    bits: int
    mean_bits: float


@torch.inference_mode()
def decode(
    model, ids: torch.Tensor, first: int, new_cache: Callable[[], Cache | None], batch_size: int, on_token=lambda: None
) -> Decoded:
    """Predict ids[:, first + 1:] by decoding each token through a cache, `batch_size` rows at once.

    ids: (rows, tokens). new_cache: makes an empty one; None for that which the model makes itself.
    """
    nats, right, held = [], [], []
    for rows in ids.to(model.device).split(batch_size):
        cache, logits, held = new_cache(), [], []
        for place in range(rows.shape[1] - 1):
            step = model(input_ids=rows[:, place : place + 1], use_cache=True, **{CACHE_NAME: cache})
            cache = getattr(step, CACHE_NAME)
            if place >= first:
                logits.append(step.logits[:, -1].float())
                held.append(held_bits(cache) / len(rows))
            on_token()
        logits, targets = torch.stack(logits, 1), rows[:, first + 1 :]
        nats.append(cross_entropy(logits.transpose(1, 2), targets, reduction="none").cpu())
        right.append((logits.argmax(-1) == targets).cpu())
        cache.batch_select_indices(torch.tensor([0], device=model.device))
    return Decoded(torch.cat(nats), torch.cat(right), held_bits(cache), sum(held) / len(held))


def own_cache() -> None:
    """No cache is given, and so the model makes its own."""


def held_bits(cache: Cache) -> int:
    """Every bit that a cache holds; of a layer that does not say, its keys and values at 16 bits a number."""
    return cache.state_bits() if hasattr(cache, "state_bits") else sum(map(bits_of_layer, cache.layers))


def bits_of_layer(layer) -> int:
    if hasattr(layer, "state_bits"):
        return layer.state_bits()
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    return FULL_BITS * sum(states.numel() for states in held if states is not None)


class Interval(NamedTuple):
    """An estimate, and the ends between which 95 of 100 draws lie."""

    value: float
    low: float
    high: float


def paired(nats: torch.Tensor, baseline: torch.Tensor, num_bytes: float, seed: int) -> tuple[Interval, Interval]:
    """(bits per byte lost, percent of the baseline's loss lost) on the same tokens, (streams, targets) each.

    A bootstrap whose blocks are whole streams: what happens within one hangs together. num_bytes: of all those tokens.
    """
    ours, theirs = (values.double().sum(1) for values in (nats, baseline))
    lost, drawn = ours - theirs, draw(len(ours), seed)
    per_byte = 1 / math.log(2) / num_bytes
    return (
        interval(lost.sum() * per_byte, lost[drawn].sum(1) * per_byte),
        interval(100 * lost.sum() / theirs.sum(), 100 * lost[drawn].sum(1) / theirs[drawn].sum(1)),
    )


def drawn_mean(values: torch.Tensor, seed: int) -> Interval:
    """The mean of one value a stream, (streams,)."""
    values = values.double()
    return interval(values.mean(), values[draw(len(values), seed)].mean(1))


def draw(streams: int, seed: int) -> torch.Tensor:
    """As many streams as there are, with replacement, again and again: their numbers, (draws, streams)."""
    return torch.randint(streams, (DRAWS, streams), generator=torch.Generator().manual_seed(seed))


def interval(value: torch.Tensor, drawn: torch.Tensor) -> Interval:
    """value: of all streams; drawn: of each draw, (draws,)."""
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    return Interval(value.item(), *drawn.quantile(ends).tolist())
