"""`acorn prepare RECIPE [--flag value …]`: turn a text into shards of tokens."""

from .config.help import wants_help
from .config.recipe import load_recipe
from .data.corpus import prepare, summary
from .data.streaming import is_streamed, refuse_stream_options
from .system.errors import quiet_libraries, run_main
from .system.shell import shell


def main(argv: list[str] | None = None) -> None:
    """Prepare the text of a recipe and say where its tokens lie."""
    if wants_help("prepare", argv):
        return
    quiet_libraries()
    recipe = load_recipe("prepare", argv)
    refuse_stream_options(recipe.data_arguments())
    corpus = prepare(recipe.data_arguments(), name=recipe.name, check_shards=True)
    print(summary(corpus))
    command = recipe.command.replace("prepare", "pretrain", 1)  # the same words find the same tokens
    streamed = is_streamed(recipe.data_arguments())
    print(f"Type next: {command}" + (f" {shell(data_dir=corpus.directory)}" if streamed else ""))


if __name__ == "__main__":
    run_main(main)
