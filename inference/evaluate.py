"""`acorn evaluate MODEL [--text_files …]`: the losses of a model on a whole text, and nothing else."""

from pathlib import Path

from training.config.recipe import load_run_recipe
from training.data.corpus import Corpus
from training.data.dataset import EvaluationRows
from training.data.tokenizers import encoding_hash
from training.measuring import measure, window_of
from training.run import corpus_of_run
from training.system.errors import UserError, run_main


def main(argv: list[str] | None = None) -> None:
    """Print the metrics as one JSON line."""
    measure(argv, held_out)


def held_out(flags, model, tokenizer) -> tuple[EvaluationRows, int, int]:
    """(rows, tokens that count, bytes) of the validation split of the model's run."""
    window = window_of(flags, model)
    tokens, num_bytes = validation_tokens(Path(flags.model), tokenizer)
    return EvaluationRows(tokens, window), len(tokens) - 1, num_bytes


def validation_tokens(directory: Path, tokenizer):
    """The validation split of the run that `directory`, a run or one of its checkpoints, belongs to."""
    run_dir = directory if (directory / "recipe.yaml").is_file() else directory.parent
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(
            f"{directory} is not a run directory, so it has no validation split; give --text_files or --dataset"
        )
    corpus: Corpus = corpus_of_run(load_run_recipe(run_dir), run_dir)
    if encoding_hash(tokenizer) != encoding_hash(corpus.tokenizer):
        raise UserError(
            f"{directory}: its tokenizer is not the one that {corpus.directory} was made with; "
            "evaluate on text instead (--text_files)"
        )
    return corpus.tokens("validation"), corpus.manifest["splits"]["validation"]["bytes"]


if __name__ == "__main__":
    run_main(main)
