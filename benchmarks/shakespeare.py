"""How fast and how good are the Tiny Shakespeare recipes, beside nanoGPT? Prints one JSON line.

    python benchmarks/shakespeare.py --text tinyshakespeare.txt [--nanogpt DIR] [--only PART …] [--rounds 3]

Parts: `cpu` is nanoGPT's CPU setting (training tokens/s in alternation, then our whole run's validation loss);
`cpu-seeds` is its loss after 2,000 steps with six seeds, on both sides;
`cpu-fast` and `fast` are our own recipes (loss, and wall time of the whole process); `fast-speed` is the training
tokens/s of the 10.7 M model at 16 x 256, in alternation. DIR is a checkout of karpathy/nanoGPT, which is copied, never
written to; without it our side alone runs. Losses are over the whole validation split in non-overlapping windows, for
both.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import torch

from benchmarks.contenders import BIG, SMALL, WHOLE, Acorn, NanoGPT, alternate


def speeds(
    acorn: Acorn, nanogpt: NanoGPT | None, rounds: int, recipe: str, steps: int, flags: str, tokens: int
) -> dict:
    """Median training tokens/s of both sides in alternation, and the ratio pair by pair."""
    contenders = [lambda: acorn.tokens_per_second(recipe, steps)]
    if nanogpt is not None:
        contenders.append(lambda: nanogpt.tokens_per_second(flags, tokens, steps))
    ours, *theirs = alternate(rounds, *contenders)
    figures = {"acorn_tokens_per_second": statistics.median(ours)}
    if theirs:
        ratios = [a / b for a, b in zip(ours, theirs[0], strict=True)]
        figures |= {"nanogpt_tokens_per_second": statistics.median(theirs[0]), "speed_ratio": statistics.median(ratios)}
    return figures


def measure_cpu(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """nanoGPT's CPU recipe: speed in alternation, then our whole run."""
    figures = speeds(acorn, nanogpt, rounds, "shakespeare-char-cpu", 300, SMALL, 12 * 64)
    rows, seconds = acorn.pretrain("shakespeare-char-cpu")
    return figures | {"acorn_loss": min(row["eval_loss"] for row in rows), "acorn_seconds": seconds}


def measure_cpu_seeds(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """Losses of the whole CPU recipe with six seeds, and of nanoGPT's own loop with the same; no times."""
    losses = {"acorn": [], "nanogpt": []}
    for seed in range(1337, 1343):
        rows, _ = acorn.pretrain("shakespeare-char-cpu", f"--seed {seed}")
        losses["acorn"].append(min(row["eval_loss"] for row in rows))
        if nanogpt is not None:
            nanogpt.train(WHOLE, seed)
            losses["nanogpt"].append(nanogpt.validation_loss())
    figures = {f"{side}_losses": [round(loss, 4) for loss in found] for side, found in losses.items() if found}
    for side, found in losses.items():
        if found:
            figures |= {f"{side}_mean": statistics.mean(found), f"{side}_deviation": statistics.stdev(found)}
    return figures


def measure_cpu_fast(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """Whole processes to a good loss, nanoGPT's 2,000 iterations beside ours."""
    losses = []

    def ours() -> float:
        rows, seconds = acorn.pretrain("shakespeare-char-cpu-fast")
        losses.append(min(row["eval_loss"] for row in rows))
        return seconds

    contenders = [ours]
    if nanogpt is not None:
        contenders.append(lambda: nanogpt.train(WHOLE)[1])
    seconds, *theirs = alternate(rounds, *contenders)
    figures = {"acorn_loss": losses[0], "acorn_seconds": statistics.median(seconds)}
    if theirs:
        ratios = [a / b for a, b in zip(seconds, theirs[0], strict=True)]
        figures |= {"nanogpt_loss": nanogpt.validation_loss(), "nanogpt_seconds": statistics.median(theirs[0])}
        figures |= {"time_ratio": statistics.median(ratios)}
    return figures


def measure_fast_speed(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """The 10.7 M model: training tokens/s at 16 x 256 in alternation."""
    return speeds(acorn, nanogpt, rounds, "shakespeare-char-fast", 24, BIG, 16 * 256)


def measure_fast(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """Our whole run of the 10.7 M recipe, once: nanoGPT's takes hours here."""
    rows, seconds = acorn.pretrain("shakespeare-char-fast")
    best = min(rows, key=lambda row: row["eval_loss"])
    return {"acorn_loss": best["eval_loss"], "acorn_tokens": best["tokens"], "acorn_seconds": seconds}


PARTS = {
    "cpu": measure_cpu,
    "cpu-seeds": measure_cpu_seeds,
    "cpu-fast": measure_cpu_fast,
    "fast-speed": measure_fast_speed,
    "fast": measure_fast,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workspace, text = Path(temporary), flags.text.absolute()
        nanogpt = NanoGPT(flags.nanogpt, text, workspace) if flags.nanogpt else None
        acorn = Acorn(text, workspace)
        results = {part: PARTS[part](acorn, nanogpt, flags.rounds) for part in flags.only}
    print(json.dumps({"benchmark": "shakespeare", "threads": torch.get_num_threads(), **results}))


if __name__ == "__main__":
    main()
