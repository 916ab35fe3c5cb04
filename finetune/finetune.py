"""`acorn finetune RECIPE-OR-MODEL [--flag value …]`: teach a pretrained model a text or a chat."""

import sys

from training.system.distributed import from_main_process
from training.system.errors import UserError, quiet_libraries, run_main
from training.system.files import refuse_used

from .arguments import load_finetune_recipe
from .conversations import preview
from .data import Examples
from .help import help_text
from .run import prepare_data, run

PREVIEWED = 60  # tokens of a text


def main(argv: list[str] | None = None) -> None:
    """Finetune a model."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return
    if "--resume" in argv:
        raise UserError("--resume: a run of any kind goes on with `acorn resume RUN_DIR`")
    quiet_libraries()
    recipe = load_finetune_recipe([word for word in argv if word != "--preview"])
    args = recipe.training_arguments()
    if "--preview" in argv:
        show(recipe, args)
        return
    from_main_process(args, lambda: refuse_used(recipe.output_dir))
    run(recipe, args, prepare_data(recipe, args))


def show(recipe, args) -> None:
    """Print one training example token by token, with a mark at what counts in the loss."""
    prepared = prepare_data(recipe, args)
    if isinstance(prepared.material, Examples):
        print(preview(prepared.material.train[0], prepared.tokenizer))
        return
    tokens = prepared.material.tokens("train")
    ids = tokens.window(0, min(PREVIEWED, len(tokens))).tolist()
    print("text: every token counts in the loss (●); an end-of-text token begins the next document")
    for number, token in enumerate(ids):
        print(f"  {number:>5}  {token:>7}  ●  {prepared.tokenizer.decode([token])!r}")


if __name__ == "__main__":
    run_main(main)
