"""`acorn resume RUN_DIR` where the run is one of `acorn finetune`: the door sends it here."""

import sys

from training.continuing import read_run, refuse_fixed, taken_up
from training.system.errors import quiet_libraries, run_main

from .arguments import FinetuneRecipe
from .run import prepare_data, run


def main(argv: list[str] | None = None) -> None:
    """Go on with a finetuning run from its last, its best or a named checkpoint, or from its beginning."""
    quiet_libraries()
    run_dir, recipe, wanted, flags = read_run(sys.argv[1:] if argv is None else list(argv), FinetuneRecipe)
    refuse_fixed(flags, "finetune")
    recipe.update(flags)
    args = recipe.training_arguments()
    with taken_up(run_dir, wanted, args) as checkpoint:
        run(recipe, args, prepare_data(recipe, args, is_resumed=True), None if checkpoint is None else str(checkpoint))


if __name__ == "__main__":
    run_main(main)
