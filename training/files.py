"""Files written whole or not at all: under another name first, flushed to the disk, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes so that no reader, and no power cut, ever meets half of it."""
    raw = content.encode("utf-8") if isinstance(content, str) else content
    replace_whole(path, lambda temporary: temporary.write_bytes(raw))


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` make the file, then put it in the place of `path`; an error leaves `path` alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
