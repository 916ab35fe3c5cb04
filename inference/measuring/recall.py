"""A probe of recall: tokens seen once, far back, come again. Perplexity hides it when a cache forgets them."""

from typing import NamedTuple

import torch

from .kv_report import Streams

MOST_COPIED, PARTS = 24, 4  # tokens that come twice, and at most which part of a stream they may be
CUE = 3  # a third of them is the key, after which the rest is the value
DISTANCES = 4  # how many, each half of the one before


class Probe(NamedTuple):
    """Streams that end in a passage of another, which they hold once before at several distances, or not at all.

    ids: (rows, length + 1). distances: of each row, how many tokens lie between the beginnings of the two; 0 where
    there is no first copy. value: how many of the last tokens count.
    """

    ids: torch.Tensor
    distances: torch.Tensor
    value: int


def plant(streams: Streams, rows: int) -> Probe:
    """Put the beginning of another stream into `rows` streams a distance; the same into the same at every distance."""
    length, count = streams.length, len(streams.ids)
    copied = min(MOST_COPIED, length // PARTS)
    end, places = length + 1 - copied, torch.arange(rows)
    passage = streams.ids[(places + count // 2) % count, :copied]
    distances = [0, *dict.fromkeys(max(copied, (end - copied) // 2**halved) for halved in range(DISTANCES))]
    parts = []
    for distance in distances:
        ids = streams.ids[places % count]
        ids[:, end:] = passage
        if distance:
            ids[:, end - distance : end - distance + copied] = passage
        parts.append(ids)
    return Probe(torch.cat(parts), torch.tensor(distances).repeat_interleave(rows), copied - copied // CUE)


class Recalled(NamedTuple):
    """Of the value's tokens at one distance: nats a token gained by the copy, and the share that was likeliest."""

    distance: int
    gain: float
    accuracy: float


def recalled(probe: Probe, nats: torch.Tensor, right: torch.Tensor) -> list[Recalled]:
    """What `decode` said of the probe's rows, (rows, targets), by distance; the first, 0, is without a copy."""
    values = nats[:, -probe.value :], right[:, -probe.value :].float()
    without = values[0][probe.distances == 0].mean().item()
    found = []
    for distance in probe.distances.unique().tolist():
        loss, accuracy = (value[probe.distances == distance].mean().item() for value in values)
        found.append(Recalled(distance, without - loss, accuracy))
    return found
