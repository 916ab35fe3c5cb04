"""Losses token by token of streams of text that may be longer than a model's context: read whole, or reread."""

from collections.abc import Callable

import torch

from training.data.dataset import EvaluationRows, TokenArray
from training.loop.evaluation import PositionSums, evaluate_rows


class Predictions(PositionSums):
    """Nats and right predictions of every token that counts, in the order of the text."""

    def __init__(self):
        self.parts: list[torch.Tensor] = []

    def add(self, counted, batch) -> None:
        self.parts.append(counted[:2, counted[2] > 0].float().cpu())


def read_whole(model, ids: torch.Tensor, on_stream: Callable = lambda: None) -> torch.Tensor:
    """Nats, and whether the likeliest token was right, of ids[:, 1:], each stream in one pass: (2, streams, tokens).

    ids: (streams, tokens + 1).
    """
    return _read(model, ids, ids.shape[1] - 1, None, on_stream)


def reread(model, ids: torch.Tensor, context: int, on_stream: Callable = lambda: None) -> torch.Tensor:
    """The same where a full context begins anew at its last half, as generate() rereads a text that goes past it."""
    return _read(model, ids, context, context - context // 2, on_stream)


def _read(model, ids: torch.Tensor, context: int, stride: int | None, on_stream: Callable) -> torch.Tensor:
    streams = []
    for stream in ids:
        rows, predictions = EvaluationRows(TokenArray(stream.numpy()), context, stride), Predictions()
        evaluate_rows(model, rows, len(stream), len(rows), by_position=predictions)
        streams.append(torch.cat(predictions.parts, dim=1))
        on_stream()
    return torch.stack(streams, dim=1)


def position_sums(predicted: torch.Tensor) -> torch.Tensor:
    """What `by_position` makes its rows of, (3, tokens), from predictions, (2, streams, tokens)."""
    nats, right = predicted.double().sum(1)
    return torch.stack((nats, right, torch.full_like(nats, predicted.shape[1])))
