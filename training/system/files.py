"""Files written whole or not at all (under another name first, flushed to the disk, then renamed), and their hashes."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError, one_line
from .shell import shell


def digest(*parts: object) -> str:
    """Return the hash of bytes, or of what is fit for JSON, whatever the order of its keys."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return hasher.hexdigest()


def hash_file(path: Path) -> str:
    """Return the hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: list[Path]) -> list[str]:
    """Return the hash of each file's content; several are read at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(hash_file, paths))


IS_WINDOWS = os.name == "nt"


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk itself.

    Windows opens no directories, and flushes only what is open for writing; its file system keeps names by itself.
    """
    if IS_WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_picture(path: Path, figure, dpi: int = 120) -> None:
    """Write a matplotlib Figure as a whole PNG file, of so many pixels an inch."""
    replace_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes so that no reader, and no power cut, ever meets half of it."""
    raw = content.encode("utf-8") if isinstance(content, str) else content
    replace_whole(path, lambda temporary: temporary.write_bytes(raw))


def write_json(path: Path, content: dict) -> None:
    """Write an object as JSON, whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


HASH, END = b"# sha256 of the rest: ", b"# end\n"


def write_with_hash(path: Path, text: str) -> None:
    """Write a text whole, between two comments: half of a YAML file may be a YAML file, too."""
    raw = text.encode("utf-8") + END
    write_whole(path, HASH + digest(raw).encode() + b"\n" + raw)


def check_hash(path: Path) -> None:
    """Refuse what `write_with_hash` wrote where its end is missing; other changes are reported."""
    first, _, rest = path.read_bytes().partition(b"\n")
    if not first.startswith(HASH):  # of an earlier Acorn, or a person's own
        return
    if not rest.endswith(END):
        raise UserError(f"{path} is cut off: its last line, {END.decode().strip()!r}, is missing; copy it again")
    if first[len(HASH) :] != digest(rest).encode():
        print(f"{path} has changed since it was written; using it as it is", file=sys.stderr)


def read_json(path: Path, mend: str = "copy the directory again") -> dict:
    """A JSON file's object, empty where there is no file; a damaged one is refused, with how to mend it."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__} instead of an object")
        return content
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {mend}") from error


@contextmanager
def making(folder: Path, shown: str) -> Iterator[None]:
    """Make a folder to work in, with its parents; those that are empty in the end go again.

    shown: the field and its value, which a refusal of the system is told with. Raises UserError.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(shown, error) from error
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise _unwritable(shown, error) from error
    finally:
        for path in missing:
            with suppress(OSError):  # not empty: it holds what was made, or something of another process
                path.rmdir()


def _unwritable(shown: str, error: OSError) -> UserError:
    return UserError(f"{shown}: {error.strerror}; choose another directory")


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield a folder beside `directory`, which takes that name when all went well and is gone when not.

    Raises UserError where `directory` is there already and holds anything, or cannot be made.
    """
    taken = UserError(f"{directory}: already exists and is not empty; choose another directory, or remove it")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise taken
    whole = directory.absolute()
    building = whole.with_name(f".{whole.name}.{os.getpid()}.tmp")
    with making(building, str(directory)):
        try:
            yield building
            if not publish(building, whole):
                raise taken
        finally:
            shutil.rmtree(building, ignore_errors=True)


def publish(building: Path, directory: Path, replaced: Path | None = None) -> bool:
    """Flush a finished folder to the disk and rename it to `directory`; False where that holds something already.

    replaced: the name that what lies in the place of `directory` is given before.
    """
    for path in [*building.rglob("*"), building]:
        sync(path)
    if replaced is not None and directory.exists():
        directory.rename(replaced)
    with suppress(OSError):
        directory.rmdir()  # an empty one of that name; only POSIX would let it give way by itself
    try:
        building.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync(directory.parent)
    return True


def check_output(shown: str, path: Path, endings: tuple[str, ...] = ()) -> None:
    """Refuse, before anything long, a file that could not be written in the end: its ending, its place, its folder.

    shown: the flag that names the file. Without endings the path may be a folder too, and folders are made.
    """
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{shown}={path}: must end in {' or '.join(endings)}")
    if endings and path.is_dir():
        raise UserError(f"{shown}={path}: is a directory; name a file in it")
    folder = path if path.is_dir() else path.absolute().parent
    while not endings and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{shown}={path}: there is no directory {folder}; make it first, or name another file")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{shown}={path}: nothing can be written in {folder}; name another file")


def refuse_used(directory: Path) -> None:
    """Refuse, before anything long, an output directory that holds anything to lose, or that cannot be written.

    Hidden files do not count: a run that was killed at once leaves its lock and half-written ones.
    """
    shown = f"output_dir={directory}"
    if directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
        resume = shell("acorn", "resume", directory)
        raise UserError(f"{shown} exists: continue it with `{resume}`, or choose another --output_dir")
    probe = directory / f".probe.{os.getpid()}.tmp"
    with making(directory, shown):
        probe.touch()
        probe.unlink()
