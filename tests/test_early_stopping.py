"""Early stopping stops where it would have stopped, however often the run was broken off."""

import shutil
from shlex import split as words

import pytest

from training import resume

from .test_resume import back_to, rows
from .tiny_runs import checkpoints, contents, go_on, grow, metrics, refused, same_weights

CLIMBING = words(
    "--lr_scheduler_type constant_with_warmup --warmup_steps 20 --learning_rate 3 --max_grad_norm 0 --dropout 0.1 "
    "--max_steps 80 --eval_steps 2 --early_stopping_patience 4 --save_total_limit 50"
)
END = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs lie, side by side."""
    return tmp_path_factory.mktemp("early-stopping")


@pytest.fixture(scope="module")
def stopped(folder):
    """A run that stopped early because its loss climbed."""
    return grow(folder, *CLIMBING, name="stopped-early")


@pytest.mark.parametrize("steps_before", [2, 4, 0])
def test_patience_goes_on_where_it_was(folder, stopped, steps_before: int) -> None:
    end = metrics(stopped)[-1]["step"]
    assert end < END
    broken = folder / f"stopped-early-{steps_before}"
    shutil.copytree(stopped, broken)
    back_to(broken, end - steps_before)
    shutil.copy(stopped / "model.safetensors", broken)  # of a step before: the best there is
    go_on(broken)
    assert rows(broken) == rows(stopped)
    assert checkpoints(broken) == checkpoints(stopped)
    assert same_weights(broken / f"checkpoint-{end}", stopped / f"checkpoint-{end}")
    assert (broken / "README.md").is_file()


def test_a_run_that_stopped_early_is_finished(folder, stopped, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    before = contents(stopped)
    assert "larger --early_stopping_patience" in refused(resume.main, "stopped-early", "--max_steps", "90")
    assert contents(stopped) == before
    longer = folder / "more-patience"
    shutil.copytree(stopped, longer)
    go_on(longer, "--early_stopping_patience", "6")
    assert metrics(longer)[-1]["step"] > metrics(stopped)[-1]["step"]


def test_patience_may_come_in_late(folder) -> None:
    run = grow(folder, name="patience-later")
    go_on(run, "--max_steps", "12", "--early_stopping_patience", "3")
    assert checkpoints(run)[-1] == 12
