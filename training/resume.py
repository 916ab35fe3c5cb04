"""`acorn resume RUN_DIR [--checkpoint last|best|checkpoint-N] [--flag value …]`: continue a run."""

import argparse
import shlex
import sys
from pathlib import Path

from modeling import GPTConfig, GPTForCausalLM

from .agreement import first_decides
from .checkpoints import find_checkpoint
from .errors import UserError, quiet_libraries, run_main
from .help import wants_help
from .lock import claimed
from .processes import one_process_first
from .recipe import Recipe, load_run_recipe, parse_flags
from .run import build_model, corpus_of_run, run

# What would make it another run: the state of a checkpoint belongs to these.
FIXED_TRAINING = ("optimizer", "seed", "output_dir")
CHANGEABLE_MODEL = ("block_size", "max_position_embeddings", "attn_implementation")


def main(argv: list[str] | None = None) -> None:
    """Continue a run from its last, its best or a named checkpoint, or from its beginning where it has none yet."""
    if wants_help("resume", argv):
        return
    quiet_libraries()
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-"):
        raise UserError("acorn resume needs a RUN_DIR, such as runs/quickstart")
    run_dir = Path(argv[0])
    recipe = load_run_recipe(run_dir)
    wanted, flags = split_checkpoint_flag(argv[1:])
    lay_over(recipe, parse_flags(flags))
    recipe.training["output_dir"] = str(run_dir)
    recipe.command += f" && {shlex.join(['acorn', 'resume', *argv])}"
    args = recipe.training_arguments()
    with claimed(run_dir, args):
        checkpoint = first_decides(args, lambda: find_checkpoint(run_dir, wanted))
        corpus = one_process_first(args, lambda: corpus_of_run(recipe), "prepare")
        if args.process_index == 0:
            where = f"from {checkpoint.name}" if checkpoint else "from its beginning: it has no checkpoint yet"
            print(f"resuming {run_dir} {where}")
        if checkpoint is None:
            run(recipe, build_model(recipe, corpus, args), corpus, args)
        else:
            run(recipe, load_model(checkpoint, recipe), corpus, args, checkpoint=str(checkpoint))


def split_checkpoint_flag(argv: list[str]) -> tuple[str, list[str]]:
    """The value of --checkpoint (default: last), and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint", default="last")
    known, others = parser.parse_known_args(argv)
    return known.checkpoint, others


def lay_over(recipe: Recipe, flags: dict[str, dict]) -> None:
    """Change what can change; refuse what would make it another run."""
    fixed = [key for key in flags.get("training", {}) if key in FIXED_TRAINING]
    fixed += [key for key in flags.get("model", {}) if key not in CHANGEABLE_MODEL]
    fixed += list(flags.get("data", {}))
    if fixed:
        raise UserError(f"--{fixed[0]} cannot change in a run that has begun: start another with `acorn pretrain`")
    before = recipe.model_config().max_position_embeddings
    recipe.update(flags)
    tokens = recipe.training.get("tokens_per_step")
    if tokens and "tokens_per_step" not in flags.get("training", {}):
        # another context: the same windows a step, of another length
        recipe.training["tokens_per_step"] = tokens // before * recipe.model_config().max_position_embeddings


def load_model(checkpoint: Path, recipe: Recipe) -> GPTForCausalLM:
    """The checkpoint's model, with a changed context length or attention backend if the flags say so."""
    names = {"block_size": "max_position_embeddings"}
    changes = {names.get(key, key): recipe.model[key] for key in CHANGEABLE_MODEL if key in recipe.model}
    config = GPTConfig.from_pretrained(checkpoint)
    context = changes.get("max_position_embeddings", config.max_position_embeddings)
    if config.position_encoding == "learned" and context != config.max_position_embeddings:
        raise UserError(
            f"block_size={context}: learned positions are fixed at {config.max_position_embeddings}; "
            "only rope, sinusoidal and none can change it"
        )
    return GPTForCausalLM.from_pretrained(checkpoint, **changes)


if __name__ == "__main__":
    run_main(main)
