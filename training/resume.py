"""`acorn resume RUN_DIR [--checkpoint last|best|checkpoint-N] [--flag value …]`: continue a run."""

import argparse
import shlex
import sys
from pathlib import Path

from modeling import GPTConfig, GPTForCausalLM

from .checkpoints import find_checkpoint
from .errors import UserError, quiet_libraries, run_main
from .help import wants_help
from .recipe import Recipe, load_run_recipe, parse_flags
from .run import corpus_of_run, run

# What would make it another run: the state of a checkpoint belongs to these.
FIXED_TRAINING = ("optimizer", "seed", "output_dir")
CHANGEABLE_MODEL = ("block_size", "max_position_embeddings", "attn_implementation")


def main(argv: list[str] | None = None) -> None:
    """Continue a run from its last, its best or a named checkpoint."""
    if wants_help("resume", argv):
        return
    quiet_libraries()
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0].startswith("-"):
        raise UserError("acorn resume needs a RUN_DIR, such as runs/quickstart")
    run_dir = Path(argv[0])
    recipe = load_run_recipe(run_dir)
    wanted, flags = split_checkpoint_flag(argv[1:])
    checkpoint = find_checkpoint(run_dir, wanted)
    lay_over(recipe, parse_flags(flags))
    recipe.training["output_dir"] = str(run_dir)
    recipe.command += f" && {shlex.join(['acorn', 'resume', *argv])}"
    args = recipe.training_arguments()
    corpus = corpus_of_run(recipe)
    model = load_model(checkpoint, recipe)
    print(f"resuming {run_dir} from {checkpoint.name}")
    run(recipe, model, corpus, args, checkpoint=str(checkpoint))


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
    recipe.update(flags)


def load_model(checkpoint: Path, recipe: Recipe) -> GPTForCausalLM:
    """The checkpoint's model, with a changed context length or attention backend if the flags say so."""
    names = {"block_size": "max_position_embeddings"}
    changes = {names.get(key, key): recipe.model[key] for key in CHANGEABLE_MODEL if key in recipe.model}
    config = GPTConfig.from_pretrained(checkpoint)
    context = changes.get("max_position_embeddings", config.max_position_embeddings)
    if tokens := recipe.training.get("tokens_per_step"):  # another context: the same windows a step, of other length
        recipe.training["tokens_per_step"] = tokens // config.max_position_embeddings * context
    if config.position_encoding == "learned" and context != config.max_position_embeddings:
        raise UserError(
            f"block_size={context}: learned positions are fixed at {config.max_position_embeddings}; "
            "only rope, sinusoidal and none can change it"
        )
    return GPTForCausalLM.from_pretrained(checkpoint, **changes)


if __name__ == "__main__":
    run_main(main)
