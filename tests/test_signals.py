"""A run that a signal stops saves, says how to go on, and goes on as if nothing had been."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from training.loop.callbacks import StopOnSignal
from training.share.metrics_file import read_metrics

from .tiny_runs import checkpoints, go_on, grow, rows, same_weights, tiny_argv

LONG = ["--dropout", "0.1", "--max_steps", "120", "--eval_steps", "30"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs lie, side by side."""
    return tmp_path_factory.mktemp("signals")


@pytest.fixture(scope="module")
def unbroken(folder):
    """The 120 steps that the stopped runs are held against."""
    return grow(folder, *LONG, name="unbroken")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_loses_nothing(folder, unbroken, number: signal.Signals, code: int) -> None:
    run = folder / f"stopped-by-{number.name}"
    command = [sys.executable, "-m", "training.pretrain", *tiny_argv(*LONG, name=run.name)]
    # a process that a shell starts in the background ignores SIGINT: undo that for the child
    child = subprocess.Popen(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == code, errors
    assert "Traceback" not in errors
    assert f"acorn resume {run.name}" in errors
    stopped_at = checkpoints(run)[-1]
    assert 30 <= stopped_at < 120
    go_on(run)
    assert rows(run) == rows(unbroken)
    assert same_weights(run / "checkpoint-120", unbroken / "checkpoint-120")
    assert same_weights(run, unbroken)
    assert (run / "README.md").is_file()


@pytest.mark.parametrize("is_ignored", [False, True], ids=["a closed terminal", "nohup"])
def test_hangup(folder, monkeypatch, is_ignored: bool) -> None:
    """Its window closed, a run saves and ends; under nohup it goes on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    on_step_end = StopOnSignal.on_step_end

    def hang_up(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", hang_up)
    name = f"hung-up-{is_ignored}"
    try:
        if is_ignored:
            assert checkpoints(grow(folder, name=name)) == [4, 8]
        else:
            with pytest.raises(SystemExit) as ended:
                grow(folder, name=name)
            assert ended.value.code == 129
            assert checkpoints(folder / name) == [3]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_last_step_still_ends_well(folder, monkeypatch) -> None:
    """The run is done, so it is either finished at once or finished by the `acorn resume` that it advises."""
    finish_step = StopOnSignal.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return finish_step(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", interrupted)
    run = folder / "last-step"
    with contextlib.suppress(SystemExit):
        grow(folder, name=run.name)
    monkeypatch.undo()
    if not (run / "README.md").exists():
        go_on(run)
    assert (run / "README.md").is_file()
    assert [row["step"] for row in read_metrics(run)] == [4, 8]
