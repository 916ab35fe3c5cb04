"""`acorn evaluate MODEL [--text_files …]`: the losses of a model on a whole text, and nothing else."""

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from training.arguments import DataArguments
from training.corpus import Corpus
from training.dataset import EvaluationRows
from training.errors import FlagParser, UserError, quiet_libraries, run_main
from training.evaluation import evaluate_rows
from training.loading import best_device, load_model_and_tokenizer
from training.precision import refuse_emulated
from training.ranges import check_numbers
from training.recipe import load_run_recipe
from training.run import corpus_of_run
from training.sampling import context_left
from training.sources import documents, named_sources
from training.tokenizers import encode_documents, read_alike

EPILOG = """examples:
  acorn evaluate runs/quickstart                          the validation split it was trained beside
  acorn evaluate runs/quickstart --text_files my.txt      any other text
  acorn evaluate runs/quickstart/checkpoint-600 --dataset python-stdlib"""


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
    parser.add_argument("--on_bad_file", default="stop", help="stop, or skip a file or row that can not be read")
    parser.add_argument("--block_size", type=int, help="window length [the model's context]")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=32, help="windows a batch [%(default)s]")
    parser.add_argument("--bf16", action="store_true", help="compute the logits in bf16 (without: in what was saved)")
    parser.add_argument("--force_precision", action="store_true", help="take a dtype that the device only emulates")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code that a Hub id brings")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the metrics as one JSON line."""
    flags = parse(argv)
    check_numbers(flags)
    quiet_libraries()
    if flags.bf16 and not flags.force_precision:
        mend = "leave it out, or insist with --force_precision"
        refuse_emulated("--bf16", best_device().type, torch.bfloat16, mend)
    model, tokenizer = load_model_and_tokenizer(flags.model, "auto", flags.trust_remote_code, flags.force_precision)
    limit = context_left(model)
    context_length = limit if flags.block_size is None else flags.block_size
    if not 1 <= context_length <= limit:
        raise UserError(f"block_size={context_length}: must be between 1 and the model's context, {limit}")
    if flags.text_files or flags.data_files or flags.dataset:
        tokens, num_bytes = tokens_of_text(flags, tokenizer)
    else:
        tokens, num_bytes = validation_tokens(Path(flags.model), tokenizer)
    rows = EvaluationRows(tokens, context_length)
    batches = -(-len(rows) // flags.per_device_eval_batch_size)
    device = next(model.parameters()).device.type
    autocast = (lambda: torch.autocast(device, torch.bfloat16)) if flags.bf16 else nullcontext
    with tqdm(total=batches, unit="batch", leave=False, file=sys.stderr, disable=None) as bar:
        results = evaluate_rows(model, rows, num_bytes, flags.per_device_eval_batch_size, autocast, on_batch=bar.update)
    print(json.dumps({**results, "tokens": len(tokens) - 1, "bytes": num_bytes}))


def validation_tokens(directory: Path, tokenizer):
    """The validation split of the run that `directory`, a run or one of its checkpoints, belongs to."""
    run_dir = directory if (directory / "recipe.yaml").is_file() else directory.parent
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{directory} is no run directory, it has no validation split: give --text_files or --dataset")
    corpus: Corpus = corpus_of_run(load_run_recipe(run_dir))
    if not read_alike(tokenizer, corpus.tokenizer):
        raise UserError(
            f"{directory}: its tokenizer is not the one that {corpus.directory} was made with; "
            "evaluate on text instead (--text_files)"
        )
    return corpus.tokens("validation"), corpus.manifest["splits"]["validation"]["bytes"]


class TokenArray:
    """Token ids in memory, read like TokenShards."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def window(self, start: int, length: int) -> np.ndarray:
        return self.ids[start : start + length].astype(np.int64)


def tokens_of_text(flags, tokenizer) -> tuple[TokenArray, int]:
    """(tokens, UTF-8 bytes) of the whole text that the flags name; the end-of-text token, if any, closes a document."""
    names = (field.name for field in dataclasses.fields(DataArguments))
    data = DataArguments(**{name: getattr(flags, name) for name in names if hasattr(flags, name)})
    has_end = tokenizer.eos_token_id is not None  # a character model of nanoGPT has no such token
    end = np.array([tokenizer.eos_token_id] if has_end else [], dtype=np.uint32)
    pieces, num_bytes = [], 0
    for name, text in documents(data):
        pieces += [encode_documents(tokenizer, [text], [name])[0].astype(np.uint32), end]
        num_bytes += len(text.encode())
    if not num_bytes:
        raise UserError(f"{named_sources(data)[0]}: the source holds no text at all; name one that does")
    return TokenArray(np.concatenate(pieces)), num_bytes


if __name__ == "__main__":
    run_main(main)
