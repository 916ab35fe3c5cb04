"""One run a run directory: a lock that dies with the process that holds it."""

import errno
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .checkpoints import sweep
from .distributed import from_main_process
from .errors import UserError, one_line

LOCK, HOLDER = ".lock", ".holder.lock"
_held: set[tuple[int, Path]] = set()  # by this process: what `acorn resume` has locked, run() finds locked


class InUse(UserError):
    """Another process holds the lock: `holder` says which."""

    def __init__(self, directory: Path, holder: str):
        super().__init__(f"output_dir={directory}: locked by {holder}; wait until it ends, or stop it")
        self.holder = holder


@contextmanager
def claimed(run_dir: Path, args) -> Iterator[None]:
    """Have a run directory for oneself: made, locked and swept by the first process, for all of them."""
    with ExitStack() as held:

        def claim() -> None:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(run_dir))
            sweep(run_dir)

        from_main_process(args, claim)
        yield


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; InUse names the process that has it.

    The lock is the operating system's: however a process dies its lock is gone with it, children that it forked have no
    part in it, and the files that it leaves are no obstacle.
    """
    directory = directory.resolve()
    key = (os.getpid(), directory)
    if key in _held:
        yield
        return
    lock = FileLock(directory / LOCK, timeout=0)
    mine = _take(lock, directory)
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if mine is not None and mine == _identity(directory):  # not another's, in a directory that was made anew
            for name in (HOLDER, LOCK):
                with suppress(OSError):  # where an open file cannot be removed, filelock removes it
                    (directory / name).unlink()
        lock.release()


def _take(lock: FileLock, directory: Path) -> tuple[int, int] | None:
    """Take the lock and say who has it; returns which file it is on, None where there are no locks."""
    try:
        with warnings.catch_warnings(action="ignore"):  # without locks of the system, filelock has some of its own
            lock.acquire()
    except Timeout as error:
        raise InUse(directory, _holder(directory)) from error
    except (OSError, NotImplementedError) as error:  # some network file systems have no locks
        # gone: the directory has just been removed; the others: nothing else could be written there either
        if getattr(error, "errno", None) in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"{directory} cannot be locked ({one_line(error)}): keep other runs out of it", file=sys.stderr)
        return None
    mine = _identity(directory)
    if mine is None:  # who had it before has removed the directory, and the lock with it
        lock.release()
        raise InUse(directory, "another process")
    # A file of its own: on Windows nobody else can read one that is locked.
    (directory / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return mine


def _holder(directory: Path) -> str:
    with suppress(OSError):
        return (directory / HOLDER).read_text(encoding="utf-8").strip() or "another process"
    return "another process"


def _identity(directory: Path) -> tuple[int, int] | None:
    """Which file lies there as the lock; its number is not given to another while this process has it open."""
    with suppress(FileNotFoundError):
        found = os.stat(directory / LOCK)
        return found.st_dev, found.st_ino
    return None
