"""`acorn evaluate RUN_DIR` where the run is one of `acorn finetune`: the door sends it here."""

from pathlib import Path

from training.config.recipe import load_run_recipe
from training.measuring import measure, window_of
from training.system.errors import run_main

from .arguments import FinetuneRecipe
from .data import Examples, read_data
from .packing import held_out_rows
from .probe import keeps_documents_apart
from .run import DEFAULT_BLOCK


def main(argv: list[str] | None = None) -> None:
    """Print the figures of the documents that the run held out, or of a text that the flags name."""
    measure(argv, held_out)


def held_out(flags, model, tokenizer) -> tuple:
    """(rows, tokens that count, bytes) of the documents that the run held out."""
    directory = Path(flags.model)
    recipe = load_run_recipe(directory if (directory / "recipe.yaml").is_file() else directory.parent, FinetuneRecipe)
    data = recipe.data_arguments()
    window = window_of(flags, model, data.block_size or min(window_of(flags, model), DEFAULT_BLOCK))
    material = read_data(data, tokenizer, window, recipe.name, is_resumed=True)
    is_packed = data.packing and not has_virtual_tokens(model) and keeps_documents_apart(model, flags.model)
    split = material.manifest["splits"]["validation"]
    counted = split["answer_tokens"] if isinstance(material, Examples) else split["tokens"] - 1
    return held_out_rows(material, window, is_packed), counted, split["bytes"]


def has_virtual_tokens(model) -> bool:
    """Whether positions are taken up by a prompt or prefix adapter, so that none can tell documents apart."""
    return bool(getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0))


if __name__ == "__main__":
    run_main(main)
