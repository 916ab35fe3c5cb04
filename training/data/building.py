"""A directory that is built beside its place, by one process at a time; what a killed one left is gone on with."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..system.errors import UserError, is_disk_full, log
from ..system.files import making
from ..system.lock import InUse, locked

CORPUS = "corpus"  # what takes the place of the directory in the end; state and lock lie beside it
STATE = "state.json"
LOCK_SECONDS = 1  # between attempts to take over from another process


def building_folder(directory: Path, fingerprint: str) -> Path:
    """Return where `directory` is built: another text for the same place has another folder."""
    return directory.parent / f".{directory.name}-{fingerprint[:8]}.building"


@contextmanager
def built_aside(directory: Path, fingerprint: str) -> Iterator[Path]:
    """Yield a folder of this process alone, which is removed when all went well.

    While another process has it, this one waits; what a process that ended before its time left there is there still.
    When work fails, the folder stays if it holds a STATE to go on from. Raises UserError for a disk that is full and
    a place that cannot be written to.
    """
    folder = building_folder(directory, fingerprint)
    with making(folder, f"data_dir={str(directory)!r}"), _claimed(folder):
        try:
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(directory.parent, _bytes_below(folder)) from error
            raise
        finally:
            _keep_or_remove(folder)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, waiting while another process does."""
    waits = False
    with ExitStack() as held:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(locked(folder))
                break
            except InUse as error:
                if not waits:
                    log(f"{error.holder} prepares the same text, in {folder}: waiting until it ends")
                waits = True
                time.sleep(LOCK_SECONDS)
            except FileNotFoundError:  # the other one has just finished, and removed the folder
                continue
        yield


def _keep_or_remove(folder: Path) -> None:
    if (folder / STATE).exists():
        log(f"what is done is kept: the same command goes on from there (if you will not, remove {folder})")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def disk_full(folder: Path, needed: int) -> UserError:
    """Say that the tokens do not fit, in MB."""
    free = shutil.disk_usage(folder).free
    sizes = f"at least {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free"
    return UserError(f"data_dir: the disk of {folder} is full: {sizes}; free some, or name another --data_dir")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
