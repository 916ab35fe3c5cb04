"""`acorn pretrain RECIPE [--flag value …]`: grow a GPT from a text."""

from .config.help import wants_help
from .config.recipe import load_recipe
from .run import Run
from .system.errors import quiet_libraries, run_main


def main(argv: list[str] | None = None) -> None:
    """Pretrain a GPT from a recipe."""
    if wants_help("pretrain", argv):
        return
    quiet_libraries()
    recipe = load_recipe("pretrain", argv)
    recipe.model_config()  # a wrong architecture is refused before any text is read
    Run(recipe).start()


if __name__ == "__main__":
    run_main(main)
