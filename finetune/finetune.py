"""`acorn finetune RECIPE-OR-MODEL [--flag value …]`: teach a pretrained model a text or a chat."""

import argparse
import shlex
import sys
from pathlib import Path

from training.agreement import first_decides
from training.checkpoints import find_checkpoint
from training.errors import UserError, quiet_libraries, run_main
from training.files import refuse_used
from training.lock import claimed
from training.recipe import load_run_recipe, parse_flags

from .arguments import FinetuneRecipe, load_finetune_recipe
from .conversations import preview
from .data import Examples
from .help import help_text
from .run import prepare_data, run
from .trainer import FinetuneTrainer

# What a run that has begun may not change: the state of a checkpoint belongs to it.
FIXED_TRAINING = ("optimizer", "seed", "output_dir")
PREVIEWED = 60  # tokens of a text


def main(argv: list[str] | None = None) -> None:
    """Finetune a model, or go on with a finetuning run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return
    quiet_libraries()
    own, rest = split_own_flags(argv)
    if own.resume is not None:
        go_on(Path(own.resume), own.checkpoint, rest, argv)
        return
    recipe = load_finetune_recipe(rest)
    args = recipe.training_arguments()
    if own.preview:
        show(recipe, args)
        return
    first_decides(args, lambda: refuse_used(recipe.output_dir, FinetuneTrainer.resume_command))
    run(recipe, args, prepare_data(recipe, args))


def split_own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of the verb itself, and what is the recipe's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    parser.add_argument("--checkpoint", default="last")
    parser.add_argument("--preview", action="store_true")
    try:
        return parser.parse_known_args(argv)
    except SystemExit as error:  # --resume without a value
        raise UserError("--resume and --checkpoint need a value: acorn finetune --resume RUN_DIR") from error


def go_on(run_dir: Path, wanted: str, flags: list[str], argv: list[str]) -> None:
    """Continue a run from its last, its best or a named checkpoint, or from its beginning where it has none yet."""
    recipe = load_run_recipe(run_dir, FinetuneRecipe)
    changes = parse_flags(flags, FinetuneRecipe)
    fixed = [key for key in changes.get("training", {}) if key in FIXED_TRAINING]
    fixed += [key for section in ("model", "data", "adapter") for key in changes.get(section, {})]
    if fixed:
        raise UserError(f"--{fixed[0]} cannot change in a run that has begun: start another with `acorn finetune`")
    recipe.update(changes)
    recipe.training["output_dir"] = str(run_dir)
    recipe.command += f" && {shlex.join(['acorn', 'finetune', *argv])}"
    args = recipe.training_arguments()
    with claimed(run_dir, args):
        checkpoint = first_decides(args, lambda: find_checkpoint(run_dir, wanted))
        if args.process_index == 0:
            where = f"from {checkpoint.name}" if checkpoint else "from its beginning: it has no checkpoint yet"
            print(f"resuming {run_dir} {where}")
        run(recipe, args, prepare_data(recipe, args, is_resumed=True), None if checkpoint is None else str(checkpoint))


def show(recipe: FinetuneRecipe, args) -> None:
    """Print one training example token by token, with a mark at what counts in the loss."""
    prepared = prepare_data(recipe, args)
    if isinstance(prepared.material, Examples):
        print(preview(prepared.material.train[0], prepared.tokenizer))
        return
    tokens = prepared.material.tokens("train")
    ids = tokens.window(0, min(PREVIEWED, len(tokens))).tolist()
    print("text: every token counts in the loss (●); an end-of-text token begins the next document")
    for number, token in enumerate(ids):
        print(f"  {number:>5}  {token:>7}  ●  {prepared.tokenizer.decode([token])!r}")


if __name__ == "__main__":
    run_main(main)
