"""What `acorn evaluate` is told and what it prints, whichever kind of run it measures."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from tqdm.auto import tqdm

from .config.arguments import DataArguments
from .data.dataset import EvaluationRows, TokenArray
from .data.encoding import encode_documents
from .data.sources import named_sources, read_documents
from .loop.evaluation import evaluate_rows
from .model.hardware import best_device
from .model.loading import load_model_and_tokenizer
from .model.precision import refuse_emulated
from .model.sampling import context_left
from .system.errors import FlagParser, UserError, quiet_libraries
from .system.ranges import check_numbers

EPILOG = """examples:
  acorn evaluate runs/quickstart                          the validation split it was trained beside
  acorn evaluate runs/quickstart --text_files my.txt      any other text
  acorn evaluate runs/quickstart/checkpoint-225 --dataset python-stdlib"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags."""
    parser = FlagParser(
        prog="acorn evaluate",
        description="Loss, perplexity, bits per byte and token accuracy over the whole text, in windows side by side; "
        "the last line printed is JSON.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="run directory, checkpoint, model directory or Hub id")
    parser.add_argument("--text_files", nargs="+", default=[], help="text files, folders or globs to evaluate on")
    parser.add_argument("--data_files", nargs="+", default=[], help="JSON, CSV, parquet or arrow files to evaluate on")
    parser.add_argument("--dataset", help="Hub data set id, local directory, or python-stdlib, to evaluate on")
    parser.add_argument("--dataset_config")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--on_bad_file", default="stop", help="stop, or skip a file or row that cannot be read")
    parser.add_argument("--block_size", type=int, help="window length [the model's context]")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=32, help="windows a batch [%(default)s]")
    parser.add_argument("--bf16", action="store_true", help="compute the logits in bf16 (without: in what was saved)")
    parser.add_argument("--force_precision", action="store_true", help="take a dtype that the device only emulates")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that a Hub id brings")
    return parser.parse_args(argv)


def open_model(flags):
    """(model, tokenizer) that the flags name, in the precision that they ask for."""
    check_numbers(flags)
    quiet_libraries()
    if flags.bf16 and not flags.force_precision:
        mend = "leave it out, or override with --force_precision"
        refuse_emulated("--bf16", best_device().type, torch.bfloat16, mend)
    return load_model_and_tokenizer(flags.model, "auto", flags.trust_remote_code, flags.force_precision)


def window_of(flags, model, usual: int | None = None) -> int:
    """Tokens a window: what the flags say, else what is usual, else all that the model can read."""
    limit = context_left(model)
    length = (usual or limit) if flags.block_size is None else flags.block_size
    if not 1 <= length <= limit:
        raise UserError(f"block_size={length}: must be between 1 and the model's context, {limit}")
    return length


def names_text(flags) -> bool:
    """Whether the flags name a text of their own."""
    return bool(flags.text_files or flags.data_files or flags.dataset)


def measure(argv: list[str] | None, held_out: Callable[..., tuple]) -> None:
    """Print the figures of the text that the flags name, or else of what a run held out, as one JSON line.

    held_out(flags, model, tokenizer) -> (rows, how many tokens count in them, their UTF-8 bytes).
    """
    flags = parse(argv)
    model, tokenizer = open_model(flags)
    rows, tokens, num_bytes = (text_named if names_text(flags) else held_out)(flags, model, tokenizer)
    batches = -(-len(rows) // flags.per_device_eval_batch_size)
    device = next(model.parameters()).device.type
    autocast = (lambda: torch.autocast(device, torch.bfloat16)) if flags.bf16 else nullcontext
    with tqdm(total=batches, unit="batch", leave=False, file=sys.stderr, disable=None) as bar:
        results = evaluate_rows(model, rows, num_bytes, flags.per_device_eval_batch_size, autocast, on_batch=bar.update)
    print(json.dumps({**results, "tokens": tokens, "bytes": num_bytes}))


def text_named(flags, model, tokenizer) -> tuple[EvaluationRows, int, int]:
    """(rows, tokens that count, bytes) of the text that the flags name."""
    window = window_of(flags, model)
    tokens, num_bytes = tokens_of_text(flags, tokenizer)
    return EvaluationRows(tokens, window), len(tokens) - 1, num_bytes


def tokens_of_text(flags, tokenizer) -> tuple[TokenArray, int]:
    """(tokens, UTF-8 bytes) of the whole text that the flags name; the end-of-text token, if any, closes a document."""
    names = (field.name for field in dataclasses.fields(DataArguments))
    data = DataArguments(**{name: getattr(flags, name) for name in names if hasattr(flags, name)})
    has_end = tokenizer.eos_token_id is not None  # a character model of nanoGPT has no such token
    end = np.array([tokenizer.eos_token_id] if has_end else [], dtype=np.uint32)
    pieces, num_bytes = [], 0
    for document in read_documents(data):
        pieces += [encode_documents(tokenizer, [document.text], [document.name])[0].astype(np.uint32), end]
        num_bytes += len(document.text.encode())
    if not num_bytes:
        raise UserError(f"{named_sources(data)[0]}: the source holds no text at all; name one that does")
    return TokenArray(np.concatenate(pieces)), num_bytes
