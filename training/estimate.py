"""`acorn estimate RECIPE [--gpu NAME] [--num_gpus N] [--sharding HOW] [--mfu SHARE]`: what a recipe will cost."""

from .config.command_line import recipe_of, recipe_parser
from .config.recipe import Recipe
from .costs import SHARDED, Estimate, estimate_recipe
from .model.devices import GPUS, fit_precision
from .system.errors import run_main, unknown

EXAMPLES = "  acorn estimate gpt2-openwebtext --gpu a100-40gb --num_gpus 8"


def main(argv: list[str] | None = None) -> None:
    """Print the parameters, FLOPs, memory and time of a recipe, before it costs anything."""
    parser = recipe_parser("estimate", main.__doc__, EXAMPLES)
    parser.add_argument("--gpu", default="a100-40gb", help=f"GPU: {', '.join(GPUS)}")
    parser.add_argument("--num_gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--mfu", type=float, default=0.3, help="model FLOPs utilization")
    parser.add_argument("--sharding", default="none", help=f"{', '.join(SHARDED)}")
    flags = parser.parse_args(argv)
    if flags.gpu not in GPUS:
        raise unknown("gpu", flags.gpu, GPUS)
    if flags.sharding not in SHARDED:
        raise unknown("sharding", flags.sharding, SHARDED)
    recipe = recipe_of(flags, "estimate")
    fit_precision(recipe.training, GPUS[flags.gpu].has_bf16)
    estimate = estimate_recipe(recipe, flags.num_gpus, flags.sharding)
    print(report(recipe, estimate, flags.gpu, flags.num_gpus, flags.mfu))


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
    }
    return "\n".join([recipe.name, *(f"  {name:<20} {value}" for name, value in lines.items())])


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


if __name__ == "__main__":
    run_main(main)
