"""Whole runs in a fraction of a second: a small text, the flags of a tiny model, and readers of a run directory."""

import contextlib
import hashlib
import json
from pathlib import Path
from shlex import split as words

import pytest
import torch
from safetensors.torch import load_file

from modeling import GPTConfig
from training import pretrain, resume
from training.config.command_line import given_values, recipe_parser
from training.config.recipe import Recipe
from training.loop.trainer import GPTTrainer
from training.share.metrics_file import read_metrics
from training.system.errors import UserError

WORDS = [*words("the quick brown fox jumps over a lazy dog, and how vexingly quick daft zebras"), "jump\n"]
# A fixed sequence (a linear congruential generator) of words: some structure to learn, nothing to learn by heart.
PLACES = [0]
for _ in range(1200):
    PLACES.append((PLACES[-1] * 1103515245 + 12345) % 2**31)
TEXT = " ".join(WORDS[(place >> 16) % len(WORDS)] for place in PLACES)

RECIPE = "shakespeare-char-cpu"
CONTEXT, BATCH = 16, 4
TINY = words(
    "--n_layer 2 --n_embd 32 --n_head 2 --block_size 16 --max_steps 8 --eval_steps 4 --per_device_train_batch_size 4 "
    "--tokens_per_step none --warmup_steps 2 --learning_rate 1e-2 --bf16 false --max_new_tokens 8"
)


def tiny_argv(*flags: str, name: str = "run", recipe: str = RECIPE) -> list[str]:
    """What comes after `acorn pretrain` for a tiny run on text.txt; later flags win."""
    return [recipe, *latest("--text_files", "text.txt", *TINY, "--output_dir", name, *flags)]


def parse_flags(argv: list[str], kind: type[Recipe] = Recipe) -> dict[str, dict]:
    """The checked values of a recipe's flags, by section."""
    return given_values(recipe_parser("pretrain", kind=kind).parse_args(["quickstart", *argv]), kind)


def latest(*argv: str) -> list[str]:
    """Words, then flags and their values, each flag once and as it was given last: Acorn takes none twice."""
    flags: dict[str, list[str]] = {"": []}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0]
            name = GPTConfig.attribute_map.get(name, name)  # nanoGPT's name and ours are one flag
            flags.pop(name, None)
            flags[name] = [word]
        else:
            flags[name].append(word)
    return [word for words in flags.values() for word in words]


def write_text(folder: Path, text: str = TEXT, name: str = "text.txt") -> Path:
    """Write the text, so that runs in this folder find it."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def grow(folder: Path, *flags: str, name: str = "run", recipe: str = RECIPE) -> Path:
    """Pretrain in `folder` and return the run directory; the corpus there is prepared once."""
    if not (folder / "text.txt").exists():
        write_text(folder)
    with contextlib.chdir(folder):
        pretrain.main(tiny_argv(*flags, name=name, recipe=recipe))
    return folder / name


def short_of_memory(most_rows: int):
    """A `training_step` for GPTTrainer that runs out of memory at the end of a micro-batch of more rows."""
    train_step = GPTTrainer.training_step

    def step(self, model, inputs, num_items_in_batch=None):
        loss = train_step(self, model, inputs, num_items_in_batch)
        if len(inputs["input_ids"]) > most_rows:
            raise RuntimeError("CUDA out of memory.")
        return loss

    return step


def go_on(run_dir: Path, *flags: str) -> None:
    """Resume a run from the folder that it lies in."""
    with contextlib.chdir(run_dir.parent):
        resume.main([run_dir.name, *flags])


def refused(main, *argv: str) -> str:
    """The one line with which `main` refuses `argv`."""
    with pytest.raises(UserError) as caught:
        main(list(argv))
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors."""
    return load_file(directory / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    """Whether two directories hold the same model, bit for bit."""
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl as they are."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


TIMED = ("tokens_per_second", "mfu", "seconds")


def rows(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl that count, without what the clock says."""
    return [{key: value for key, value in row.items() if key not in TIMED} for row in read_metrics(run_dir)]


def checkpoints(run_dir: Path) -> list[int]:
    """The steps of the checkpoints, in order."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run_dir.glob("checkpoint-*"))


def contents(directory: Path) -> dict[str, str]:
    """Each file below a directory and the hash of what it holds."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
