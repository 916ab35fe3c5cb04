"""`acorn tokenizer [RECIPE] [--flag value …]`: train a byte, character or BPE tokenizer on a text."""

from pathlib import Path

from .config.command_line import given_values, recipe_of, recipe_parser
from .config.recipe import Recipe
from .data.sources import named_sources, read_documents
from .data.tokenizers import build_tokenizer
from .system.errors import quiet_libraries, run_main
from .system.files import new_directory
from .system.shell import shell

EXAMPLES = """  acorn tokenizer --tokenizer bpe --tokenizer_vocab_size 8192 --text_files my.txt --output_dir my_bpe
  acorn tokenizer quickstart"""


def main(argv: list[str] | None = None) -> None:
    """Train a tokenizer on the text of a recipe or of flags, and save it to --output_dir for transformers."""
    quiet_libraries()
    takes = ("[RECIPE]", "shipped recipe or YAML file; without one, the flags name a text and a tokenizer")
    parser = recipe_parser("tokenizer", main.__doc__, EXAMPLES, sections=("data",), takes=takes)
    flags = parser.parse_args(argv)
    if flags.recipe is None and given_values(flags):  # flags alone say what to do
        recipe = Recipe(name="text")
        recipe.update(given_values(flags))
    else:
        recipe = recipe_of(flags, "tokenizer")
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


if __name__ == "__main__":
    run_main(main)
