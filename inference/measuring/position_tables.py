"""How a model tells positions apart, as tables to draw: learned vectors, sines and cosines, rotations, or nothing."""

import re
from typing import NamedTuple

import torch

from training.model.loading import without_adapter
from training.model.sizes import context_of

MOST = 1024  # positions that are drawn
LEARNED = ("wpe", "embed_positions", "position_embeddings", "positions.embed")  # what tables of positions are called


class PositionTable(NamedTuple):
    """Positions as numbers: `values` (rows, positions) between -1 and 1, and `similarity` (distances,).

    similarity: the cosine between two positions so far apart, on average.
    """

    title: str
    rows: str
    values: torch.Tensor
    similarity: torch.Tensor


@torch.no_grad()
def position_tables(model) -> list[PositionTable]:
    """The tables of a model, under an adapter too; none where only the mask says what comes first."""
    inner = without_adapter(model)
    count = min(MOST, context_of(inner.config, MOST))
    waves = {n: b for n, b in inner.named_buffers() if n.endswith("inv_freq") and "original" not in n and b.dim() == 1}
    if waves:
        is_added = getattr(inner.config, "position_encoding", "rope") == "sinusoidal"
        kind = "sines and cosines, added" if is_added else "rotary: queries and keys are turned"
        tables = {
            kind_of_layer(name, kind): frequencies for name, frequencies in waves.items()
        }  # a layer may keep its own
        return [wave_table(title, frequencies, count) for title, frequencies in tables.items()]
    for name, module in inner.named_modules():
        if isinstance(module, torch.nn.Embedding) and name.endswith(LEARNED):
            return [learned_table(module.weight[-min(module.num_embeddings, context_of(inner.config, MOST)) :][:count])]
    return []


def kind_of_layer(name: str, kind: str) -> str:
    """The kind, and of which layers it is where the model has several, which the buffer's name tells."""
    layer_type = re.search(r"(full|sliding)_attention", name)
    return f"{kind} ({layer_type[0].replace('_', ' ')})" if layer_type else kind


def wave_table(title: str, frequencies: torch.Tensor, count: int) -> PositionTable:
    """Cosines of positions times frequencies, (pairs,) in radians a position."""
    values = (frequencies.float().cpu()[:, None] * torch.arange(count)).cos()
    return PositionTable(title, "frequency, from fast to slow", values, values.mean(0))


def learned_table(vectors: torch.Tensor) -> PositionTable:
    """Cosines between learned vectors, (positions, hidden_size)."""
    unit = torch.nn.functional.normalize(vectors.float().cpu(), dim=-1)
    cosines = unit @ unit.T
    similarity = torch.stack([cosines.diagonal(distance).mean() for distance in range(len(cosines))])
    return PositionTable("learned vectors: how alike two positions are", "position", cosines, similarity)


def no_positions(model) -> str:
    """What to say where there is no table."""
    inner = without_adapter(model)
    if getattr(inner.config, "position_encoding", None) == "none":
        return "This model has no positions:\nthe causal mask alone tells what comes first."
    return f"No table of positions was found in this {type(inner).__name__}:\nthey may enter its attention otherwise."
