"""Does one dial do for all sizes? Prints one JSON line.

    python benchmarks/depth_dial.py transfer --widths 64 128 256 [--factors 0.25 0.5 1 2 4] [--picture FILE.png]
    python benchmarks/depth_dial.py predict --depths 1 2 3 4 [--ratio 1] [--picture FILE.png]

`transfer` trains each width at the learning rates of its depth times each factor, the same steps for all, on the bytes
of Python's standard library: how much worse than a width's own best is the factor that is best at the smallest width?
`predict` trains each depth on --ratio tokens a parameter: how far from the loss of the last depth is what
`acorn estimate --from_runs` makes of the others? The runs lie in --workspace, and those that are finished there are
read, not run again: sizes can be added one by one. Losses are means over the seeds, over the whole validation split.
"""

import argparse
import json
import statistics
from pathlib import Path

from training.config.command_line import load_recipe
from training.config.depth import WIDTH
from training.grown import grown
from training.scaling import EXPONENTS, draw_law, fit, misfit, predict, read_point
from training.share.metrics_file import read_metrics
from training.system.files import write_picture

RECIPE = "stdlib-depth --dataset python-stdlib --tokenizer byte --block_size 64 --max_new_tokens 0".split()

ONCE = str(10**9)  # beyond the end: then there is one evaluation, the last


def final_loss(workspace: Path, name: str, *flags: str) -> float:
    """The validation loss at the end of a run of this name."""
    argv = [*RECIPE, "--data_dir", str(workspace / "bytes"), "--save_total_limit", "1", "--eval_steps", ONCE, *flags]
    return read_metrics(grown(workspace / name, lambda: load_recipe("pretrain", argv)))[-1]["eval_loss"]


def transfer(flags: argparse.Namespace) -> dict:
    """The loss at each width and factor, and what the smallest width's best factor costs the others."""
    losses = {width: [loss_at(flags, width, factor) for factor in flags.factors] for width in flags.widths}
    place = losses[flags.widths[0]].index(min(losses[flags.widths[0]]))
    if flags.picture:
        draw_transfer(flags.factors, losses, place, flags.picture)
    return {
        "factors": flags.factors,
        "loss": losses,
        "factor_of_the_smallest": flags.factors[place],
        "worse_than_the_best": {width: round(row[place] - min(row), 4) for width, row in losses.items()},
        "dial_worse_than_the_best": {
            width: round(row[flags.factors.index(1.0)] - min(row), 4)
            for width, row in losses.items()
            if 1.0 in flags.factors
        },
    }


def loss_at(flags: argparse.Namespace, width: int, factor: float) -> float:
    """The mean loss over the seeds, at the rates of this width's depth times `factor`."""
    size = ["--depth", str(width // WIDTH), "--max_steps", str(flags.steps), "--tokens_per_step", str(flags.tokens)]
    said = load_recipe("pretrain", [*RECIPE, *size]).training
    rates = [(f"--{key}", f"{factor * said[key]:.6g}") for key in ("learning_rate", "muon_learning_rate")]
    words = [*size, *(word for pair in rates for word in pair)]
    name = f"w{width}-x{factor:g}-{flags.steps}x{flags.tokens}"
    return statistics.mean(
        final_loss(flags.workspace, f"{name}-s{seed}", *words, "--seed", str(seed)) for seed in flags.seeds
    )


def predict_last(flags: argparse.Namespace) -> dict:
    """What the runs of all depths but the last say of the last one's loss, and what that is."""
    names = {depth: [f"d{depth}-r{flags.ratio:g}-s{seed}" for seed in flags.seeds] for depth in flags.depths}
    for depth in flags.depths:
        for name, seed in zip(names[depth], flags.seeds, strict=True):
            size = ["--depth", str(depth), "--tokens_per_parameter", str(flags.ratio)]
            final_loss(flags.workspace, name, *size, "--seed", str(seed))
    points = {depth: [read_point(flags.workspace / name) for name in names[depth]] for depth in flags.depths}
    *smaller, last = flags.depths
    known = [point for depth in smaller for point in points[depth]]
    truth, compute = statistics.mean(point.loss for point in points[last]), points[last][0].compute
    loss, low, high = predict(known, compute)
    if flags.picture:
        draw_law(known, compute, flags.picture, truth)
    return {
        "losses": {depth: [round(point.loss, 4) for point in points[depth]] for depth in flags.depths},
        "compute": {depth: points[depth][0].compute for depth in flags.depths},
        "predicted": round(loss, 4),
        "between": [round(low, 4), round(high, 4)],
        "by_exponent": {exponent: round(float(fit(known, exponent).loss(compute)), 4) for exponent in EXPONENTS},
        "runs_within": round(misfit(known), 4),
        "measured": round(truth, 4),
        "error": round(loss - truth, 4),
    }


def draw_transfer(factors: list[float], losses: dict[int, list[float]], place: int, path: Path) -> None:
    """Loss against the factor of the learning rates, a line a width."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 5), layout="constrained")).subplots()
    for width, row in losses.items():
        axes.plot(factors, row, marker="o", label=f"{width} wide, {width // WIDTH} layers")
    axes.axvline(factors[place], color="grey", linewidth=0.5)
    axes.set(xscale="log", xlabel="learning rates, times those of the dial", ylabel="validation loss (nats a byte)")
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.minorticks_off()
    axes.legend()
    write_picture(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0, 4.0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--ratio", type=float, default=1.0, help="tokens a parameter")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workspace", type=Path, default=Path("runs/depth-dial"))
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    flags = parser.parse_args()
    print(json.dumps(PARTS[flags.part](flags)))


PARTS = {"transfer": transfer, "predict": predict_last}

if __name__ == "__main__":
    main()
