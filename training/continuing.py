"""What a run of any kind needs to go on: its recipe and today's flags, a checkpoint, its directory to itself."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .config.recipe import Recipe, load_run_recipe, parse_flags
from .config.values import coerce
from .system.addresses import public_name
from .system.checkpoints import find_checkpoint, missing_state
from .system.distributed import check_writer, from_main_process
from .system.errors import UserError
from .system.lock import claimed
from .system.shell import shell

FIXED_TRAINING = ("optimizer", "seed", "data_seed", "output_dir")  # the state of a checkpoint belongs to these


class Wanted(NamedTuple):
    """What a run is to go on from: a checkpoint's name, and whether its state may be missing."""

    checkpoint: str = "last"
    fresh_state: bool = False


def read_run(argv: list[str], kind: type[Recipe] = Recipe) -> tuple[Path, Recipe, Wanted, dict[str, dict]]:
    """(run directory, its recipe, what it goes on from, checked flags by section) of `acorn resume RUN_DIR …`."""
    if not argv or argv[0].startswith("-"):
        raise UserError("acorn resume needs a RUN_DIR, such as runs/quickstart")
    run_dir = Path(argv[0])
    recipe = load_run_recipe(run_dir, kind)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint", nargs="?", default="last")
    parser.add_argument("--fresh_state", nargs="?", default="false", const="true")
    known, flags = parser.parse_known_args(argv[1:])
    if not known.checkpoint:
        raise UserError("--checkpoint: needs a value: last, best or checkpoint-N")
    recipe.training["output_dir"] = str(run_dir)
    recipe.command += f" && {shell('acorn', 'resume', *map(public_name, argv))}"
    checked = parse_flags(flags, kind)
    give_addresses_again(recipe, checked.get("data", {}))
    return run_dir, recipe, Wanted(known.checkpoint, coerce("fresh_state", known.fresh_state, bool)), checked


def give_addresses_again(recipe: Recipe, data: dict) -> None:
    """Take, out of a resume's flags, the run's own files with the queries and users that a recipe does not keep."""
    for key in ("text_files", "data_files"):
        if key in data and [public_name(name) for name in data[key]] == recipe.data.get(key):
            recipe.data[key] = data.pop(key)


def refuse_fixed(flags: dict[str, dict], verb: str, changeable_model: tuple[str, ...] = ()) -> None:
    """Refuse what would make it another run, which `verb` starts."""
    fixed = [key for key in flags.get("training", {}) if key in FIXED_TRAINING]
    fixed += [key for key in flags.get("model", {}) if key not in changeable_model]
    fixed += [key for section in ("data", "adapter") for key in flags.get(section, {})]
    if fixed:
        raise UserError(f"--{fixed[0]} cannot change in a run that has begun: start another with `acorn {verb}`")


def choose(run_dir: Path, wanted: Wanted, args) -> Path | None:
    """The checkpoint to go on from; one that lacks a part of its state is refused, unless that may start afresh."""
    checkpoint = find_checkpoint(run_dir, wanted.checkpoint)
    if checkpoint is not None:
        check_writer(checkpoint, args)
    missing = [] if checkpoint is None else missing_state(checkpoint)
    if missing and not wanted.fresh_state:
        raise UserError(
            f"{checkpoint} holds no {' and no '.join(missing)} (saved with --save_only_model?), so the run cannot "
            "continue exactly; give --fresh_state true to start them afresh"
        )
    if missing:
        print(f"{checkpoint} holds no {' and no '.join(missing)}: starting afresh", file=sys.stderr)
    return checkpoint


@contextmanager
def taken_up(run_dir: Path, wanted: Wanted, args) -> Iterator[Path | None]:
    """Have the run directory for oneself, and yield the checkpoint to go on from; None where it has none yet."""
    with claimed(run_dir, args):
        checkpoint = from_main_process(args, lambda: choose(run_dir, wanted, args))
        if args.process_index == 0:
            where = f"from {checkpoint.name}" if checkpoint else "from its beginning: it has no checkpoint yet"
            print(f"resuming {run_dir} {where}", flush=True)
        yield checkpoint
