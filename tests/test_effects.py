"""What is said to take effect does: a run with another value is another run."""

import os
import shutil
from pathlib import Path
from shlex import split as words

import pytest
import torch

from training.system.run_files import STATE

from .test_fields import TAKES_EFFECT
from .tiny_runs import checkpoints, grow, metrics, same_weights

SHORT = words("--max_steps 4 --eval_steps 2 --warmup_steps 0 --max_new_tokens 0 --dropout 0.1 --use_cpu true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs lie, side by side."""
    return tmp_path_factory.mktemp("effects")


@pytest.fixture(scope="module")
def plain(folder):
    """The run that the others differ from."""
    return grow(folder, *SHORT, name="plain")


def another(folder: Path, flags: str) -> Path:
    run = folder / "another"
    shutil.rmtree(run, ignore_errors=True)
    return grow(folder, *SHORT, *words(flags), name="another")


@pytest.mark.parametrize(
    "flags",
    [
        "--learning_rate 2e-2",
        "--data_seed 9",
        "--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs '{num_decay_steps: 0.5}'",
    ],
)
def test_the_weights_are_others(folder, plain, flags: str) -> None:
    run = another(folder, flags)
    assert checkpoints(run)[-1] == checkpoints(plain)[-1] == 4
    assert not same_weights(run / "checkpoint-4", plain / "checkpoint-4")
    assert flags.split()[0].removeprefix("--") in TAKES_EFFECT


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--warmup_steps 3",
        "--weight_decay 0.9",
        "--adam_beta1 0.5",
        "--adam_beta2 0.5",
        "--adam_epsilon 0.1",
        "--max_grad_norm 0.01",
        "--seed 9",
        "--lr_scheduler_type linear",
        "--lr_scheduler_type polynomial --lr_scheduler_kwargs '{power: 2.0}'",
        "--lr_scheduler_type reduce_lr_on_plateau",
        "--optimizer muon",
        "--tokens_per_step 128",
        "--label_smoothing_factor 0.2",
    ],
)
def test_the_weights_are_others_too(folder, plain, flags: str) -> None:
    assert not same_weights(another(folder, flags) / "checkpoint-4", plain / "checkpoint-4")


@pytest.mark.parametrize(
    ("flags", "steps", "evaluated"),
    [
        ("--eval_steps 1 --save_steps 2", [2, 4], [1, 2, 3, 4]),
        pytest.param("--save_steps 1 --save_total_limit 1", [4], [2, 4], marks=pytest.mark.slow),
        pytest.param("--save_strategy no", [], [2, 4], marks=pytest.mark.slow),
        ("--eval_strategy no --save_steps 3", [3, 4], [4]),
        pytest.param("--eval_delay 3", [2, 4], [4], marks=pytest.mark.slow),
        pytest.param("--eval_on_start true", [2, 4], [0, 2, 4], marks=pytest.mark.slow),
    ],
)
def test_the_intervals_are_others(folder, plain, flags: str, steps: list[int], evaluated: list[int]) -> None:
    run = another(folder, flags)
    assert [row["step"] for row in metrics(run)] == evaluated
    assert set(checkpoints(run)) == set(steps) or (flags.startswith("--save_steps 1") and checkpoints(run)[-1] == 4)
    assert [row["step"] for row in metrics(plain)] == [2, 4]


@pytest.mark.slow
def test_a_checkpoint_of_the_model_alone(folder, plain) -> None:
    run = another(folder, "--save_only_model true")
    names = set(os.listdir(plain / "checkpoint-4")) - set(os.listdir(run / "checkpoint-4"))
    assert "optimizer.pt" in names and STATE not in names


@pytest.mark.slow
def test_determinism_is_asked_for(folder, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, **kwargs: seen.append(mode))
    another(folder, "--full_determinism true")
    assert True in seen
