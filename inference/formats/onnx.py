"""ONNX, through transformers' own exporter: one graph with a cache, for prompts and for single tokens.

Inputs: `input_ids` and `position_ids`, (1 or more rows, tokens), and for each cache layer N the keys and values of what
came before, `input.cache.layers.N.keys` and `.values`, (rows, kv_heads, tokens before, head_dim), which may be empty.
Outputs: `logits` and the cache that goes into the next call, as `output.cache.…`.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from modeling import GPTConfig, GPTForCausalLM
from training.system.errors import UserError, one_line

from .base import Obstacle, save_tokenizer
from .conversion import compare

OLDEST = (5, 24)  # of transformers: earlier ones have no exporter, or one of another interface
NAME = "model"
SAMPLE_TOKENS = 6  # of the text that the graph is traced with
PROOF_TOKENS = 64
TOLERANCE = 1e-4  # of logits up to 1: ONNX Runtime adds up in another order
WINDOW = "_sliding_window_tensor"  # how the exporter's input ends that holds a window's size

# field: (when it stands in the way, why)
OBSTACLES: dict[str, Obstacle] = {
    "kv_lora_rank": (
        lambda c: c.kv_lora_rank is not None,
        "keys and values of the graph's cache are of one width, and it would hold latents",
    ),
    "max_position_embeddings": (
        lambda c: c.position_encoding == "learned" and c.max_position_embeddings < 4,
        "the graph is traced with four tokens",
    ),
    "rope_parameters": (
        lambda c: any(p.get("rope_type") == "dynamic" for p in rotary(c)),
        "its frequencies depend on the length, and a graph has no conditions on numbers",
    ),
    "layer_types": (
        lambda c: "linear_attention" in c.layer_types,
        "linear layers hold a state, and the exporter knows caches of keys and values",
    ),
    "bigram_vocab_size": (
        lambda c: c.bigram_vocab_size is not None,
        "its cache holds the tokens too, and the exporter knows caches of keys and values",
    ),
    "kv_quantization": (
        lambda c: c.kv_quantization is not None,
        "its cache holds codes, and the exporter knows those of keys and values",
    ),
    "memory_length": (
        lambda c: c.memory_length > 0,
        "what it keeps of a text depends on where a segment ends, and a graph has no conditions on numbers",
    ),
    "sliding_window": (
        lambda c: "sliding_attention" in c.layer_types and c.sliding_window == 2,
        "its cache keeps one token, which the exporter takes for a constant; windows from 3 on can be written",
    ),
}


def rotary(config: GPTConfig) -> list[dict]:
    """The rotary parameters of each kind of layer."""
    parameters = config.rope_parameters or {}
    return [parameters[kind] for kind in config.rope_layer_types()] or [parameters]


def check_version() -> None:
    """Refuse a transformers without the exporter."""
    installed = transformers.__version__
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UserError(
            f"--format onnx: needs transformers {oldest} or later, and {installed} is installed; upgrade it"
        )


def write_onnx(name: str, model: GPTForCausalLM, tokenizer, directory: Path) -> list[str]:
    """Write graph, weights, configuration and tokenizer into `directory`, prove the logits, and tell in lines."""
    stands = [field for field, (in_the_way, _) in OBSTACLES.items() if in_the_way(model.config)]
    if stands:
        found = "; ".join(f"{field}={getattr(model.config, field)!r} ({OBSTACLES[field][1]})" for field in stands)
        raise UserError(f"{name}: ONNX cannot hold {found}")
    with silence():
        try:
            exported = exported_model(model)
        except Exception as error:  # of torch.export, torch.onnx or onnxscript: a kind of graph they do not know
            raise UserError(f"{name}: transformers' ONNX exporter failed: {one_line(error)}") from error
        exported.save_pretrained(directory)
    custom_object_save(model.config, directory)  # so that transformers' ExportedModel.from_pretrained reads it
    notes = save_tokenizer(tokenizer, directory)
    return [prove(model, directory / f"{NAME}.onnx"), *notes]


def exported_model(model: GPTForCausalLM):
    """transformers' ExportedModel of one graph, whose axes of rows and tokens are free."""
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    length = min(SAMPLE_TOKENS, max(1, model.config.max_position_embeddings - 3))  # three more are generated
    ids = torch.arange(2 * length).reshape(2, -1) % model.config.vocab_size
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = GenerationConfig(do_sample=False, pad_token_id=0)
    parts = decompose_for_generation(model, sample, generation_config=plain, multi_token_decode=True)
    decoder, inputs = parts["decode"]
    component = OnnxExporter().export(decoder, inputs, OnnxConfig(dynamic=True)).components[NAME]
    tidy_inputs(component.program.graph, model.config)
    return ExportedModel({NAME: component}, OnnxExporter.export_format, model.config, model.generation_config)


def tidy_inputs(graph, config: GPTConfig) -> None:
    """Make constants of the inputs that hold a window's size, and say of the others what their axes are."""
    import onnx_ir

    for value in list(graph.inputs):
        if value.name.endswith(WINDOW):
            graph.inputs.remove(value)
            value.const_value = onnx_ir.tensor(np.array(config.sliding_window, np.int64), name=value.name)
            graph.register_initializer(value)
        elif value.name.startswith("input.cache."):
            value.shape = onnx_ir.Shape(["rows", config.num_key_value_heads, "tokens_before", config.head_dim])
        else:
            value.shape = onnx_ir.Shape(["rows", "tokens"])


@torch.no_grad()
def prove(model: GPTForCausalLM, path: Path) -> str:
    """The line that tells how far ONNX Runtime's logits are from ours; UserError where it is too far.

    Half of the tokens go in at once, the others one by one, with the cache.
    """
    length = min(model.config.max_position_embeddings, PROOF_TOKENS)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1337))
    begin = max(1, length // 2)
    ends = [begin, *range(begin + 1, length + 1)]
    step = opened(path, model.config)
    found = [step(ids[:, start:end].numpy()) for start, end in zip([0, *ends], ends, strict=False)]
    return compare(model(ids, use_cache=False).logits, torch.from_numpy(np.concatenate(found, axis=1)), TOLERANCE)


def opened(path: Path, config: GPTConfig) -> Callable[[np.ndarray], np.ndarray]:
    """A function from the next ids, (1, tokens), to their logits, (1, tokens, vocabulary), by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names, outputs = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    nothing = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    state = {name: nothing for name in names if name.startswith("input.cache.")}
    seen = 0

    def step(ids: np.ndarray) -> np.ndarray:
        nonlocal seen
        feed = {"input_ids": ids, "position_ids": np.arange(seen, seen + ids.shape[1])[None]}
        found = session.run(None, {name: feed[name] for name in feed if name in names} | state)
        found = dict(zip(outputs, found, strict=True))
        state.update({name: found[name.replace("input", "output", 1)] for name in state})
        seen += ids.shape[1]
        return found["logits"]

    return step


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """The exporter prints and warns of what nobody here can mend; what goes wrong it raises."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
