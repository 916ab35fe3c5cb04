"""`acorn evaluate MODEL [--text_files …]`: the losses of a model on what its run held out, or on any text."""

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from training.config.arguments import DataArguments
from training.config.checks import CHOICES
from training.data.dataset import EvaluationRows, TokenArray
from training.data.encoding import encode_documents
from training.data.sources import named_sources, read_documents
from training.loop.evaluation import evaluate_rows
from training.model.devices import best_device, refuse_emulated
from training.model.loading import load_model_and_tokenizer
from training.run import open_run, sequence_length
from training.system.checkpoints import run_of
from training.system.errors import UserError, one_line, quiet_libraries, run_main
from training.system.flags import FlagParser

EPILOG = """examples:
  acorn evaluate runs/quickstart                          the validation split of its run
  acorn evaluate runs/quickstart --text_files my.txt      another text
  acorn evaluate runs/quickstart/checkpoint-225 --dataset python-stdlib"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags."""
    parser = FlagParser(
        prog="acorn evaluate",
        description="Print loss, perplexity, bits per byte and token accuracy of a model as one JSON line: on the "
        "validation split of its run, or on another text.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", help="run directory, checkpoint, model directory or Hub id")
    add("--text_files", nargs="+", default=[], help="text files, directories, globs or URLs to evaluate on")
    add("--data_files", nargs="+", default=[], help="JSON, CSV, Parquet or Arrow files to evaluate on")
    add("--dataset", help="dataset on the Hub, local dataset directory, or python-stdlib, to evaluate on")
    add("--dataset_config", help="configuration of the Hub dataset")
    add("--dataset_split", default="test", help="split of the Hub dataset")
    add("--text_column", default="text", help="column that holds the text")
    add("--on_bad_file", default="stop", choices=CHOICES["on_bad_file"], help="unreadable file or row: stop or skip")
    add("--block_size", type=int, help="tokens per sequence (default: the model's context)")
    add("--per_device_eval_batch_size", type=int, default=32, help="sequences per batch")
    add("--bf16", action="store_true", help="compute the logits in bf16 (default: in the type of the weights)")
    add("--force_precision", action="store_true", help="use a type even if the device only emulates it")
    add("--save", help="JSON file, or directory for one, in which to save the results with date and versions")
    add("--trust_remote_code", action="store_true", help="run model code from the Hub")
    flags = parser.parse_args(argv)
    if not (flags.text_files or flags.data_files or flags.dataset):
        for name in ("dataset_config", "dataset_split", "text_column", "on_bad_file"):
            if getattr(flags, name) != parser.get_default(name):
                raise UserError(f"--{name}: has no effect without --text_files, --data_files or --dataset")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Print the figures of the text that the flags name, or else of what a run held out, as one JSON line."""
    flags = parse(argv)
    quiet_libraries()
    if flags.bf16 and not flags.force_precision:
        mend = "leave it out, or override with --force_precision"
        refuse_emulated("--bf16", best_device().type, torch.bfloat16, mend)
    model, tokenizer = load_model_and_tokenizer(flags.model, "auto", flags.trust_remote_code, flags.force_precision)
    if flags.text_files or flags.data_files or flags.dataset:
        length, (tokens, num_bytes) = sequence_length(model, flags.block_size), tokens_of_text(flags, tokenizer)
        rows, counted = EvaluationRows(tokens, length), len(tokens) - 1
    elif (run_dir := run_of(Path(flags.model))) is not None:
        rows, counted, num_bytes = open_run(run_dir).held_out(model, tokenizer, flags.block_size)
    else:
        raise UserError(f"{flags.model} belongs to no run, so nothing is held out; give --text_files or --dataset")
    batch_size = flags.per_device_eval_batch_size
    device = next(model.parameters()).device.type
    autocast = (lambda: torch.autocast(device, torch.bfloat16)) if flags.bf16 else nullcontext
    batches = -(-len(rows) // batch_size)
    with tqdm(total=batches, unit="batch", leave=False, file=sys.stderr, disable=None) as bar:
        results = evaluate_rows(model, rows, num_bytes, batch_size, autocast, on_batch=bar.update)
    results |= {"tokens": counted, "bytes": num_bytes}
    if flags.save:
        save(flags, results)
    print(json.dumps(results))


def save(flags: argparse.Namespace, results: dict) -> None:
    """Keep the results as the `evaluate` library does: with what was evaluated, the time and the versions."""
    import evaluate  # half a second that a plain evaluation need not wait for

    evaluate.saving._git_commit_hash = lambda: None  # fails without git, and prints `fatal` outside of a repository
    try:
        evaluate.save(flags.save, **results, **{name: value for name, value in vars(flags).items() if value})
    except OSError as error:
        raise UserError(f"--save={flags.save}: {one_line(error)}; name a file or folder that can be written") from error


def tokens_of_text(flags: argparse.Namespace, tokenizer) -> tuple[TokenArray, int]:
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


if __name__ == "__main__":
    run_main(main)
