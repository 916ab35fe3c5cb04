"""`acorn tokenizer RECIPE [--flag value …]`: train a byte, character or BPE tokenizer on a text."""

from pathlib import Path

from .errors import UserError, run_main
from .help import wants_help
from .recipe import load_recipe
from .sources import documents
from .tokenizers import build_tokenizer


def main(argv: list[str] | None = None) -> None:
    """Train the tokenizer of a recipe on its text, and save it as a Hugging Face tokenizer."""
    if wants_help("tokenizer", argv):
        return
    recipe = load_recipe("tokenizer", argv)
    data = recipe.data_arguments()
    directory = Path(recipe.training.get("output_dir") or f"tokenizers/{recipe.name}")
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"output_dir={str(directory)!r}: is not empty; name another --output_dir")
    texts = (text for _, text in documents(data))
    tokenizer = build_tokenizer(data.tokenizer, lambda: texts, data.tokenizer_vocab_size)
    tokenizer.save_pretrained(directory)
    print(f"{directory}: a {data.tokenizer} tokenizer, vocabulary {len(tokenizer):,}.")
    print(f"Type next: acorn prepare RECIPE --tokenizer {directory}")


if __name__ == "__main__":
    run_main(main)
