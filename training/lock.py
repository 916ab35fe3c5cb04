"""One run a run directory: a lock that dies with the process that holds it."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .agreement import first_decides
from .checkpoints import sweep
from .errors import UserError, one_line

LOCK = ".lock"
_held: set[Path] = set()  # by this process: what `acorn resume` has locked, run() finds locked


class InUse(UserError):
    """Another process holds the lock: `holder` says which."""

    def __init__(self, directory: Path, holder: str):
        super().__init__(f"output_dir={directory}: {holder} is at work in it; wait until it ends, or stop it first")
        self.holder = holder


@contextmanager
def claimed(run_dir: Path, args) -> Iterator[None]:
    """Have a run directory for oneself: made, locked and swept by the first process, for all of them."""
    with ExitStack() as held:
        first_decides(args, lambda: _claim(run_dir, held))
        yield


def _claim(run_dir: Path, held: ExitStack) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(run_dir))
    sweep(run_dir)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; InUse names the process that has it.

    flock(2) belongs to the open file: however a process dies, its lock is gone with it, and the file that it leaves is
    no obstacle.
    """
    directory = directory.resolve()
    if directory in _held:
        yield
        return
    with open(directory / LOCK, "a+", encoding="utf-8") as file:
        _take(file, directory)
        _held.add(directory)
        try:
            yield
        finally:
            _held.discard(directory)
            if _is_there(file, directory):
                (directory / LOCK).unlink()


def _take(file, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise InUse(directory, holder) from error
    except OSError as error:  # some network file systems have no locks
        print(f"{directory} cannot be locked ({one_line(error)}): keep other runs out of it", file=sys.stderr)
    if not _is_there(file, directory):
        raise InUse(directory, "another process")
    # A data loader's worker outlives a killed parent by seconds, and must not keep its lock so long.
    os.register_at_fork(after_in_child=file.close)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _is_there(file, directory: Path) -> bool:
    """Whether the file that was locked is the one that lies there: who had it before may have removed the directory."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(directory / LOCK))
    except FileNotFoundError:
        return False
