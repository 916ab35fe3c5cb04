"""`acorn resume RUN_DIR [--checkpoint last|best|checkpoint-N] [--flag value …]`: continue a run."""

import sys
from pathlib import Path

from modeling import GPTConfig, GPTForCausalLM

from .config.help import wants_help
from .config.recipe import Recipe
from .continuing import read_run, refuse_fixed, taken_up
from .costs import refuse_too_large
from .run import build_model, by_the_first, corpus_of_run, run
from .system.checkpoints import reading
from .system.errors import UserError, quiet_libraries, run_main

CHANGEABLE_MODEL = ("block_size", "max_position_embeddings", "attn_implementation")


def main(argv: list[str] | None = None) -> None:
    """Continue a run from its last, its best or a named checkpoint, or from its beginning where it has none yet."""
    if wants_help("resume", argv):
        return
    quiet_libraries()
    run_dir, recipe, wanted, flags = read_run(sys.argv[1:] if argv is None else list(argv))
    lay_over(recipe, flags)
    args = recipe.training_arguments()
    refuse_too_large(recipe, args)
    with taken_up(run_dir, wanted, args) as checkpoint:
        corpus = by_the_first(args, lambda: corpus_of_run(recipe, run_dir))
        if checkpoint is None:
            run(recipe, build_model(recipe, corpus, args), corpus, args)
        else:
            run(recipe, load_model(checkpoint, recipe), corpus, args, checkpoint=str(checkpoint))


def lay_over(recipe: Recipe, flags: dict[str, dict]) -> None:
    """Change what can change; refuse what would make it another run."""
    refuse_fixed(flags, "pretrain", CHANGEABLE_MODEL)
    before = recipe.model_config().max_position_embeddings
    recipe.update(flags)
    recipe.check()
    tokens = recipe.training.get("tokens_per_step")
    if tokens and "tokens_per_step" not in flags.get("training", {}):
        # another context: the same windows a step, of another length
        recipe.training["tokens_per_step"] = tokens // before * recipe.model_config().max_position_embeddings


def load_model(checkpoint: Path, recipe: Recipe) -> GPTForCausalLM:
    """The checkpoint's model, with a changed context length or attention backend if the flags say so."""
    names = {"block_size": "max_position_embeddings"}
    changes = {names.get(key, key): recipe.model[key] for key in CHANGEABLE_MODEL if key in recipe.model}
    with reading(checkpoint, "config.json"):
        config = GPTConfig.from_pretrained(checkpoint)
    context = changes.get("max_position_embeddings", config.max_position_embeddings)
    if config.position_encoding == "learned" and context != config.max_position_embeddings:
        raise UserError(
            f"block_size={context}: learned positions are fixed at {config.max_position_embeddings}; "
            "only rope, sinusoidal and none can change it"
        )
    with reading(checkpoint, "weights"):
        return GPTForCausalLM.from_pretrained(checkpoint, **changes)


if __name__ == "__main__":
    run_main(main)
