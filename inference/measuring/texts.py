"""What a model is measured on: any text, prepared tokens, or what its run held out; as rows that are read once."""

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.config.arguments import DataArguments
from training.config.publishing import is_hub_id
from training.data.corpus import SPLITS, holds_datatrove, load_corpus
from training.data.dataset import EvaluationRows, Rows, TokenArray, Tokens
from training.data.encoding import encode_documents
from training.data.sources import named_sources, read_documents
from training.run import open_run, refuse_other_tokenizer, sequence_length
from training.system.addresses import public_name
from training.system.checkpoints import run_of
from training.system.errors import UserError

TEXT = ("text_files", "data_files", "dataset")  # flags that name a text
OF_TEXT = ("dataset_config", "dataset_split", "text_column", "on_bad_file")  # flags that say more of it


def refuse_idle_text(flags: argparse.Namespace) -> None:
    """Refuse flags of a text, of `add_text_flags`, that would be read and ignored."""
    usual: dict = {}
    add_text_flags(lambda name, **settings: usual.update({name.removeprefix("--"): settings.get("default")}))
    named = [name for name in TEXT if getattr(flags, name)]
    if named and flags.data_dir:
        raise UserError(f"--data_dir: cannot be combined with --{named[0]}; give one of them")
    for name, others in (dict.fromkeys(OF_TEXT, TEXT) | {"split": ("data_dir",)}).items():
        if getattr(flags, name) != usual[name] and not any(getattr(flags, other) for other in others):
            raise UserError(f"--{name}: has no effect without {' or '.join(f'--{other}' for other in others)}")


class Measured(NamedTuple):
    """Rows to measure on, how many tokens count in them, the UTF-8 bytes of their text, and what it is called."""

    rows: Rows
    tokens: int
    num_bytes: int
    name: str


def rows_to_measure(flags: argparse.Namespace, model, tokenizer) -> Measured:
    """The rows that the flags name; without any, those that the model's run held out."""
    if any(getattr(flags, name) for name in TEXT):
        tokens, num_bytes, name = tokens_of_text(flags, tokenizer)
    elif flags.data_dir:
        tokens, num_bytes, name = prepared_tokens(flags, tokenizer)
    elif (run_dir := run_of(Path(flags.model))) is not None:
        held_out = open_run(run_dir).held_out(model, tokenizer, flags.block_size, flags.stride)
        return Measured(*held_out, "the validation split")
    else:
        raise UserError(
            f"{flags.model} belongs to no run, so nothing is held out; give --text_files, --dataset or --data_dir"
        )
    rows = EvaluationRows(tokens, sequence_length(model, flags.block_size), flags.stride)
    return Measured(rows, len(tokens) - 1, num_bytes, name)


def tokens_of_text(flags: argparse.Namespace, tokenizer) -> tuple[TokenArray, int, str]:
    """(tokens, UTF-8 bytes, name) of the whole text named; the end-of-text token, if any, closes a document."""
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
    tokens = np.concatenate(pieces)
    if len(tokens) < 2:
        raise UserError(f"{named_sources(data)[0]}: a single token, of which none is predicted; name a longer text")
    return TokenArray(tokens), num_bytes, name_of(flags)


def name_of(flags: argparse.Namespace) -> str:
    """What the text is called where others read it: a Hub id, or the names of files without their places."""
    if is_hub_id(flags.dataset):
        return flags.dataset
    names = [flags.dataset] if flags.dataset else flags.text_files or flags.data_files
    return ", ".join(Path(public_name(name)).name for name in names)


def prepared_tokens(flags: argparse.Namespace, tokenizer) -> tuple[Tokens, int, str]:
    """(tokens, UTF-8 bytes, name) of a split of prepared tokens, which this tokenizer made."""
    if holds_datatrove(flags.data_dir):
        why = "datatrove's tokens have no split of their own; evaluate a run on them by its name alone"
        raise UserError(f"--data_dir={flags.data_dir}: {why}")
    corpus = load_corpus(flags.data_dir)
    refuse_other_tokenizer(tokenizer, corpus, flags.model)
    tokens = corpus.tokens(flags.split)
    if len(tokens) < 2:
        raise UserError(f"--split {flags.split}: holds {len(tokens)} tokens of {flags.data_dir}; take the other split")
    num_bytes = corpus.manifest["splits"][flags.split]["bytes"]
    return tokens, num_bytes, f"{Path(flags.data_dir).name}, {flags.split} split"


def add_text_flags(add) -> None:
    """The flags that name what to measure on; `add` is a parser's add_argument."""
    add("--text_files", nargs="+", default=[], help="text files, directories, globs or URLs to evaluate on")
    add("--data_files", nargs="+", default=[], help="JSON, CSV, Parquet or Arrow files to evaluate on")
    add("--dataset", help="dataset on the Hub, local dataset directory, or python-stdlib, to evaluate on")
    add("--dataset_config", help="configuration of the Hub dataset")
    add("--dataset_split", default="test", help="split of the Hub dataset")
    add("--text_column", default="text", help="column that holds the text")
    add("--on_bad_file", default="stop", choices=("stop", "skip"), help="unreadable file or row: stop or skip")
    add("--data_dir", help="directory of prepared tokens to evaluate on")
    add("--split", default="validation", choices=SPLITS, help="split of the prepared tokens")
