"""`acorn resume RUN_DIR [--checkpoint last|best|checkpoint-N] [--flag value …]`: continue a run of either kind."""

import argparse
import sys
from pathlib import Path

from .config.command_line import given_values, recipe_parser
from .config.recipe import Recipe
from .config.values import coerce
from .run import open_run
from .system.addresses import public_name
from .system.checkpoints import find_checkpoint
from .system.distributed import check_writer, from_main_process
from .system.errors import UserError, quiet_libraries, run_main
from .system.lock import claimed
from .system.run_files import missing_state
from .system.shell import shell


def main(argv: list[str] | None = None) -> None:
    """Continue a run from its last, its best or a named checkpoint, or from its beginning where it has none yet."""
    argv = sys.argv[1:] if argv is None else list(argv)
    quiet_libraries()
    run = open_run(Path(argv[0])) if argv and not argv[0].startswith("-") else None
    kind = Recipe if run is None else run.recipe_type
    wanted = parse(argv, kind)
    if run is None:
        raise UserError("acorn resume needs a RUN_DIR, such as runs/quickstart")
    flags = given_values(wanted, kind)
    give_addresses_again(run.recipe, flags.get("data", {}))
    run.recipe.command += f" && {shell('acorn', 'resume', *map(public_name, argv))}"
    run.change(flags)
    run.check()
    with claimed(run.directory, run.args):
        checkpoint = from_main_process(run.args, lambda: choose(run.directory, wanted, run.args))
        if run.is_main_process:
            where = f"from {checkpoint.name}" if checkpoint else "from its beginning: it has no checkpoint yet"
            print(f"resuming {run.directory} {where}", flush=True)
        run.open_data(is_resumed=True)
        run.train(checkpoint)


def parse(argv: list[str], kind: type[Recipe]) -> argparse.Namespace:
    """The verb's flags, and those of the run's kind of recipe."""
    about = "Continue a run exactly where it stopped; flags change what can change, such as --max_steps."
    examples = "  acorn resume runs/quickstart --max_steps 1200"
    takes = ("RUN_DIR", "directory of a run; `acorn resume RUN_DIR --help` shows the flags of that run")
    parser = recipe_parser("resume", about, examples, kind, takes=takes)
    parser.add_argument("--checkpoint", default="last", help="last, best or checkpoint-N")
    switch = {"nargs": "?", "default": False, "const": True, "type": lambda word: coerce("fresh_state", word, bool)}
    parser.add_argument("--fresh_state", help="start from zero the states that the checkpoint lacks", **switch)
    return parser.parse_args(argv)


def give_addresses_again(recipe: Recipe, data: dict) -> None:
    """Take, out of a resume's flags, the run's own files with the queries and users that a recipe does not keep."""
    for key in ("text_files", "data_files"):
        if key in data and [public_name(name) for name in data[key]] == recipe.data.get(key):
            recipe.data[key] = data.pop(key)


def choose(run_dir: Path, wanted: argparse.Namespace, args) -> Path | None:
    """The checkpoint to go on from; one that lacks a part of its state is refused, unless that may start afresh."""
    checkpoint = find_checkpoint(run_dir, wanted.checkpoint)
    if checkpoint is None:
        return None
    check_writer(checkpoint, args)
    missing = " and no ".join(missing_state(checkpoint))
    if missing and not wanted.fresh_state:
        raise UserError(
            f"{checkpoint} holds no {missing} (saved with --save_only_model?), so the run cannot continue exactly; "
            "give --fresh_state true to start them afresh"
        )
    if missing:
        print(f"{checkpoint} holds no {missing}: starting afresh", file=sys.stderr)
    return checkpoint


if __name__ == "__main__":
    run_main(main)
