"""`acorn prepare RECIPE [--flag value …]`: turn a text into shards of tokens."""

import sys

from .config.command_line import recipe_of, recipe_parser
from .config.recipe import Recipe
from .data.corpus import Corpus
from .data.dataset import LANES
from .data.preparation import prepare
from .data.streaming import is_streamed, refuse_stream_options
from .loop.lanes import training_rows
from .system.addresses import public_name
from .system.errors import quiet_libraries, run_main
from .system.shell import shell

ABOUT = "Turn the text of a recipe into token shards; `acorn pretrain` does this by itself, too."
EXAMPLES = """  acorn prepare quickstart --text_files my_texts/ --tokenizer bpe --tokenizer_vocab_size 4096
  acorn prepare stdlib-xl --preview                                  what training will read, lane by lane"""
SHOWN_LANES, SHOWN_STEPS = 3, 4  # of a preview
SHOWN_CHARACTERS = 44  # of each end of a row


def main(argv: list[str] | None = None) -> None:
    """Prepare the text of a recipe and say where its tokens lie."""
    argv = sys.argv[1:] if argv is None else list(argv)
    quiet_libraries()
    parser = recipe_parser("prepare", ABOUT, EXAMPLES, sections=("data",))
    parser.add_argument("--preview", action="store_true", help="show the first sequences that training will read")
    flags = parser.parse_args(argv)
    recipe = recipe_of(flags, "prepare")
    refuse_stream_options(recipe.data_arguments())
    corpus = prepare(recipe.data_arguments(), name=recipe.name, check_hashes=True)
    print(corpus.summary())
    if flags.preview:
        print(preview(recipe, corpus))
    words = [public_name(word) for word in argv if word != "--preview"]
    streamed = is_streamed(recipe.data_arguments())  # the same words find the same tokens
    print(f"Type next: {shell('acorn', 'pretrain', *words, **({'data_dir': corpus.directory} if streamed else {}))}")


def preview(recipe: Recipe, corpus: Corpus) -> str:
    """The first rows of training, both ends of each: lanes one after the other, each over some steps."""
    args, data = recipe.training_arguments(), recipe.data_arguments()
    context = recipe.model_config().max_position_embeddings
    per_step = args.share_out(context, processes=1)
    lanes = min(SHOWN_LANES, per_step)
    rows = training_rows(corpus.tokens("train"), data, args, context, per_step, per_step * SHOWN_STEPS)
    if data.sampling != LANES:
        texts = [corpus.tokenizer.decode(row["input_ids"]) for row in rows.__getitems__(range(SHOWN_STEPS))]
        lines = [f"  sequence {number}: {_ends(text)}" for number, text in enumerate(texts, start=1)]
        return "\n".join([f"{per_step} sequences of {context} tokens a step, sampling {data.sampling}:", *lines])
    lines = [f"{per_step} lanes of {context} tokens a step; each goes on where its step before ended:"]
    for lane in range(lanes):
        for step in range(SHOWN_STEPS):
            row = rows[step * per_step + lane]
            place = f"lane {lane}" if step == 0 else ""
            begins = ", begins" if row["begins"] else ""
            lines.append(f"  {place:<9}step {step + 1}{begins:<8}  {_ends(corpus.tokenizer.decode(row['input_ids']))}")
    return "\n".join(lines)


def _ends(text: str) -> str:
    """The beginning and the end of a text, as Python would write it."""
    if len(text) <= 2 * SHOWN_CHARACTERS:
        return repr(text)
    return f"{text[:SHOWN_CHARACTERS]!r} … {text[-SHOWN_CHARACTERS:]!r}"


if __name__ == "__main__":
    run_main(main)
