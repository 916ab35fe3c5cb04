"""`acorn estimate RECIPE [--gpu NAME] [--num_gpus N] [--sharding HOW] [--mfu SHARE]`: what a recipe will cost."""

import math
from pathlib import Path

from .config.command_line import recipe_of, recipe_parser
from .config.depth import block_parameters
from .config.recipe import Recipe
from .costs import SHARDED, Estimate, estimate_recipe
from .data.corpus import find_manifest
from .data.streaming import held_out_characters, is_streamed
from .model.devices import GPUS, fit_precision
from .scaling import Point, draw_law, misfit, predict, read_points, refuse_other_text
from .system.errors import UserError, run_main, unknown
from .system.files import check_output

EXAMPLES = (
    "  acorn estimate gpt2-openwebtext --gpu a100-40gb --num_gpus 8\n"
    "  acorn estimate stdlib-depth --depth 4 --from_runs runs/d1 runs/d2 runs/d3 --picture fit.png"
)


def main(argv: list[str] | None = None) -> None:
    """Print the parameters, FLOPs, memory and time of a recipe, before it costs anything."""
    parser = recipe_parser("estimate", main.__doc__, EXAMPLES)
    parser.add_argument("--gpu", default="a100-40gb", help=f"GPU: {', '.join(GPUS)}")
    parser.add_argument("--num_gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--mfu", type=float, default=0.3, help="model FLOPs utilization")
    parser.add_argument("--sharding", default="none", help=f"{', '.join(SHARDED)}")
    parser.add_argument("--from_runs", nargs="+", help="finished runs of smaller sizes, to predict the loss from")
    parser.add_argument("--picture", type=Path, help="PNG of that prediction's fit")
    flags = parser.parse_args(argv)
    if flags.picture:
        check_output("--picture", flags.picture, (".png",))
    if flags.picture and not flags.from_runs:
        raise UserError(f"--picture {flags.picture}: draws a fit to --from_runs; name some, or leave it out")
    if flags.gpu not in GPUS:
        raise unknown("gpu", flags.gpu, GPUS)
    if flags.sharding not in SHARDED:
        raise unknown("sharding", flags.sharding, SHARDED)
    recipe = recipe_of(flags, "estimate")
    points = read_points(flags.from_runs or [])
    if points:
        refuse_other_text(recipe, flags.from_runs)
    if recipe.dial is not None:
        recipe.dial.turn(training_tokens(recipe, points))
    fit_precision(recipe.training, GPUS[flags.gpu].has_bf16)
    estimate = estimate_recipe(recipe, flags.num_gpus, flags.sharding)
    print(report(recipe, estimate, flags.gpu, flags.num_gpus, flags.mfu))
    if recipe.dial is not None:
        print(f"  {recipe.dial.words}")
    if flags.from_runs:
        print(prediction(recipe, estimate, points, flags.picture))


def report(recipe: Recipe, estimate: Estimate, gpu: str, num_gpus: int, mfu: float) -> str:
    """The figures as aligned lines."""
    is_half, capacity = recipe.training["precision"] != "fp32", GPUS[gpu].memory
    peak = GPUS[gpu].half if is_half else GPUS[gpu].single
    total = estimate.peak()
    batch = "per_device_train_batch_size" if total == sum(estimate.memory.values()) else "per_device_eval_batch_size"
    mend = f"lower {batch}, or share out the model (--sharding full, training/launch/fsdp.yaml)"
    fit = "fits" if total < 0.92 * capacity else "DOES NOT FIT"
    tokens = estimate.steps * estimate.tokens_per_step
    seconds = estimate.seconds(peak, mfu, num_gpus)
    lines = {
        "parameters": f"{estimate.parameters:,}",
        "FLOPs a token": f"{estimate.flops_per_token:,.0f} (forward and backward)",
        "tokens a step": f"{estimate.tokens_per_step:,} on {num_gpus} device(s), "
        f"{estimate.accumulation} micro-batches each",
        "tokens in all": f"{tokens:,} in {estimate.steps:,} steps",
        **{f"memory, {name}": f"{size / 1e9:.2f} GB" for name, size in estimate.memory.items()},
        "memory, evaluation": f"{estimate.evaluation / 1e9:.2f} GB, when there are no gradients and activations",
        "memory in all": f"{total / 1e9:.2f} GB a device: {fit} {gpu} ({capacity / 1e9:.0f} GB)",
        **({} if fit == "fits" else {"what to do": mend}),
        "tokens a second": f"{tokens / seconds:,.0f} on {num_gpus} × {gpu} at {mfu:.0%} MFU (assumed) "
        f"of {peak / 1e12:,.4g} TFLOP/s in {'half precision' if is_half else 'fp32'}",
        "time": duration(seconds),
        **evaluation_line(recipe, estimate),
    }
    return "\n".join([recipe.name, *(f"  {name:<20} {value}" for name, value in lines.items())])


def evaluation_line(recipe: Recipe, estimate: Estimate) -> dict[str, str]:
    """The share of the work that evaluations are, beside the time of training; empty where nobody knows what they read.

    A stream holds out characters, which are as many tokens at most, as a rule.
    """
    data = recipe.data_arguments()
    if is_streamed(data):
        tokens, what, condition = held_out_characters(data), "characters", ", were each a token"
    else:
        tokens, what, condition = prepared_tokens(data.data_dir, "validation"), "tokens", ""
    if tokens is None or estimate.evaluations is None:
        return {}
    share = f"{estimate.evaluated_share(tokens):.1%} of the work{condition}"
    return {"evaluation": f"{estimate.evaluations} times {tokens:,} {what}: {share}"}


def training_tokens(recipe: Recipe, points: list[Point]) -> int | None:
    """Tokens of the prepared text of a recipe, or of the runs that it is compared with; None where nobody knows."""
    directories = [recipe.data.get("data_dir"), *(point.data_dir for point in points)]
    return next(filter(None, (prepared_tokens(directory, "train") for directory in directories)), None)


def prepared_tokens(directory: str | None, split: str) -> int | None:
    """Tokens of a split that lies prepared in a directory; None where none does."""
    manifest = find_manifest(directory)
    return manifest["splits"][split]["tokens"] if manifest else None


def prediction(recipe: Recipe, estimate: Estimate, points: list[Point], picture: Path | None) -> str:
    """The loss that a recipe will end with, as runs of smaller sizes foretell it."""
    tokens = estimate.steps * estimate.tokens_per_step
    target = Point(recipe.name, block_parameters(recipe.model_config()), tokens, math.nan)
    loss, low, high = predict(points, target.compute)
    reach = target.compute / max(point.compute for point in points)
    lines = {
        "loss at the end": f"{loss:.3f} ({low:.3f} to {high:.3f} with other exponents), by a power law in compute",
        "from": f"{len(points)} runs that lie within {misfit(points):.3f} of the law; "
        f"{reach:,.3g} times the compute of the largest",
    }
    if picture:
        draw_law(points, target.compute, picture)
        lines["picture"] = str(picture)
    return "\n".join(f"  {name:<20} {value}" for name, value in lines.items())


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


if __name__ == "__main__":
    run_main(main)
