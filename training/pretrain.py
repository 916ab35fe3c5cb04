"""`acorn pretrain RECIPE [--flag value …]`: grow a GPT from a text."""

from .config.help import wants_help
from .config.recipe import load_recipe
from .costs import refuse_too_large
from .data.corpus import summary
from .run import build_model, by_the_first, open_corpus, run
from .system.distributed import from_main_process
from .system.errors import quiet_libraries, run_main
from .system.files import refuse_used


def main(argv: list[str] | None = None) -> None:
    """Pretrain a GPT from a recipe."""
    if wants_help("pretrain", argv):
        return
    quiet_libraries()
    recipe = load_recipe("pretrain", argv)
    recipe.model_config()  # a wrong architecture is refused before any text is read
    args = recipe.training_arguments()
    refuse_too_large(recipe, args)
    from_main_process(args, lambda: refuse_used(recipe.output_dir))
    corpus = by_the_first(args, lambda: open_corpus(recipe))
    print(corpus.summary() if corpus.directory is None else summary(corpus)) if args.process_index == 0 else None
    run(recipe, build_model(recipe, corpus, args), corpus, args)


if __name__ == "__main__":
    run_main(main)
