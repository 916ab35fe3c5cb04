"""A probe of recall: tokens seen once, far back, come again. Perplexity hides it when a cache forgets them."""

from typing import NamedTuple

import torch

from .kv_report import Streams

MOST_COPIED, PARTS = 24, 4  # tokens that come twice, and at most which part of a stream they may be
CUE = 3  # a third of them is the key, after which the rest is the value
DISTANCES = 4  # how many, each half of the one before


class Probe(NamedTuple):
    """Streams that end in tokens which they hold once before, at several distances, and which do not.

    ids: (rows, length + 1). distances: of each row, how many tokens lie between the beginnings of the two; 0 where
    there is no first copy. value: how many of the last tokens count.
    """

    ids: torch.Tensor
    distances: torch.Tensor
    value: int


def plant(streams: Streams, rows: int, seed: int) -> Probe:
    """Put tokens into `rows` streams a distance: drawn from the whole text, so that nothing but a copy foretells them.

    The same tokens, in the same streams, at every distance.
    """
    length, text = streams.length, streams.ids.flatten()
    copied = min(MOST_COPIED, length // PARTS)
    end = length + 1 - copied
    drawn = text[torch.randint(len(text), (rows, copied), generator=torch.Generator().manual_seed(seed))]
    distances = [0, *dict.fromkeys(max(copied, (end - copied) // 2**halved) for halved in range(DISTANCES))]
    parts = []
    for distance in distances:
        ids = streams.ids[torch.arange(rows) % len(streams.ids)]
        ids[:, end:] = drawn
        if distance:
            ids[:, end - distance : end - distance + copied] = drawn
        parts.append(ids)
    return Probe(torch.cat(parts), torch.tensor(distances).repeat_interleave(rows), copied - copied // CUE)


class Recalled(NamedTuple):
    """Of the value's tokens at one distance: mean nats, and the share that was the likeliest token."""

    distance: int
    nats: float
    accuracy: float


def recalled(probe: Probe, nats: torch.Tensor, right: torch.Tensor) -> list[Recalled]:
    """What `decode` said of the probe's rows, (rows, targets), by distance; the first, 0, is without a copy."""
    found = []
    for distance in probe.distances.unique().tolist():
        rows = probe.distances == distance
        values = [part[rows, -probe.value :].float().mean().item() for part in (nats, right)]
        found.append(Recalled(distance, *values))
    return found
