"""`acorn pretrain RECIPE [--flag value …]`: grow a GPT from a text."""

from .config.command_line import load_recipe
from .run import Run
from .system.errors import quiet_libraries, run_main

EXAMPLES = "  acorn pretrain shakespeare-char-cpu --text_files my.txt --max_steps 500 --output_dir runs/mine"


def main(argv: list[str] | None = None) -> None:
    """Pretrain a GPT from a recipe."""
    quiet_libraries()
    recipe = load_recipe("pretrain", argv, about=main.__doc__, examples=EXAMPLES)
    recipe.model_config()  # a wrong architecture is refused before any text is read
    Run(recipe).start()


if __name__ == "__main__":
    run_main(main)
