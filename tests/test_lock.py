"""One process a run directory: a second is refused and told who holds it; a dead one holds nothing."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from training import pretrain, resume
from training.system.errors import UserError
from training.system.lock import HOLDER, LOCK, claimed, locked

from .tiny_runs import contents, grow, refused, tiny_argv, write_text

ALONE = SimpleNamespace(world_size=1, process_index=0)


def hold(directory: Path, ready, forks: bool) -> None:
    """Take the lock, say so and sleep; with a child of its own, as a data loader's worker is one."""
    with locked(directory):
        if forks and os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        ready.set()
        time.sleep(60)


@pytest.fixture
def other_process():
    """The factory `other_process(directory, forks=False) -> Process`, which holds the lock of the directory."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(directory: Path, forks: bool = False):
        ready = context.Event()
        # in a process group of its own, so that its child is found again
        process = context.Process(target=lambda: (os.setpgid(0, 0), hold(directory, ready, forks)))
        process.start()
        started.append(process.pid)
        assert ready.wait(30)
        return process

    yield start
    for group in started:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_a_second_process_is_refused_and_told_who(tmp_path, other_process) -> None:
    process = other_process(tmp_path)
    with pytest.raises(UserError, match=rf"locked by process {process.pid} on "), locked(tmp_path):
        raise AssertionError("both hold it")
    process.kill()
    process.join()
    with locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / HOLDER).read_text()
    assert os.listdir(tmp_path) == []


def test_a_killed_process_holds_nothing_though_its_child_lives(tmp_path, other_process) -> None:
    process = other_process(tmp_path, forks=True)
    process.kill()
    process.join()
    with locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / HOLDER).read_text()


def test_this_process_may_lock_again_what_it_has_locked(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path.parent)
    with claimed(tmp_path, ALONE), claimed(Path(tmp_path.name), ALONE):
        assert (tmp_path / HOLDER).read_text()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys) -> None:
    def refuse(lock):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("training.system.lock.FileLock.acquire", refuse)
    with locked(tmp_path):
        assert "cannot be locked (" in capsys.readouterr().err


def test_a_directory_that_is_made_anew_keeps_its_new_lock(tmp_path, other_process) -> None:
    """A build ends by removing its folder: the next process may have made and locked it again by then."""
    folder = tmp_path / "building"
    folder.mkdir()
    with locked(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        process = other_process(folder)
    assert f"process {process.pid} " in (folder / HOLDER).read_text()
    with pytest.raises(UserError, match=f"process {process.pid} "), locked(folder):
        raise AssertionError("both hold it")


def test_resume_and_pretrain_are_refused(tmp_path, other_process, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = grow(tmp_path)
    process = other_process(run)
    before = contents(run)
    assert f"process {process.pid} " in refused(resume.main, "run", "--max_steps", "12")
    assert contents(run) == before
    write_text(tmp_path)
    (tmp_path / "young").mkdir()
    other = other_process(tmp_path / "young")  # begun, but without anything to show for it yet
    assert f"process {other.pid} " in refused(pretrain.main, *tiny_argv("--output_dir", "young"))
    assert set(os.listdir(tmp_path / "young")) == {LOCK, HOLDER}
