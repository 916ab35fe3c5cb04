"""One process first, in two real ones: the order, an error of the first, and a first that never comes."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from training.system.distributed import is_lost_process_error, main_process_first
from training.system.errors import LostProcess, UserError

from .tiny_runs import tiny_argv, write_text
from .two_processes import ROOT, in_two


def arguments_of(rank: int, ddp_timeout: int = 60) -> SimpleNamespace:
    return SimpleNamespace(world_size=2, process_index=rank, local_process_index=rank, ddp_timeout=ddp_timeout)


def check_order(rank: int, folder) -> None:
    """The second process finds what the first one made, however slow that was."""

    def work() -> str:
        made = folder / "made"
        if rank == 0:
            time.sleep(0.5)
            made.write_text("by the first", encoding="utf-8")
        return made.read_text(encoding="utf-8")

    assert main_process_first(arguments_of(rank), work, "prepare") == "by the first"


def check_error(rank: int) -> None:
    """The first one's refusal is every process's refusal."""

    def work() -> None:
        assert rank == 0, "the second process must not begin"
        raise UserError("text_files='x': there is no such file")

    with pytest.raises(UserError, match="there is no such file"):
        main_process_first(arguments_of(rank), work, "prepare")


def check_word(rank: int, folder) -> None:
    """The others make their result of what the first one sends; who does not find what it speaks of works itself."""
    worked = folder / f"{rank}-worked"

    def work() -> str:
        worked.touch()
        return f"by {rank}"

    def first(receive) -> str:
        return main_process_first(arguments_of(rank), work, "prepare", send="made {}".format, receive=receive)

    assert first(lambda word: f"taken: {word}") == ("by 0" if rank == 0 else "taken: made by 0")
    assert worked.exists() == (rank == 0)
    assert first(lambda word: None) == f"by {rank}"


def check_long_work(rank: int) -> None:
    """Who is at work, and alive, is waited for longer than ddp_timeout."""
    work = (lambda: time.sleep(3)) if rank == 0 else (lambda: None)
    assert main_process_first(arguments_of(rank, ddp_timeout=1), work, "prepare") is None


def check_patience(rank: int, folder) -> None:
    """Who waits for a process that shows no life says so after ddp_timeout."""

    def work() -> None:
        assert rank == 0
        (folder / "pid").write_text(str(os.getpid()), encoding="utf-8")
        os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises((LostProcess, RuntimeError)) as caught:
        try:
            main_process_first(arguments_of(rank, ddp_timeout=2), work, "prepare")
        finally:
            if rank == 1:
                os.kill(int((folder / "pid").read_text(encoding="utf-8")), signal.SIGCONT)
    if rank == 1:
        assert "ddp_timeout=2" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_others_find_the_work_done(tmp_path) -> None:
    in_two(check_order, tmp_path, tmp_path)


def test_an_error_of_the_first_is_everyones(tmp_path) -> None:
    in_two(check_error, tmp_path)


def test_the_others_take_the_first_ones_word(tmp_path) -> None:
    in_two(check_word, tmp_path, tmp_path)


def test_waiting_has_no_limit_while_the_first_one_lives(tmp_path) -> None:
    in_two(check_long_work, tmp_path)


@pytest.mark.slow
def test_waiting_for_a_silent_process_has_a_limit(tmp_path) -> None:
    in_two(check_patience, tmp_path, tmp_path)


def test_alone_there_is_nobody_to_wait_for() -> None:
    assert main_process_first(SimpleNamespace(world_size=1), lambda: "done", "prepare") == "done"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:3"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_a_lost_process_is_told_from_a_bug(error, is_lost) -> None:
    assert is_lost_process_error(error) is is_lost


def start_two(folder, *flags: str) -> list[subprocess.Popen]:
    """Two processes of one tiny run without a launcher, which would end the second as soon as the first is gone."""
    command = [sys.executable, "-m", "training.pretrain", *tiny_argv("--use_cpu", "true", *flags)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + os.getpid() % 1000), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_in_training_ends_the_other_with_one_line(tmp_path, victim) -> None:
    write_text(tmp_path)
    started = start_two(tmp_path, "--max_steps", "100000", "--eval_steps", "50", "--ddp_timeout", "60")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    started[victim].send_signal(signal.SIGKILL)
    _, errors = started[1 - victim].communicate(timeout=120)
    started[victim].communicate()
    assert started[1 - victim].returncode == 2, errors
    last = errors.strip().splitlines()[-1]
    assert f"process {1 - victim} of 2: training, and one of them is gone" in last
    assert "Traceback" not in errors
