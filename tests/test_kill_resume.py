"""Real processes, really killed: what is resumed ends as what was left alone, on one process and on two."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from benchmarks import kill_resume
from training.loop.lanes import StepSampler
from training.share.metrics_file import read_metrics
from training.system.run_files import damage

from .test_resume import back_to, rows
from .tiny_runs import checkpoints, grow, metrics, same_weights, tiny_argv, weights, write_text

# As --tokens_per_step: whatever the number of processes, a step is 8 windows.
SHARED = "--tokens_per_step 128 --per_device_train_batch_size 2 --use_cpu true --max_steps 12".split()


@pytest.fixture(scope="module", autouse=True)
def quick_starts():
    """Processes forked from one that has imported everything; the environment as it was afterwards."""
    with patch.dict(os.environ):
        os.environ.update(kill_resume.ENVIRONMENT)
        multiprocessing.set_forkserver_preload(kill_resume.PRELOADED)
        yield


def start(folder: Path, module: str, argv: list[str], processes: int = 2):
    return kill_resume.Forked(folder, module, argv, processes, folder / "log")


def run_to_the_end(folder: Path, module: str, argv: list[str], processes: int = 2) -> None:
    code = start(folder, module, argv, processes).wait()
    assert code == 0, (folder / "log").read_text()[-2000:]


def kills(monkeypatch, capsys, *argv: str) -> dict:
    """The JSON line of the benchmark."""
    monkeypatch.setattr(sys, "argv", ["kill_resume.py", *argv])
    with pytest.raises(SystemExit) as left:
        kill_resume.main()
    assert left.value.code == 0, left.value.code  # of a run that should have ended well: what it said
    return json.loads(capsys.readouterr().out)


def test_killed_and_resumed_is_as_left_alone(monkeypatch, capsys) -> None:
    line = kills(monkeypatch, capsys, "--kills", "1", "--seed", "1", "--steps", "24")
    assert line["kills"] == line["equal"] == 1
    assert line["sigkills"] >= 1
    assert line["by_kind"]["pretrain, 1 process(es)"]["half_written_checkpoints"] == 0


def test_a_killed_adapter_is_as_left_alone_on_a_base_with_dropout(monkeypatch, capsys) -> None:
    line = kills(monkeypatch, capsys, "--kinds", "lora", "--kills", "1", "--seed", "1", "--steps", "12")
    assert line["kills"] == line["equal"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("kind", [kind for kind in kill_resume.KINDS if kind != "pretrain"])
def test_every_kind_of_finetuning_is_killed(monkeypatch, capsys, kind: str, processes: str) -> None:
    flags = ["--kinds", kind, "--processes", processes, "--kills", "2", "--steps", "24"]
    line = kills(monkeypatch, capsys, *flags)
    assert line["kills"] == line["equal"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("launcher", kill_resume.LAUNCHERS)
def test_killed_on_one_process_and_on_two(monkeypatch, capsys, optimizer: str, launcher: str) -> None:
    flags = ["--optimizer", optimizer, "--launcher", launcher, "--steps", "60"]
    line = kills(monkeypatch, capsys, "--kills", "2", "--processes", "1", "2", *flags)
    assert line["kills"] == line["equal"] == 4


def test_the_benchmark_sees_a_difference(tmp_path) -> None:
    run = grow(tmp_path, name="one")
    other = grow(tmp_path, "--seed", "3", name="other")
    ours, theirs = kill_resume.facts(run, 8), kill_resume.facts(other, 8)
    assert all(kill_resume.same(ours[what], ours[what]) for what in ours)
    differing = {what for what in ours if not kill_resume.same(ours[what], theirs[what])}
    assert {"weights", "best weights", "optimizer", "losses", "metrics"} <= differing


def test_a_step_has_the_same_rows_on_any_number_of_processes() -> None:
    trainer = SimpleNamespace(train_dataset=range(48), rows_per_step=12, state=SimpleNamespace(global_step=1))
    for processes in (1, 2, 3):
        steps: list[set[int]] = [set() for _ in range(3)]
        for rank in range(processes):
            batches = list(BatchSamplerShard(BatchSampler(StepSampler(trainer), 2, True), processes, rank))
            accumulation = 12 // 2 // processes
            for number, batch in enumerate(batches):
                steps[number // accumulation].update(batch)
        assert steps == [set(range(12, 24)), set(range(24, 36)), set(range(36, 48))]


def test_from_one_process_to_two_and_back(tmp_path) -> None:
    alone = grow(tmp_path, *SHARED, "--dropout", "0", "--save_total_limit", "9", name="alone")
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    back_to(run, 4)
    run_to_the_end(tmp_path, "training.resume", ["run"], processes=2)
    assert len(list((run / "checkpoint-8").glob("rng_state_*.pth"))) == 2
    back_to(run, 8)
    run_to_the_end(tmp_path, "training.resume", ["run"], processes=1)
    log = (tmp_path / "log").read_text()
    assert "1 → 2 processes: every step keeps its samples" in log
    assert "2 → 1 processes" in log
    for ours, theirs in zip(rows(run), rows(alone), strict=True):
        assert (ours["step"], ours["tokens"]) == (theirs["step"], theirs["tokens"])
        for key in ("train_loss", "eval_loss", "grad_norm", "learning_rate"):
            assert math.isclose(ours[key], theirs[key], abs_tol=1e-6, rel_tol=1e-5 if key == "grad_norm" else 0)
    ours, theirs = weights(run / "checkpoint-12"), weights(alone / "checkpoint-12")
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5


def test_a_signal_to_one_of_two_stops_both_at_one_step(tmp_path) -> None:
    write_text(tmp_path)
    argv = [*SHARED, "--dropout", "0.1", "--max_steps", "60", "--eval_steps", "8", "--logging_steps", "3"]
    run_to_the_end(tmp_path, "training.pretrain", tiny_argv(*argv, name="unbroken"))
    attempt, run = start(tmp_path, "training.pretrain", tiny_argv(*argv, name="run")), tmp_path / "run"
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and attempt.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(attempt.processes[1].pid, signal.SIGTERM)
    attempt.wait()
    log = (tmp_path / "log").read_text()
    assert [process.exitcode for process in attempt.processes] == [143, 143], log
    step = checkpoints(run)[-1]
    assert 8 <= step < 60
    assert damage(run / f"checkpoint-{step}") is None
    assert f"stopped by SIGTERM at step {step}; checkpoint saved" in log
    run_to_the_end(tmp_path, "training.resume", ["run"])
    assert rows(run) == rows(tmp_path / "unbroken")
    assert metrics(run) == read_metrics(run)
    assert same_weights(run / "checkpoint-60", tmp_path / "unbroken" / "checkpoint-60")
