"""`acorn prepare RECIPE [--flag value …]`: turn a text into shards of tokens."""

from .corpus import prepare, summary
from .errors import quiet_libraries, run_main
from .help import wants_help
from .recipe import load_recipe


def main(argv: list[str] | None = None) -> None:
    """Prepare the text of a recipe and say where its tokens lie."""
    if wants_help("prepare", argv):
        return
    quiet_libraries()
    recipe = load_recipe("prepare", argv)
    corpus = prepare(recipe.data_arguments(), name=recipe.name)
    print(summary(corpus))
    print(f"Type next: {recipe.command.replace('prepare', 'pretrain', 1)}")  # the same words find the same tokens


if __name__ == "__main__":
    run_main(main)
