"""Loss by position: what each further token of context is worth, as lines to read and as a picture."""

from itertools import pairwise
from pathlib import Path

import torch

from training.loop.evaluation import PositionSums
from training.system.files import write_picture

FINE = 160  # points of the picture's thin line: beyond them neighbours are drawn as one


def position_rows(sums: torch.Tensor) -> list[dict]:
    """Loss and accuracy of the tokens that were predicted from 1, 2, 3–4, 5–8, … tokens of context.

    sums: of `PositionSums`. from_context, to_context: the tokens read before the predicted one, at least and at most.
    """
    edges = [0] + [2**power for power in range(sums.shape[1].bit_length()) if 2**power < sums.shape[1]]
    return binned(sums, [*edges, sums.shape[1]])


def binned(sums: torch.Tensor, edges: list[int]) -> list[dict]:
    """One row for each stretch between two edges in which anything counts."""
    rows = []
    for start, end in pairwise(edges):
        nats, right, tokens = sums[:, start:end].sum(1).tolist()
        if tokens:
            row = {"from_context": start + 1, "to_context": end, "tokens": int(tokens)}
            rows.append(row | {"loss": nats / tokens, "token_accuracy": right / tokens})
    return rows


def position_table(rows: list[dict]) -> str:
    """The rows as a table, with a bar for the loss."""
    highest = max(row["loss"] for row in rows)
    lines = [f"{'context':>13} {'tokens':>12} {'loss':>8} {'accuracy':>9}"]
    for row in rows:
        first, last = row["from_context"], row["to_context"]
        context = f"{last:,}" if first == last else f"{first:,}–{last:,}"
        bar = "█" * max(1, round(24 * row["loss"] / highest)) if highest else ""
        lines.append(f"{context:>13} {row['tokens']:>12,} {row['loss']:>8.4f} {row['token_accuracy']:>9.4f} {bar}")
    return "\n".join(lines)


def draw_positions(sums: PositionSums, path: Path, title: str) -> None:
    """The loss over the tokens of context, on a logarithmic axis, as a PNG.

    Thin: each position; thick: the rows of the table.
    """
    from matplotlib.figure import Figure

    context = sums.sums.shape[1]
    points = sorted({round(context ** (step / FINE)) for step in range(FINE + 1)})
    fine, coarse = binned(sums.sums, [0, *points]), position_rows(sums.sums)
    nats, _, tokens = sums.sums.sum(1).tolist()
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["to_context"] for row in fine], [row["loss"] for row in fine], color="tab:blue", alpha=0.35)
    middles = [(row["from_context"] * row["to_context"]) ** 0.5 for row in coarse]
    axes.plot(middles, [row["loss"] for row in coarse], marker="o", color="tab:blue", label="mean of 1, 2, 3–4, 5–8, …")
    axes.axhline(nats / tokens, color="grey", linestyle="--", linewidth=1, label=f"whole text: {nats / tokens:.4f}")
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(context.bit_length())]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set(xlabel="tokens of context before the predicted one", ylabel="loss (nats a token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend()
    write_picture(path, figure)
