"""Tokenise a corpus on many machines with datatrove, into a directory that `acorn pretrain --data_dir` reads.

    pip install "acorn-gpt[datatrove]"
    python -m training.launch.prepare_datatrove --dataset python-stdlib --tokenizer DIR --output_dir tokens
    python -m training.launch.prepare_datatrove --data_folder hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT \\
        --tokenizer gpt2 --output_dir /shared/fineweb-edu --tasks 200 --executor slurm --partition cpu --time 04:00:00
    acorn pretrain gpt2-openwebtext --data_dir /shared/fineweb-edu --tokenizer gpt2 --validation_by documents

A task reads every tasks-th file of the folder and writes one `.ds` file, its documents shuffled. Tasks that are done
are not done again when the same command is given once more. With slurm or ray the output directory must be shared, and
Acorn installed, on all machines.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from ..data.sources import PYTHON_STDLIB, SOURCE_DEFAULTS, read_documents
from ..data.tokenizers import load_tokenizer
from ..system.errors import UserError, run_main, unknown
from ..system.flags import FlagParser
from ..system.shell import shell

TOKENIZER_FILE = "tokenizer.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--data_folder", help="directory of Parquet or JSONL files: a path, or an hf:// or s3:// URL")
    parser.add_argument("--glob_pattern", default="**/*.parquet", help="glob pattern of its files")
    parser.add_argument("--dataset", help="python-stdlib, instead of a folder: a corpus that every machine has")
    parser.add_argument("--text_column", default="text", help="column that holds the text")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face tokenizer by id, or a directory of one")
    parser.add_argument("--output_dir", required=True, help="directory of the tokens")
    parser.add_argument("--tasks", type=int, default=1, help="number of tasks, each a file of tokens")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at the same time; -1: all")
    parser.add_argument("--seed", type=int, default=2357, help="seed of the order of documents")
    parser.add_argument("--executor", default="local", help="local, slurm or ray")
    parser.add_argument("--partition", help="Slurm partition")
    parser.add_argument("--time", default="04:00:00", help="time limit of a task under Slurm")
    flags = parser.parse_args(argv)
    if flags.executor not in EXECUTORS:
        raise unknown("executor", flags.executor, EXECUTORS)
    if bool(flags.data_folder) == bool(flags.dataset) or flags.dataset not in (None, PYTHON_STDLIB):
        raise UserError(f"dataset={flags.dataset!r}: give either --data_folder FOLDER or --dataset {PYTHON_STDLIB}")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Run, or submit, the tasks, and say what to type next."""
    flags = parse(argv)
    try:
        from datatrove.pipeline.tokens import DocumentTokenizer
    except ImportError as error:
        raise UserError('datatrove is not installed: pip install "acorn-gpt[datatrove]"') from error
    tokenizer = load_tokenizer(flags.tokenizer)
    known_as = readable_by_datatrove(flags, tokenizer)
    steps = [
        reader(flags),
        DocumentTokenizer(
            output_folder=flags.output_dir,
            tokenizer_name_or_path=known_as if known_as == flags.tokenizer else f"{known_as}/{TOKENIZER_FILE}",
            eos_token=tokenizer.eos_token,
            seed=flags.seed,
        ),
    ]
    EXECUTORS[flags.executor](flags, steps).run()
    command = shell("acorn", "pretrain", "RECIPE", data_dir=flags.output_dir, tokenizer=known_as)
    print(f"Type next{'' if flags.executor == 'local' else ', when the tasks are done'}: {command}")


def readable_by_datatrove(flags: argparse.Namespace, tokenizer) -> str:
    """The Hub id, or the directory whose TOKENIZER_FILE datatrove reads; older forms get one beside the tokens."""
    directory = Path(flags.tokenizer)
    if not directory.is_dir():
        return flags.tokenizer
    if not (directory / TOKENIZER_FILE).is_file():
        directory = Path(flags.output_dir, "tokenizer")
        tokenizer.save_pretrained(directory)
    return str(directory.absolute())


def reader(flags: argparse.Namespace) -> Callable:
    """The first step of the pipeline: documents."""
    if flags.dataset:
        return stdlib_share
    from datatrove.pipeline.readers import JsonlReader, ParquetReader

    kind = ParquetReader if flags.glob_pattern.endswith(".parquet") else JsonlReader
    return kind(flags.data_folder, glob_pattern=flags.glob_pattern, text_key=flags.text_column)


def stdlib_share(data, rank: int, world_size: int) -> Iterator:
    """Yield every world_size-th module of the standard library."""
    from datatrove.data import Document

    for document in read_documents(SimpleNamespace(**SOURCE_DEFAULTS | {"dataset": PYTHON_STDLIB})):
        if document.number % world_size == rank:
            yield Document(text=document.text, id=document.name)


# --- executors --------------------------------------------------------------------------------------------------------


def local(flags: argparse.Namespace, steps: list):
    """Processes of this machine."""
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor(steps, flags.tasks, flags.workers, logging_dir=logs(flags))


def slurm(flags: argparse.Namespace, steps: list):
    """An array job, a task each."""
    from datatrove.executor import SlurmPipelineExecutor

    if not flags.partition:
        raise UserError("partition=None: slurm needs one; give --partition")
    return SlurmPipelineExecutor(
        steps, flags.tasks, flags.time, flags.partition, workers=flags.workers, job_name="acorn-tokens",
        logging_dir=logs(flags),
    )  # fmt: skip


def ray(flags: argparse.Namespace, steps: list):
    """Tasks of the Ray cluster that this process belongs to."""
    from datatrove.executor.ray import RayPipelineExecutor

    return RayPipelineExecutor(steps, flags.tasks, flags.workers, logging_dir=logs(flags))


def logs(flags: argparse.Namespace) -> str:
    return f"{flags.output_dir}/logs"


EXECUTORS = {"local": local, "slurm": slurm, "ray": ray}

if __name__ == "__main__":
    run_main(main)
