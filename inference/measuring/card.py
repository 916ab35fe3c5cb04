"""Results of an evaluation as a model card holds them, for the Hub to show."""

import argparse
import math
import sys
from pathlib import Path

from huggingface_hub import EvalResult

from training.config.publishing import is_hub_id
from training.data.sources import PYTHON_STDLIB
from training.share.model_card import METRICS, add_results
from training.share.report import card_of
from training.share.uploads import refuse_no_model
from training.system.checkpoints import is_finished, run_of, step_of
from training.system.errors import UserError
from training.system.files import write_whole
from training.system.run_files import relist
from training.system.shell import shell

from .texts import Measured

HOW = ("block_size", "stride", "bf16")  # flags that change a figure


def check_card(flags: argparse.Namespace) -> None:
    """Refuse, before anything is measured, what has no card to write into, and results that no card should hold."""
    directory = Path(flags.model)
    if not directory.is_dir():
        raise UserError(f"--update_card: {flags.model} is no directory here; evaluate a copy, and `acorn push` it")
    refuse_no_model(directory)
    if flags.limit is not None:
        raise UserError(
            "--update_card: results on a part of the documents (--limit) say nothing; leave one of them out"
        )
    run_dir = run_of(directory)
    if run_dir is not None and run_dir != directory and step_of(directory) >= 0:
        raise UserError(f"--update_card: {directory} is a checkpoint, whose card a push makes; name the run, {run_dir}")
    if run_dir == directory and not is_finished(directory):
        resume = shell("acorn", "resume", directory)
        raise UserError(f"--update_card: the run in {directory} is not finished, and has no card yet: `{resume}`")
    add_results(card_of(directory), directory.name, [])


def update_card(directory: Path, results: list[EvalResult]) -> None:
    """Write the results into the directory's card; the rest of it stays."""
    write_whole(directory / "README.md", add_results(card_of(directory), directory.absolute().name, results))
    relist(directory, "README.md")
    push = shell("acorn", "push", directory, "YOU/NAME", "--dry_run")
    print(f"The results are in {directory / 'README.md'}. Next:\n  {push}", file=sys.stderr)


def text_results(flags: argparse.Namespace, measured: Measured, results: dict) -> list[EvalResult]:
    """The figures of a text."""
    how = {name: getattr(flags, name) for name in HOW if getattr(flags, name)}
    is_on_hub = is_hub_id(flags.dataset) and flags.dataset != PYTHON_STDLIB
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=flags.dataset if is_on_hub else "text",
            dataset_name=measured.name[:200],
            dataset_config=flags.dataset_config if is_on_hub else measured.name[:200],
            dataset_split=flags.dataset_split if is_on_hub else None,
            metric_type=kind,
            metric_name=words,
            metric_value=round(results[name], 6),
            metric_args=how or None,
        )
        for name, (kind, words, _) in METRICS.items()
        if math.isfinite(results[name])
    ]
