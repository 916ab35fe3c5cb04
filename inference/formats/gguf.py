"""GGUF, the file of llama.cpp and Ollama: which of llama.cpp's architectures computes what a model of ours does.

llama.cpp has one graph an architecture, named in the file; its names are facts of its src/models (tag of
llama-cpp-python 0.3.36). What is left out there is written as what changes nothing: a norm without gain as ones, a
missing bias as zeros. A norm of the embeddings is taken into their table, where nothing is added before it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from modeling import GPTConfig, GPTForCausalLM
from modeling.positions import default_frequencies
from training.system.errors import UserError
from training.system.files import replace_whole

from .base import Obstacle
from .gguf_vocabulary import add_vocabulary, note
from .gpt2 import OBSTACLES, position_table

# --outtype, with the names that llama.cpp's own converter has for them: what the file calls itself
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
Q8_BLOCK = 32  # so many numbers of a row share a scale
GELUS = ("gelu_new", "gelu")
ROPE_TYPES = ("default", "linear", "yarn")  # which every architecture takes from the file's metadata
ROPE_NUMBERS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor"}
ROPE_NUMBERS |= {"high_freq_factor"}  # not those of yarn that nobody changes, such as beta_fast

# ---- what stands in the way, by field


def takes(name: str, *values: object, why: str) -> dict[str, Obstacle]:
    """The obstacle of a field with any other value than these."""
    return {name: (lambda config: getattr(config, name) not in values, why)}


def needs_rope(*types: str, or_none: bool = False) -> dict[str, Obstacle]:
    """The obstacles of other positions than rotary ones of these types, the same in every layer, or none at all."""
    return {
        **takes("position_encoding", "rope", *["none"] * or_none, why="its positions are rotary"),
        "rope_parameters": (
            lambda c: rope_type(c) not in (None, *types) or not (c.rope_parameters or {}).keys() <= ROPE_NUMBERS,
            f"it knows {', '.join(types)}, the same in every layer, and only {', '.join(sorted(ROPE_NUMBERS))}",
        ),
        "head_dim": (lambda c: c.head_dim % 2 == 1, "it rotates pairs"),
    }


def rope_type(config: GPTConfig) -> str | None:
    """How the rotary frequencies are scaled; None for other positions."""
    return (config.rope_parameters or {}).get("rope_type")


NEVER_HELD = (
    "norm_order", "layer_types", "kv_sharing_modes", "kv_quantization", "kv_lora_rank", "memory_length", "lm_head_bias",
    "logit_softcap", "bigram_vocab_size", "value_embeddings",
)  # fmt: skip
NEVER = {name: OBSTACLES[name] for name in NEVER_HELD}
NEVER["embedding_norm"] = (
    lambda c: c.embedding_norm and c.position_encoding in ("learned", "sinusoidal"),
    "it does not norm the sum of embeddings and positions",
)
NO_QK_NORM, QK_NORM = {"qk_norm": OBSTACLES["qk_norm"]}, takes("qk_norm", True, why="it norms queries and keys")
LAYER_NORM, RMS_NORM = {"norm": OBSTACLES["norm"]}, takes("norm", "rms_norm", why="its norms are RMS norms")
NO_BIAS = takes("bias", False, why="its linear layers have no bias")
NO_WINDOW, WIDE_HEADS = ({name: OBSTACLES[name]} for name in ("sliding_window", "head_dim"))


def mlp(*activations: str, gated: bool = False) -> dict[str, Obstacle]:
    """The obstacles of another MLP than one with these activations."""
    return {
        **takes("hidden_act", *activations, why=f"its activation is {activations[0]}"),
        **takes("gated_mlp", gated, why="its MLP is gated" if gated else "its MLP has no gate"),
    }


# ---- llama.cpp's architectures


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs, by its name there, and what of ours it cannot hold.

    has_biases: every linear layer and norm needs one. pairs_are_neighbours: rotary pairs are rows (0, 1), (2, 3), …
    of a head, where ours are (i, i + head_dim / 2). is_fused: queries, keys and values are one matrix.
    has_own_head: the head is written even where it is the embedding. has_windows: each layer says whether it has one.
    has_table: positions are a table. constants: metadata that it needs beside ours.
    """

    name: str
    obstructing: dict[str, Obstacle]
    has_biases: bool = False
    pairs_are_neighbours: bool = False
    is_fused: bool = False
    has_own_head: bool = False
    has_windows: bool = False
    has_table: bool = False
    constants: dict[str, float] = field(default_factory=dict)

    def obstacles(self, config: GPTConfig) -> list[str]:
        """What of an architecture of ours it cannot hold: one `field=value (why)` each."""
        found = ((name, why) for name, (stands, why) in (NEVER | self.obstructing).items() if stands(config))
        return [f"{name}={getattr(config, name)!r} ({why})" for name, why in found]


# xIELU (arXiv 2411.13010) is ReLU² where its slopes after softplus are 1 and 0 and its linear part is 0.
RELU2_AS_XIELU = {"alpha_p": float(np.log(np.expm1(1.0))), "alpha_n": -1e3, "beta": 0.0, "eps": -1e-6}
ROPE, ANY_ROPE = needs_rope(*ROPE_TYPES), needs_rope(*ROPE_TYPES, "llama3", or_none=True)
ARCHITECTURES = [
    Architecture(
        "gpt2",
        {
            **takes("position_encoding", "learned", "sinusoidal", "none", why="its positions are a table"),
            **LAYER_NORM, **NO_QK_NORM, **NO_WINDOW, **WIDE_HEADS, **mlp(*GELUS),
        },
        has_biases=True, is_fused=True, has_table=True,
    ),
    Architecture(
        "llama",
        {**RMS_NORM, **mlp("silu", gated=True), **ANY_ROPE, **NO_QK_NORM, **NO_WINDOW},
        pairs_are_neighbours=True,
    ),
    Architecture("qwen3", {**RMS_NORM, **mlp("silu", gated=True), **ROPE, **QK_NORM, **NO_BIAS, **NO_WINDOW}),
    Architecture(
        "arcee",
        {**RMS_NORM, **mlp("relu2"), **ANY_ROPE, **NO_QK_NORM, **NO_BIAS, **NO_WINDOW},
        pairs_are_neighbours=True,
    ),
    Architecture(
        "apertus",
        {**RMS_NORM, **mlp("relu2"), **ANY_ROPE, **QK_NORM, **NO_BIAS, **NO_WINDOW},
        has_own_head=True, constants={f"xielu.{name}": value for name, value in RELU2_AS_XIELU.items()},
    ),
    Architecture(
        "starcoder2",
        {**LAYER_NORM, **mlp(*GELUS), **ROPE, **NO_QK_NORM, **NO_WINDOW, **WIDE_HEADS},
        has_biases=True,
    ),
    Architecture(
        "granite_swa",
        {**RMS_NORM, **mlp("silu", gated=True), **ANY_ROPE, **NO_QK_NORM},
        pairs_are_neighbours=True, has_windows=True, constants={"granite_swa.logit_scale": 1.0},
    ),
    Architecture("jais2", {**LAYER_NORM, **mlp("relu2"), **ROPE, **NO_QK_NORM, **NO_WINDOW}, has_biases=True),
]  # fmt: skip


def choose(name: str, config: GPTConfig) -> Architecture:
    """llama.cpp's architecture for a model; UserError that names what the nearest one cannot hold."""
    nearest = min(ARCHITECTURES, key=lambda architecture: len(architecture.obstacles(config)))
    if obstacles := nearest.obstacles(config):
        why = f"the nearest, {nearest.name}, cannot hold {'; '.join(obstacles)}"
        raise UserError(f"{name}: llama.cpp has no architecture for it: {why}")
    return nearest


# ---- its tensors

IN_LAYER = {  # ours: llama.cpp's
    "attn_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED = ("attn_q", "attn_k", "attn_v")
NO_SINK = -1e30  # its exponential is 0
STANDSTILL = 1e30  # a frequency divided by it turns nothing


@torch.no_grad()
def tensors(model: GPTForCausalLM, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each tensor in llama.cpp's terms, made one after the other: few are in memory twice."""
    config = model.config
    yield from outside(model, architecture)
    for layer, block in enumerate(model.model.layers):
        parts = {theirs: filled(module_of(block, ours), architecture) for ours, theirs in IN_LAYER.items()}
        if architecture.pairs_are_neighbours:
            for name in ("attn_q", "attn_k"):
                parts[name] = {kind: neighbouring(rows, config.head_dim) for kind, rows in parts[name].items()}
        if architecture.is_fused:
            fused = [parts.pop(name) for name in FUSED]
            parts["attn_qkv"] = {kind: torch.cat([part[kind] for part in fused]) for kind in fused[0]}
        if architecture.has_windows:
            parts["attn_sinks"] = {"weight": torch.full((config.num_attention_heads,), NO_SINK)}
        for name, part in parts.items():
            yield from ((f"blk.{layer}.{name}.{kind}", tensor) for kind, tensor in part.items())


def outside(model: GPTForCausalLM, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that belong to no layer."""
    config, transformer = model.config, model.model
    embedding = transformer.embed_tokens.weight
    yield "token_embd.weight", transformer.embed_norm(embedding)
    if architecture.has_table:
        yield "position_embd.weight", position_table(model)
    for kind, tensor in filled(transformer.final_norm, architecture).items():
        yield f"output_norm.{kind}", tensor
    if architecture.has_own_head or config.embedding_norm or model.lm_head.weight is not embedding:
        yield "output.weight", model.lm_head.weight
    if rope_type(config) == "llama3":
        yield "rope_freqs.weight", default_frequencies(config)[0] / transformer.positions.inv_freq
    elif config.position_encoding == "none" and not architecture.has_table:
        yield "rope_freqs.weight", torch.full((config.head_dim // 2,), STANDSTILL)


def module_of(block: nn.Module, name: str) -> nn.Module | None:
    """The module called `name`, or None where the block has none."""
    return dict(block.named_modules()).get(name)


def filled(module: nn.Module | None, architecture: Architecture) -> dict[str, torch.Tensor]:
    """Weight and bias of a linear layer or a norm, with what leaves it unchanged where it has none."""
    if isinstance(module, nn.Linear):
        size, weight = module.out_features, module.weight
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        size = module.normalized_shape[0]
        weight = torch.ones(size) if module.weight is None else module.weight
    else:
        return {}
    bias = getattr(module, "bias", None)
    if bias is None and architecture.has_biases:
        bias = torch.zeros(size)
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def neighbouring(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of queries or keys, in an order where (0, 1), (2, 3), … of a head are what (i, i + head_dim / 2) were."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


# ---- its metadata


def metadata(config: GPTConfig, architecture: Architecture) -> dict[str, object]:
    """The architecture's numbers under llama.cpp's keys."""
    norm = "attention.layer_norm_rms_epsilon" if config.norm == "rms_norm" else "attention.layer_norm_epsilon"
    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        norm: float(config.norm_eps),
    }
    if not architecture.has_table:
        numbers |= rotary_metadata(config)
    if architecture.has_windows:
        sliding = [layer_type == "sliding_attention" for layer_type in config.layer_types]
        numbers |= {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": sliding}
    return {f"{architecture.name}.{key}": value for key, value in numbers.items()} | architecture.constants


def rotary_metadata(config: GPTConfig) -> dict[str, object]:
    """The rotary numbers; llama3's scaling, and no rotation at all, are a tensor instead."""
    parameters, kind = config.rope_parameters or {}, rope_type(config)
    base = float(parameters.get("rope_theta", 10000.0))
    numbers = {"rope.dimension_count": config.head_dim, "rope.freq_base": base}
    if kind in ("linear", "yarn"):
        numbers |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    if kind == "yarn":
        trained = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        numbers["rope.scaling.original_context_length"] = trained
    return numbers


# ---- the file


def write_gguf(model: GPTForCausalLM, tokenizer, path: Path, outtype: str, title: str) -> list[str]:
    """Write the model to `path`, whole or not at all; lines to tell the person.

    outtype: of the matrices; vectors and position tables stay f32, and matrices whose rows q8_0 cannot divide, f16.
    Raises UserError for what llama.cpp or the type cannot hold.
    """
    architecture = choose(title, model.config)
    replace_whole(path, lambda temporary: fill(temporary, model, tokenizer, architecture, outtype, title))
    lines = [f"{path}: {architecture.name} in llama.cpp's terms, {outtype}, {path.stat().st_size / 1e6:.1f} MB"]
    if model.config.hidden_act == "gelu":
        lines.append("hidden_act='gelu': llama.cpp computes its tanh approximation, which differs by up to 5e-4")
    return lines + note(tokenizer, model)


def fill(path: Path, model: GPTForCausalLM, tokenizer, architecture: Architecture, outtype: str, title: str) -> None:
    """Write a GGUF file: metadata, vocabulary, the list of tensors, and then each tensor."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_name(title)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[outtype]])
        for key, value in metadata(model.config, architecture).items():
            writer.add_key_value(key, value, value_type(value))
        add_vocabulary(writer, tokenizer, model)
        types = {}
        for name, tensor in tensors(model, architecture):
            types[name] = kind = gguf.GGMLQuantizationType[stored_type(name, tensor, outtype)]
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind.name == "Q8_0" else tensor.shape
            element = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
            writer.add_tensor_info(name, shape, element, math.prod(shape) * element.itemsize, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tqdm(tensors(model, architecture), "writing", len(types), leave=False, disable=None):
            writer.write_tensor_data(gguf.quantize(tensor.detach().float().contiguous().numpy(), types[name]))
    finally:
        writer.close()


def stored_type(name: str, tensor: torch.Tensor, outtype: str) -> str:
    """GGUF's name of the type that a tensor is written in; UserError for numbers that it cannot hold."""
    if tensor.dim() == 1 or name == "position_embd.weight":
        return "F32"
    kind = "F16" if outtype == "q8_0" and tensor.shape[-1] % Q8_BLOCK else outtype.upper()
    largest = tensor.abs().max().item()
    if not largest < math.inf:
        raise UserError(f"{name} holds numbers that are not finite: the model is broken; export an earlier checkpoint")
    if kind == "F16" and largest > torch.finfo(torch.float16).max:
        raise UserError(f"outtype={outtype}: {name} holds numbers up to {largest:.0f}, too large for f16; take f32")
    return kind


def value_type(value: object):
    """GGUF's type of a metadata value, as llama.cpp expects it."""
    from gguf import GGUFValueType

    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    return GGUFValueType[types[type(value)]]
