"""`acorn finetune RECIPE-OR-MODEL [--flag value …]`: teach a pretrained model a text or a chat."""

import sys

import numpy as np

from training.data.corpus import Corpus
from training.system.errors import UserError, quiet_libraries, run_main

from .arguments import load_finetune_recipe
from .data import Example, Examples
from .run import FinetuneRun

PREVIEWED = 60  # tokens of a text


def main(argv: list[str] | None = None) -> None:
    """Finetune a model."""
    argv = sys.argv[1:] if argv is None else argv
    if "--resume" in argv:
        raise UserError("--resume: a run of any kind goes on with `acorn resume RUN_DIR`")
    quiet_libraries()
    recipe = load_finetune_recipe(argv)
    run = FinetuneRun(recipe)
    if "--preview" not in argv:
        run.start()
        return
    run.check()
    run.open_data()
    print(preview(example_of(run.corpus), run.corpus.tokenizer))


def example_of(corpus: Corpus | Examples) -> Example:
    """The first training example, or the beginning of a text."""
    if isinstance(corpus, Examples):
        return corpus.train[0]
    tokens = corpus.tokens("train")
    ids = tokens.sequence(0, min(PREVIEWED, len(tokens)))
    return Example(ids, np.ones(len(ids), dtype=bool), "text, where an end-of-text token begins the next document")


def preview(example: Example, tokenizer) -> str:
    """The example token by token, with a mark at those that count in the loss."""
    lines = [f"{example.where}: {len(example.ids)} tokens, {int(example.counts[1:].sum())} of them in the loss (●)", ""]
    for number, (token, counted) in enumerate(zip(example.ids.tolist(), example.counts, strict=True)):
        mark = "●" if counted and number else " "
        lines.append(f"  {number:>5}  {token:>7}  {mark}  {tokenizer.decode([token])!r}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
