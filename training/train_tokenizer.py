"""`acorn tokenizer [RECIPE] [--flag value …]`: train a byte, character or BPE tokenizer on a text."""

import sys
from pathlib import Path

from .config.help import wants_help
from .config.recipe import Recipe, load_recipe, parse_flags
from .data.sources import named_sources, read_documents
from .data.tokenizers import build_tokenizer
from .system.errors import quiet_libraries, run_main
from .system.files import new_directory
from .system.shell import shell


def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer of a recipe on its text, and save it as a Hugging Face tokenizer."""
    if wants_help("tokenizer", argv):
        return
    quiet_libraries()
    recipe = recipe_or_flags(sys.argv[1:] if argv is None else argv)
    data = recipe.data_arguments()
    directory = Path(recipe.training.get("output_dir") or f"tokenizers/{recipe.name}")
    with new_directory(directory) as folder:  # whole or not at all: half a tokenizer would bar the way of the next
        texts = (document.text for document in read_documents(data))  # read once
        tokenizer = build_tokenizer(data.tokenizer, lambda: texts, data.tokenizer_vocab_size)
        if named_sources(data):
            next(texts, None)  # one that is made without a text reads none: what is named must still be there
        tokenizer.save_pretrained(folder)
    print(f"{directory}: a {data.tokenizer} tokenizer, vocabulary {len(tokenizer):,}.")
    print(f"Type next: {shell('acorn', 'prepare', 'RECIPE', tokenizer=directory)}")


def recipe_or_flags(argv: list[str]) -> Recipe:
    """Return the recipe that is named first, or, where flags alone say what to do, an empty one with them."""
    if not argv or not argv[0].startswith("--"):
        return load_recipe("tokenizer", argv)
    recipe = Recipe(name="text")
    recipe.update(parse_flags(argv))
    return recipe


if __name__ == "__main__":
    run_main(main)
