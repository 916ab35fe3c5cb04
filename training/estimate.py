"""`acorn estimate RECIPE [--gpu NAME] [--num_gpus N] [--sharding HOW] [--mfu SHARE]`: what a recipe will cost."""

import sys
from collections import Counter
from dataclasses import dataclass

import torch

from modeling import GPTConfig, GPTForCausalLM

from .errors import FlagParser, UserError, run_main, unknown
from .hardware import GPUS, flops_per_token, matrix_parameters
from .help import wants_help
from .recipe import Recipe, load_recipe

# What each way of sharding spreads over the devices.
SHARDED = {"none": (), "zero2": ("gradients", "optimizer"), "full": ("weights", "gradients", "optimizer")}
VOCABULARIES = {"byte": 257, "char": 66}  # a character vocabulary is known only after the text is read


@dataclass
class Estimate:
    """Figures of one recipe; bytes are those of one device, seconds those of the whole run."""

    parameters: int
    flops_per_token: float
    tokens_per_step: int
    accumulation: int
    steps: int
    memory: dict[str, float]

    def seconds(self, peak_flops: float, mfu: float, num_gpus: int) -> float:
        return self.steps * self.tokens_per_step * self.flops_per_token / (peak_flops * mfu * num_gpus)


def main(argv: list[str] | None = None) -> None:
    """Print parameters, FLOPs, memory and time of a recipe."""
    if wants_help("estimate", argv):
        return
    parser = FlagParser(prog="acorn estimate", add_help=False)
    parser.add_argument("--gpu", default="a100-40gb")
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--mfu", type=float, default=0.3)
    parser.add_argument("--sharding", default="none")
    flags, others = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if flags.gpu not in GPUS:
        raise unknown("gpu", flags.gpu, GPUS)
    if flags.sharding not in SHARDED:
        raise unknown("sharding", flags.sharding, SHARDED)
    if flags.num_gpus < 1 or not 0 < flags.mfu <= 1:
        raise UserError(f"--num_gpus={flags.num_gpus} --mfu={flags.mfu}: at least 1, and in (0, 1]")
    recipe = load_recipe("estimate", others)
    estimate = estimate_recipe(recipe, flags.num_gpus, flags.sharding)
    print(report(recipe, estimate, flags.gpu, flags.num_gpus, flags.mfu))


def estimate_recipe(recipe: Recipe, num_gpus: int = 1, sharding: str = "none") -> Estimate:
    """The figures of a recipe whose steps are spread over `num_gpus` devices; builds the model on the meta device.

    sharding: none (each device holds everything), zero2 (gradients and optimizer state are shared out) or full.
    """
    data, args = recipe.data_arguments(), recipe.training_arguments()
    vocab_size = data.tokenizer_vocab_size or VOCABULARIES.get(data.tokenizer)
    config = recipe.model_config(**({"vocab_size": vocab_size} if vocab_size else {}))
    with torch.device("meta"):
        model = GPTForCausalLM(config)
    if args.max_steps < 1:
        raise UserError(f"max_steps={args.max_steps}: the number of steps depends on the text; give --max_steps")
    rows = args.share_out(config.max_position_embeddings, num_gpus)
    figures = memory(model, args, args.per_device_train_batch_size * config.max_position_embeddings)
    return Estimate(
        parameters=model.num_parameters(),
        flops_per_token=flops_per_token(config),
        tokens_per_step=rows * config.max_position_embeddings,
        accumulation=args.gradient_accumulation_steps,
        steps=args.max_steps,
        memory={name: size / (num_gpus if name in SHARDED[sharding] else 1) for name, size in figures.items()},
    )


def memory(model: GPTForCausalLM, args, micro_batch: int) -> dict[str, float]:
    """Bytes a device: float32 weights, gradients and optimizer state, and the activations of one micro-batch.

    Half precision keeps a copy of the matrices while a micro-batch is worked on; Muon's step holds its updates in
    float32, and of the largest stack of equal shapes a few bfloat16 copies, when the activations are gone.
    """
    parameters = model.num_parameters()
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    hidden = sum(p.numel() for p in matrices) if args.optimizer == "muon" else 0
    is_half = args.bf16 or args.fp16
    stacks = Counter()
    for p in matrices if hidden else []:
        stacks[tuple(sorted(p.shape))] += p.numel()
    step = 4 * hidden + 10 * max(stacks.values(), default=0)
    activations = micro_batch * activation_bytes(model.config, 2 if is_half else 4, args.gradient_checkpointing)
    copies = 2 * matrix_parameters(model.config) if is_half else 0
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 4 * hidden + 8 * (parameters - hidden),
        "activations": max(activations + copies, step),
    }


def activation_bytes(config: GPTConfig, itemsize: int, is_checkpointed: bool = False) -> float:
    """Bytes a token that the forward pass keeps for the backward one, with fused attention.

    A block keeps its two float32 residuals, two normed inputs, queries, keys, values and attended values, and the
    MLP's hidden layer before and after the activation; the loss keeps logits and their gradient.
    """
    heads_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    mlp = (3 if config.gated_mlp else 2) * config.intermediate_size
    block = 8 * config.hidden_size + itemsize * (2 * config.hidden_size + 2 * heads_size + 2 * kv_size + mlp)
    kept = 4 * config.hidden_size if is_checkpointed else block
    blocks = kept * config.num_hidden_layers + (block if is_checkpointed else 0)
    return blocks + 2 * itemsize * config.vocab_size


def report(recipe: Recipe, estimate: Estimate, gpu: str, num_gpus: int, mfu: float) -> str:
    """The figures as aligned lines."""
    peak, capacity = GPUS[gpu]
    total = sum(estimate.memory.values())
    mend = "lower per_device_train_batch_size, or share out the model (--sharding full, training/launch/fsdp.yaml)"
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
        "memory in all": f"{total / 1e9:.2f} GB a device: {fit} {gpu} ({capacity / 1e9:.0f} GB)",
        **({} if fit == "fits" else {"what to do": mend}),
        "tokens a second": f"{tokens / seconds:,.0f} on {num_gpus} × {gpu} at {mfu:.0%} MFU (assumed)",
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
