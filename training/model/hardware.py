"""What a device can do and what a model asks of it: peak FLOP/s, bytes, FLOPs a token."""

import re
import sys
from typing import NamedTuple

import torch

from modeling import GPTConfig


class GPU(NamedTuple):
    """Peaks of dense matmuls in FLOP/s, and bytes of memory, from the makers' data sheets."""

    half: float  # inputs of 16 bits, summed in float32
    single: float  # float32 inputs: by the TF32 cores of those that have them, which is since they have bf16
    memory: float
    has_bf16: bool = True

    def peak(self, precision: str, tf32: bool = True) -> float | None:
        """The peak in fp32, bf16 or fp16; None where the device has no units for it, or only others were recorded."""
        if precision == "fp32":
            return self.single if tf32 or not self.has_bf16 else None
        return self.half if precision == "fp16" or (precision == "bf16" and self.has_bf16) else None


GPUS = {
    "v100-16gb": GPU(125e12, 15.7e12, 16e9, has_bf16=False),
    "v100-32gb": GPU(125e12, 15.7e12, 32e9, has_bf16=False),
    "v100-pcie-32gb": GPU(112e12, 14e12, 32e9, has_bf16=False),
    "t4": GPU(65e12, 8.1e12, 16e9, has_bf16=False),
    "a10": GPU(125e12, 62.5e12, 24e9),
    "a10g": GPU(70e12, 35e12, 24e9),
    "l4": GPU(121e12, 60.5e12, 24e9),
    "l40s": GPU(362e12, 181e12, 48e9),
    "rtx-3090": GPU(71e12, 35.5e12, 24e9),
    "rtx-4090": GPU(165e12, 82.6e12, 24e9),
    "rtx-5090": GPU(209.5e12, 104.8e12, 32e9),
    "a100-40gb": GPU(312e12, 156e12, 40e9),
    "a100-80gb": GPU(312e12, 156e12, 80e9),
    "h100": GPU(989e12, 494.5e12, 80e9),
    "h100-pcie": GPU(756e12, 378e12, 80e9),
    "h100-nvl": GPU(835e12, 417.5e12, 94e9),
    "h200": GPU(989e12, 494.5e12, 141e9),
    "h200-nvl": GPU(835e12, 417.5e12, 141e9),
    "b200": GPU(2250e12, 1125e12, 180e9),
}
# Words in a device's name that make it another than the one of the table: a part of it, or one with other clocks.
OTHERS = {"mig", "laptop", "d", "ti"}
ACCELERATE_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # Accelerate's names for what it trains in


def best_device() -> torch.device:
    """The accelerator, where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def known_gpu(name: str) -> GPU | None:
    """The table's entry for a device by the name that its driver gives it, such as "NVIDIA A100-SXM4-40GB".

    Whole words are compared (an L40S is no L4), and the entry with the most of them is taken.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    found = {key: set(re.sub(r"-\d+gb$", "", key).split("-")) for key in GPUS}
    matching = [key for key, needed in found.items() if needed <= words and not words & OTHERS]
    return GPUS[max(matching, key=lambda key: len(found[key]))] if matching else None


def device_peak_flops(device: torch.device, precision: str, tf32: bool = True) -> float | None:
    """Peak FLOP/s of the device in fp32, bf16 or fp16; None where it is not known (CPUs, unlisted GPUs)."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak(precision, tf32) if gpu else None


def flops_per_token(config: GPTConfig, context_length: int | None = None) -> float:
    """FLOPs of one forward and backward pass a token: 6 a matrix parameter, and 12 a head element and key seen.

    Counts as PaLM does (arXiv 2204.02311, appendix B), the whole attention square included, with sliding windows and
    shared keys taken into account; embeddings look up and do not multiply.
    """
    context = context_length or config.max_position_embeddings
    attended = {
        "full_attention": context,
        "sliding_attention": min(config.sliding_window or context, context),
    }
    heads_size = config.num_attention_heads * config.head_dim
    scores = sum(12 * heads_size * attended[layer_type] for layer_type in config.layer_types)
    return 6 * matrix_parameters(config) + scores


def matrix_parameters(config: GPTConfig) -> int:
    """Weights that multiply every token: the blocks' projections and the head."""
    heads_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    reusing = sum(mode == "reuse" for mode in config.kv_sharing_modes or [])
    attention = config.num_hidden_layers * 2 * config.hidden_size * heads_size
    keys_and_values = (config.num_hidden_layers - reusing) * 2 * config.hidden_size * kv_size
    mlp = config.num_hidden_layers * (3 if config.gated_mlp else 2) * config.hidden_size * config.intermediate_size
    return attention + keys_and_values + mlp + config.vocab_size * config.hidden_size


# What configurations call the context length, the commonest first.
CONTEXT_NAMES = (
    "max_position_embeddings n_positions n_ctx max_seq_len seq_length seq_len max_seq_length max_sequence_length "
    "context_length max_context_length model_max_length block_size"
).split()


def context_of(config, unsaid: int | None = 2048) -> int | None:
    """How many tokens a model was made to read; `unsaid` where its configuration does not say.

    config: a configuration, or what its config.json holds. A model of more than text keeps that of its text apart.
    """
    if isinstance(config, dict):
        text = config.get("text_config") or config
        lengths = (text.get(name) for name in CONTEXT_NAMES)
    else:
        lengths = (getattr(text_config(config), name, None) for name in CONTEXT_NAMES)
    return next((length for length in lengths if isinstance(length, int) and length > 0), unsaid)


def text_config(config):
    """The part of a configuration that is about text: all of it, for most models."""
    return config.get_text_config(decoder=True)


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU, or else of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # the one system that counts in bytes
