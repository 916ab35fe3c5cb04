"""What cannot fit into this machine is refused before anything is read or written, with what it would take."""

import psutil
import torch

from modeling import GPTForCausalLM

from .config.choices import check_attention
from .config.recipe import Recipe
from .costs import config_of, memory
from .system.distributed import shares_weights_out
from .system.errors import UserError, one_line

CGROUP = "/sys/fs/cgroup/memory.max"  # of a container: bytes, or "max"
SPARE = 1.2  # the estimate is within a few per cent; only what is far beyond is refused


def refuse_too_large(recipe: Recipe, args) -> None:
    """Refuse a model, a context or a micro-batch that this machine's memory cannot hold, and attention it has not.

    The model is built on the meta device, which takes no memory. Of several processes that share the model out each
    holds its part.
    """
    config = config_of(recipe)
    check_attention(recipe.model.get("attn_implementation"), args.device.type)
    try:
        with torch.device("meta"):
            model = GPTForCausalLM(config)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"attn_implementation={recipe.model.get('attn_implementation')!r}: {one_line(error)}"
        ) from error
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{_named(args, config)}: too large for any memory ({one_line(error)})") from error
    rows = 1 if args.auto_find_batch_size else args.per_device_train_batch_size
    figures = memory(model, args, rows * config.max_position_embeddings)
    needed = sum(figures.values()) / (args.world_size if shares_weights_out(args) else 1)
    has = memory_of(args.device)
    if needed > SPARE * has:
        parts = ", ".join(f"{name} {_size(size)}" for name, size in figures.items())
        raise UserError(
            f"{_named(args, config)}: needs {_size(needed)} (acorn estimate: {parts}) and {_size(has)} is available; "
            "lower one of them"
        )


def refuse_large_batch(args, context_length: int, vocab_size: int) -> None:
    """Refuse a micro-batch whose logits alone are larger than this machine's memory, whatever the model."""
    rows = 1 if args.auto_find_batch_size else args.per_device_train_batch_size
    needed, has = 2 * rows * context_length * vocab_size, memory_of(args.device)
    if needed > has:
        what = f"per_device_train_batch_size={rows}, block_size={context_length}"
        raise UserError(
            f"{what}: the logits alone need {_size(needed)} and {_size(has)} is available; lower one of them"
        )


def memory_of(device: torch.device) -> int:
    """Bytes that the device has: a GPU's own, or this machine's, or this container's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total
    try:
        with open(CGROUP, encoding="ascii") as file:
            return min(total, int(file.read()))
    except (OSError, ValueError):  # no container, or no limit
        return total


def _named(args, config) -> str:
    shape = f"n_layer={config.num_hidden_layers}, n_embd={config.hidden_size}, vocab_size={config.vocab_size}"
    batch = f"per_device_train_batch_size={args.per_device_train_batch_size}"
    return f"{batch}, block_size={config.max_position_embeddings}, {shape}"


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
