"""`acorn convert SRC DST --to acorn|gpt2|nanogpt`: a model from one format into another, with its logits compared."""

import argparse
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from training.system.errors import UserError, quiet_libraries, run_main
from training.system.files import new_directory
from training.system.flags import FlagParser
from training.system.shell import shell

from .formats import FORMATS
from .formats.base import Format, Source, open_source

TOLERANCE = 1e-5  # of logits up to 1; of larger ones float32 keeps no more digits
PROOF_TOKENS = 1024

EPILOG = """SRC may be a run or model directory of Acorn's, a stock GPT2LMHeadModel (directory or Hub id), or a
checkpoint (ckpt.pt, or the directory that holds it) of nanoGPT's or of its rotary sibling; the format is detected.

The weights are written in float32. The logits of SRC and of what was written are compared on random tokens, each
computed as its format defines them; where they differ nothing is left in DST.

examples:
  acorn convert gpt2 models/gpt2 --to acorn                    OpenAI's weights, ready for `acorn finetune`
  acorn convert runs/my-gpt2 models/stock --to gpt2            for every tool that knows GPT-2
  acorn convert nanoGPT/out-shakespeare-char models/char --to acorn
  acorn convert models/char out-char --to nanogpt              for nanoGPT's sample.py and train.py"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags."""
    parser = FlagParser(
        prog="acorn convert",
        description="Turn stock GPT-2 and nanoGPT checkpoints into Acorn's, and back.",
        epilog=EPILOG,
    )
    parser.add_argument("src", metavar="SRC", help="directory, checkpoint file or Hub id")
    parser.add_argument("dst", metavar="DST", type=Path, help="output directory; it must be empty or not exist")
    written = [name for name, kind in FORMATS.items() if kind.is_written]
    parser.add_argument("--to", required=True, choices=written, help="format to convert to")
    parser.add_argument("--tokenizer", help="directory, Hub id or byte (default: the one beside SRC, else GPT-2's)")
    parser.add_argument("--meta", help="meta.pkl of nanoGPT's character model (default: beside SRC or in data/)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Convert, and print the largest difference of logits and what to type next."""
    flags = parse(argv)
    quiet_libraries()
    target = FORMATS[flags.to]
    with new_directory(flags.dst) as building:
        source = open_source(flags.src)
        found = recognise(source)
        if found is target:
            raise UserError(f"{flags.src}: is {found.title} already; choose another --to")
        with tqdm(total=4, leave=False, file=sys.stderr, disable=None) as bar:
            lines = convert(source, found, target, building, flags, bar)
    command = shell("acorn", "generate", flags.dst)
    lines.append(f"{flags.dst} is written." + (f" Next:\n  {command} --prompt …" if flags.to != "nanogpt" else ""))
    print("\n".join(lines))


def recognise(source: Source) -> Format:
    """The format of the source; UserError where it is none of ours."""
    for kind in FORMATS.values():
        if kind.recognises(source):
            return kind
    known = ", ".join(kind.title for kind in FORMATS.values())
    model_type = source.config.get("model_type")
    raise UserError(f"{source.name}: model_type={model_type!r} is not supported; choose from {known}")


def convert(source: Source, found: Format, target: Format, building: Path, flags, bar: tqdm) -> list[str]:
    """Write the source into `building` in the target's format, prove it equal, and tell about it in lines.

    At no time are there more than two copies of the weights in memory.
    """
    bar.set_description("reading")
    theirs = found.load(source)
    tokenizer = found.tokenizer(source, theirs, flags.tokenizer, flags.meta)
    config = found.config(theirs, tokenizer)
    if obstacles := target.obstacles(config):
        raise UserError(f"{flags.src}: {target.title} cannot hold {'; '.join(obstacles)}")
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        sizes = f"the tokenizer has {len(tokenizer)} entries, the model's vocab_size is {config.vocab_size}"
        raise UserError(f"{flags.src}: {sizes}; name the right one with --tokenizer")
    length = min(config.max_position_embeddings, PROOF_TOKENS)
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1337))
    advance(bar, "its logits")
    expected = found.logits(theirs, ids)
    advance(bar, "writing")
    model = found.to_acorn(theirs, tokenizer)
    del theirs
    notes = target.write(model, tokenizer, building, flags.dst)
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


def compare(expected: torch.Tensor, found: torch.Tensor) -> str:
    """The line that tells the largest difference; UserError where it is more than rounding."""
    difference = (expected - found).abs().max().item()
    largest = expected.abs().max().item()
    line = f"largest logit difference {difference:.1e} over {expected.shape[1]:,} random tokens in float32"
    if not difference <= TOLERANCE * max(1.0, largest):  # so that nan is refused too
        raise UserError(f"{line}, of logits up to {largest:.1f}: not the same model; nothing was written")
    return f"{line} (logits up to {largest:.1f})"


def describe(model) -> str:
    """Size and shape in one line."""
    config = model.config
    return (
        f"{model.num_parameters():,} parameters, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"context {config.max_position_embeddings:,}, vocabulary {config.vocab_size:,}"
    )


if __name__ == "__main__":
    run_main(main)
