"""What a recipe costs, before it runs: parameters, FLOPs, steps and memory; what no memory holds is refused."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from modeling import GPTConfig, GPTForCausalLM
from modeling.linear_attention import CHUNK
from modeling.loss import CHUNK_ELEMENTS

from .config.checks import check_attention
from .config.recipe import Recipe
from .data.corpus import find_manifest
from .data.tokenizers import DEFAULT_BPE_VOCAB_SIZE, load_tokenizer
from .loop.evaluation import chunk_elements
from .model.sizes import attention_numbers, flops_per_token, matrix_parameters
from .system.distributed import shares_weights_out
from .system.errors import UserError, one_line

# What each way of sharding spreads over the devices.
SHARDED = {"none": (), "zero2": ("gradients", "optimizer"), "full": ("weights", "gradients", "optimizer")}
# Those of characters, and of a small text's BPE, are known only after the text is read.
VOCABULARIES = {"byte": 257, "char": 66, "bpe": DEFAULT_BPE_VOCAB_SIZE}
CGROUP = "/sys/fs/cgroup/memory.max"  # of a container: bytes, or "max"
SPARE = 1.2  # the estimate is within a few per cent; only what is far beyond is refused


@dataclass
class Estimate:
    """Figures of one recipe; bytes are those of one device, seconds those of the whole run."""

    parameters: int
    flops_per_token: float
    tokens_per_step: int
    accumulation: int
    steps: int
    memory: dict[str, float]
    evaluation: float  # beside weights and optimizer state, when there are no gradients
    evaluations: int | None  # None where it depends on the text

    def peak(self) -> float:
        """Most bytes that a device holds, in training or in evaluation."""
        evaluating = self.memory["weights"] + self.memory["optimizer"] + self.evaluation
        return max(sum(self.memory.values()), evaluating)

    def seconds(self, peak_flops: float, mfu: float, num_gpus: int) -> float:
        return self.steps * self.tokens_per_step * self.flops_per_token / (peak_flops * mfu * num_gpus)

    def evaluated_share(self, tokens: int) -> float:
        """The share of the run's FLOPs that evaluations of so many tokens take, a forward being a third of a step."""
        evaluated = self.evaluations * tokens / 3
        return evaluated / (evaluated + self.steps * self.tokens_per_step)


def estimate_recipe(recipe: Recipe, num_gpus: int = 1, sharding: str = "none", device: str = "cuda") -> Estimate:
    """The figures of a recipe whose steps are spread over `num_gpus` devices; builds the model on the meta device.

    sharding: none (each device holds everything), zero2 (gradients and optimizer state are shared out) or full.
    """
    args, config = recipe.training_arguments(), config_of(recipe)
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
        evaluation=evaluation_bytes(config, args, torch.device(device)),
        evaluations=number_of_evaluations(args),
    )


def number_of_evaluations(args) -> int | None:
    """How often a run of `max_steps` is evaluated, at its end too; None where that depends on the text."""
    if args.eval_strategy != "steps":
        return 1 if args.eval_strategy == "no" else None
    every = math.ceil(args.max_steps * args.eval_steps) if args.eval_steps < 1 else args.eval_steps
    return math.ceil(args.max_steps / every) + args.eval_on_start


def config_of(recipe: Recipe) -> GPTConfig:
    """The model's shape, with the vocabulary that the recipe's tokenizer will have."""
    vocab_size = vocabulary_of(recipe.data_arguments())
    vocab_size = max(vocab_size, recipe.model.get("vocab_size", 0)) if vocab_size else None  # as the run takes it
    return recipe.model_config(**({"vocab_size": vocab_size} if vocab_size else {}))


def vocabulary_of(data) -> int | None:
    """Entries that a tokenizer has or, before it is built, will have; None of one that would have to be downloaded."""
    if manifest := find_manifest(data.data_dir):
        return manifest.get("vocab_size")
    if data.tokenizer not in VOCABULARIES and Path(data.tokenizer).is_dir():
        return len(load_tokenizer(data.tokenizer))
    return data.tokenizer_vocab_size or VOCABULARIES.get(data.tokenizer)


def memory(model: GPTForCausalLM, args, micro_batch: int) -> dict[str, float]:
    """Bytes a device: float32 weights, gradients and optimizer state, and what a step needs beside them at its peak.

    Half precision keeps a copy of the matrices while a micro-batch is worked on; Muon's step holds its updates in
    float32, and of the largest stack of equal shapes a few copies in the run's precision, when the activations are
    gone. Without accumulation the gradients come while the activations go.
    """
    parameters = model.num_parameters()
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    hidden = sum(p.numel() for p in matrices) if args.optimizer != "adamw" else 0
    is_half = args.bf16 or args.fp16
    stacks = Counter()
    for p in matrices if hidden else []:
        stacks[tuple(sorted(p.shape))] += p.numel()
    step = 4 * hidden + (10 if is_half else 20) * max(stacks.values(), default=0)
    copies = 2 * matrix_parameters(model.config) if is_half else 0
    worked_on = copies + micro_batch * activation_bytes(model.config, is_half, args.gradient_checkpointing)
    heads = 1 + model.config.num_nextn_predict_layers
    worked_on += heads * loss_bytes(micro_batch * model.config.vocab_size, 2 if is_half else 4)
    gradients = 4 * parameters
    copies = 1 if args.average_decay is None else 3  # the average, and the weights themselves while it is evaluated
    return {
        "weights": 4 * parameters * copies,
        "gradients": gradients,
        "optimizer": 4 * hidden + 8 * (parameters - hidden),
        "activations": max(worked_on - (gradients if args.gradient_accumulation_steps == 1 else 0), step),
    }


def activation_bytes(config: GPTConfig, is_half: bool, is_checkpointed: bool = False) -> float:
    """Bytes a token that the blocks keep for the backward pass, with fused attention.

    A block keeps its two float32 residuals, the inputs of its matrices (in half precision one copy for each matrix),
    queries, keys, values, attended values, the MLP's hidden layer before and after the activation, and what the norms
    of queries and keys read.
    """
    itemsize = 2 if is_half else 4
    attended = attention_numbers(config)
    inputs = (4 + config.gated_mlp) if is_half else 2
    mlp = (3 if config.gated_mlp else 2) * config.intermediate_size
    block = 8 * config.hidden_size + itemsize * (inputs * config.hidden_size + attended + mlp)
    block += 2 * attended if config.qk_norm else 0
    kept = 4 * config.hidden_size if is_checkpointed else block
    linear = config.layer_types.count("linear_attention") * linear_bytes(config) / config.num_hidden_layers
    return (kept + (0 if is_checkpointed else linear)) * config.num_hidden_layers + (
        block + linear if is_checkpointed else 0
    )


def linear_bytes(config: GPTConfig) -> float:
    """Bytes a token that a linear layer keeps beside, in float32.

    That is queries, keys and values after each of some five steps, four weights for each token of its chunk, and its
    part of two states a chunk.
    """
    heads_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    states = 2 * kv_size * config.head_dim / CHUNK
    return 4 * (5 * (heads_size + 2 * kv_size) + 4 * CHUNK * config.num_attention_heads + states)


def evaluation_bytes(config: GPTConfig, args, device: torch.device) -> float:
    """Bytes of a batch of evaluation at its peak, with fused attention.

    That is in a block (the embeddings, three states of the residual stream and what was attended to, and the larger of
    attention and MLP), or in the head (the last states, and one chunk of logits with the float32 work on it).
    """
    is_half = args.bf16 or args.fp16
    itemsize, tokens = 2 if is_half else 4, args.per_device_eval_batch_size * config.max_position_embeddings
    attended = attention_numbers(config)
    residual = (16 + itemsize * (2 if is_half else 1)) * config.hidden_size
    attention = itemsize * attended + (2 * attended if config.qk_norm else 0)
    mlp = itemsize * (2 + config.gated_mlp + (config.hidden_act == "relu2")) * config.intermediate_size
    logits = min(tokens * config.vocab_size, chunk_elements(device)) * (10 if is_half else 8)
    worked_on = max(tokens * (residual + max(attention, mlp)), tokens * 4 * config.hidden_size + logits)
    return worked_on + (2 * matrix_parameters(config) if is_half else 0)


def loss_bytes(logits: int, itemsize: int) -> float:
    """Bytes of the loss at its peak: logits, their gradients, and the float32 work on one chunk of them.

    Where there are several chunks, their gradients are joined at the end, and are there twice for a moment.
    """
    if logits <= CHUNK_ELEMENTS:
        return logits * (itemsize + 12)
    return max(3 * itemsize * logits, 2 * itemsize * logits + 12 * CHUNK_ELEMENTS)


# ---- what cannot fit is refused before anything is read or written, with what it would take


def refuse_too_large(recipe: Recipe, args) -> None:
    """Refuse a model, a context or a micro-batch that this machine's memory cannot hold, and attention it has not.

    The model is built on the meta device, which takes no memory. Of several processes that share the model out each
    holds its part.
    """
    config, attention = config_of(recipe), recipe.model.get("attn_implementation")
    check_attention(attention, args.device.type)
    what = (
        f"per_device_train_batch_size={args.per_device_train_batch_size}, block_size={config.max_position_embeddings}, "
        f"n_layer={config.num_hidden_layers}, n_embd={config.hidden_size}, vocab_size={config.vocab_size}"
        + (f", bigram_vocab_size={config.bigram_vocab_size}" if config.bigram_vocab_size else "")
    )
    try:
        with torch.device("meta"):
            model = GPTForCausalLM(config)
    except (ValueError, ImportError) as error:
        raise UserError(f"attn_implementation={attention!r}: {one_line(error)}") from error
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{what}: too large for any memory ({one_line(error)})") from error
    figures = memory(model, args, least_rows(args) * config.max_position_embeddings)
    needed = sum(figures.values()) / (args.world_size if shares_weights_out(args) else 1)
    parts = ", ".join(f"{name} {in_gigabytes(size)}" for name, size in figures.items())
    refuse_beyond(args.device, needed / SPARE, f"{what}: needs {in_gigabytes(needed)} (acorn estimate: {parts})")


def refuse_large_batch(args, context_length: int, vocab_size: int) -> None:
    """Refuse a micro-batch whose logits alone are larger than this machine's memory, whatever the model."""
    needed = 2 * least_rows(args) * context_length * vocab_size
    what = f"per_device_train_batch_size={least_rows(args)}, block_size={context_length}"
    refuse_beyond(args.device, needed, f"{what}: the logits alone need {in_gigabytes(needed)}")


def refuse_beyond(device: torch.device, needed: float, what: str) -> None:
    if needed > (has := memory_of(device)):
        raise UserError(f"{what} and {in_gigabytes(has)} is available; lower one of them")


def least_rows(args) -> int:
    """Sequences in the smallest micro-batch that the run may come down to."""
    return 1 if args.auto_find_batch_size else args.per_device_train_batch_size


def memory_of(device: torch.device) -> int:
    """Bytes that the device has: a GPU's own, or this machine's, or this container's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total
    try:
        return min(total, int(Path(CGROUP).read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or no limit
        return total


def in_gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
