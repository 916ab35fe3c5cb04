"""`acorn inspect MODEL --prompt "…"`: attention maps, positions and next tokens of a model, to look at."""

import argparse
from pathlib import Path

from training.model.loading import load_model_and_tokenizer
from training.model.sampling import context_left, prompt_tensor
from training.system.errors import UserError, quiet_libraries, run_main
from training.system.files import check_output
from training.system.flags import FlagParser
from training.system.shell import shell

from .decoding.prompts import read_prompt
from .measuring.attention import Head, Look, in_percent, look_into, name_heads
from .measuring.page import write_page
from .measuring.picture import draw_look
from .measuring.position_tables import no_positions, position_tables

EPILOG = """examples:
  acorn inspect runs/quickstart --prompt "def main(argv):"
  acorn inspect runs/quickstart --prompt FILE:start.txt --output look.html
  acorn inspect gpt2 --prompt "When Mary and John went to the store, John gave a drink to" --layers 5 9 10

A head is named after what at least a third of its attention goes to: the previous token, the first one,
itself, the last 4, an earlier same token, or what followed one ("after a repeat": induction). A prompt that
repeats itself shows the last two."""

WRITERS = {".png": draw_look, ".html": write_page}
MOST_HEADS = 12  # heads that are listed in words


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags."""
    parser = FlagParser(
        prog="acorn inspect",
        description="Draw what a model does with a prompt: the likeliest next tokens after each token, how positions "
        "are told apart, and what every attention head looks at. A .png is one picture, a .html one page.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", help="run directory, checkpoint, model directory, adapter or Hub id")
    add("--prompt", required=True, help="text to look at, FILE:path, or - for standard input")
    add("--output", type=Path, default=Path("inspect.png"), help="file to write: .png or .html")
    add("--layers", type=int, nargs="+", help="layers whose heads are drawn, from 0 (default: all)")
    add("--top_k", type=int, default=5, help="next tokens listed after each token")
    add("--trust_remote_code", action="store_true", help="run model code from the Hub")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the picture, and tell in words what it shows."""
    flags = parse(argv)
    if not 1 <= flags.top_k <= 20:
        raise UserError(f"top_k={flags.top_k}: must be a whole number from 1 to 20")
    check_output("--output", flags.output, tuple(WRITERS))
    prompt = read_prompt(flags.prompt)
    quiet_libraries()
    model, tokenizer = load_model_and_tokenizer(flags.model, trust_remote_code=flags.trust_remote_code)
    ids = prompt_tensor(tokenizer, prompt, context_left(model)).to(model.device)
    look = look_into(model, tokenizer, ids, flags.top_k)
    heads = name_heads(look, chosen_layers(flags.layers, len(look.attention)))
    title = f"{flags.model}: {len(look.tokens)} tokens"
    WRITERS[flags.output.suffix.lower()](
        look, position_tables(model) or no_positions(model), heads, flags.output, title
    )
    print(in_words(look, heads))
    print(f"The {'page' if flags.output.suffix.lower() == '.html' else 'picture'} is in {flags.output}.")
    if flags.output.suffix.lower() != ".html":
        words = ["acorn", "inspect", flags.model, *["--trust_remote_code"] * flags.trust_remote_code]
        page = shell(*words, prompt=flags.prompt, output=flags.output.with_suffix(".html"))
        print(f"As a page to point at:\n  {page}")


def chosen_layers(layers: list[int] | None, count: int) -> list[int]:
    """The layers to draw, in order, each once; refuses those that the model does not have."""
    for layer in layers or []:
        if not 0 <= layer < count:
            raise UserError(f"layers={layer}: the model has {count} layers with attention, from 0 to {count - 1}")
    return sorted(set(layers)) if layers else list(range(count))


def in_words(look: Look, heads: list[Head]) -> str:
    """The likeliest end of the prompt, and the heads that do one thing mostly, the clearest first."""
    best = ", ".join(f"{expected.text} {in_percent(expected.probability)}" for expected in look.expected[-1])
    lines = [f"after {look.tokens[-1]!r}: {best}"]
    if not look.attention:
        lines.append("This model does not give its attention weights, or has layers without any.")
    named = sorted((head for head in heads if head.pattern), key=lambda head: -head.share)
    for head in named[:MOST_HEADS]:
        lines.append(f"layer {head.layer}, head {head.head}: {head.pattern} ({head.share:.0%} of its attention)")
    if len(named) > MOST_HEADS:
        lines.append(f"and {len(named) - MOST_HEADS} more heads, in the picture")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
