"""A model of any format that is read, and the same model in a format that is written, proven by its logits."""

import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling import GPTForCausalLM
from training.model.pooling import pool_heads, refuse_unpoolable
from training.system.errors import UserError
from training.system.files import new_directory

from . import FORMATS
from .base import Format, Source, open_source

TOLERANCE = 1e-5  # what float32 keeps of digits
PROOF_TOKENS = 1024


def recognise(source: Source) -> Format:
    """The format of the source; UserError where it is none of ours."""
    for kind in FORMATS.values():
        if kind.recognises(source):
            return kind
    known = ", ".join(kind.title for kind in FORMATS.values())
    model_type = source.config.get("model_type")
    raise UserError(f"{source.name}: model_type={model_type!r} is not supported; choose from {known}")


def read_model(name: str, tokenizer: str | None = None, meta: str | None = None) -> tuple[GPTForCausalLM, object]:
    """(our model in float32 with the weights of `name`, its tokenizer or None), whatever its format.

    tokenizer, meta: where the tokenizer is, if not beside the weights. Raises UserError.
    """
    source = open_source(name)
    found = recognise(source)
    theirs = found.load(source)
    entries = read_tokenizer(found, source, theirs, tokenizer, meta)
    return found.to_acorn(theirs, entries), entries


def read_tokenizer(found: Format, source: Source, theirs, name: str | None, meta: str | None):
    """The tokenizer of a loaded model, or None; one with entries that the model does not have is refused."""
    tokenizer = found.tokenizer(source, theirs, name, meta)
    size = found.config(theirs, tokenizer).vocab_size
    if tokenizer is not None and len(tokenizer) > size:
        sizes = f"the tokenizer has {len(tokenizer)} entries, the model's vocab_size is {size}"
        raise UserError(f"{source.name}: {sizes}; name the right one with --tokenizer")
    return tokenizer


def convert(
    name: str,
    to: str,
    destination: Path,
    tokenizer: str | None = None,
    meta: str | None = None,
    num_key_value_heads: int | None = None,
) -> list[str]:
    """Write the model `name` in the format `to` into a new directory, prove it equal, and tell about it in lines.

    num_key_value_heads: pool the heads into so many first; what is written is equal to the pooled model then. At no
    time are there more than two copies of the weights in memory. Raises UserError, and leaves nothing then.
    """
    target = FORMATS[to]
    with new_directory(destination) as building:
        source = open_source(name)
        found = recognise(source)
        if found is target and num_key_value_heads is None:
            raise UserError(f"{name}: is {found.title} already; choose another format")
        with tqdm(total=4, leave=False, file=sys.stderr, disable=None) as bar:
            bar.set_description("reading")
            theirs = found.load(source)
            entries = read_tokenizer(found, source, theirs, tokenizer, meta)
            config, notes = found.config(theirs, entries), []
            if num_key_value_heads is not None:
                refuse_unpoolable(name, config, num_key_value_heads)
                notes = [f"{config.num_key_value_heads} key and value heads became {num_key_value_heads}: train it now"]
                theirs, found = pool_heads(found.to_acorn(theirs, entries), num_key_value_heads), FORMATS["acorn"]
                config = theirs.config
            if obstacles := target.obstacles(config):
                raise UserError(f"{name}: {target.title} cannot hold {'; '.join(obstacles)}")
            length = min(config.max_position_embeddings, PROOF_TOKENS)
            ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1337))
            advance(bar, "its logits")
            expected = found.logits(theirs, ids)
            advance(bar, "writing")
            model = found.to_acorn(theirs, entries)
            del theirs
            notes += target.write(model, entries, building, destination)
            summary = f"{found.title} → {target.title}: {describe(model)}"
            del model
            advance(bar, "logits of what was written")
            proof = compare(expected, target.logits(target.load(open_source(str(building))), ids))
            bar.update()
    return [summary, proof, *notes]


def advance(bar: tqdm, stage: str) -> None:
    """Count a stage as done and show the next one."""
    bar.update()
    bar.set_description(stage)


def compare(expected: torch.Tensor, found: torch.Tensor, tolerance: float = TOLERANCE) -> str:
    """The line that tells the largest difference; UserError where it is more than rounding.

    tolerance: of logits up to 1; of larger ones it grows with them.
    """
    difference = (expected - found).abs().max().item()
    largest = expected.abs().max().item()
    line = f"largest logit difference {difference:.1e} over {expected.shape[1]:,} random tokens in float32"
    if not difference <= tolerance * max(1.0, largest):  # so that nan is refused too
        raise UserError(f"{line}, of logits up to {largest:.1f}: not the same model; nothing was written")
    return f"{line} (logits up to {largest:.1f})"


def describe(model) -> str:
    """Size and shape in one line."""
    config = model.config
    return (
        f"{model.num_parameters():,} parameters, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"context {config.max_position_embeddings:,}, vocabulary {config.vocab_size:,}"
    )
