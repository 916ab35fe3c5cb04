"""`acorn resume RUN_DIR [--checkpoint last|best|checkpoint-N] [--flag value …]`: continue a run of either kind."""

import argparse
import sys
from pathlib import Path

from .config.command_line import given_values, recipe_parser
from .config.recipe import Recipe
from .config.values import coerce
from .run import open_run
from .system.addresses import public_name
from .system.errors import UserError, quiet_libraries, run_main
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
    run.go_on(wanted.checkpoint, wanted.fresh_state)


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


if __name__ == "__main__":
    run_main(main)
