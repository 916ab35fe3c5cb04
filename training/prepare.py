"""`acorn prepare RECIPE [--flag value …]`: turn a text into shards of tokens."""

from .config.command_line import load_recipe
from .data.preparation import prepare
from .data.streaming import is_streamed, refuse_stream_options
from .system.errors import quiet_libraries, run_main
from .system.shell import shell

ABOUT = "Turn the text of a recipe into token shards; `acorn pretrain` does this by itself, too."
EXAMPLES = "  acorn prepare quickstart --text_files my_texts/ --tokenizer bpe --tokenizer_vocab_size 4096"


def main(argv: list[str] | None = None) -> None:
    """Prepare the text of a recipe and say where its tokens lie."""
    quiet_libraries()
    recipe = load_recipe("prepare", argv, about=ABOUT, examples=EXAMPLES, sections=("data",))
    refuse_stream_options(recipe.data_arguments())
    corpus = prepare(recipe.data_arguments(), name=recipe.name, check_hashes=True)
    print(corpus.summary())
    command = recipe.command.replace("prepare", "pretrain", 1)  # the same words find the same tokens
    streamed = is_streamed(recipe.data_arguments())
    print(f"Type next: {command}" + (f" {shell(data_dir=corpus.directory)}" if streamed else ""))


if __name__ == "__main__":
    run_main(main)
