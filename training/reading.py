"""What every source of text shares: parts of documents, their sizes, and finding, checking and naming files."""

import glob
import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from .errors import UserError

BAD_FILE_POLICIES = ("stop", "skip")


class Part(NamedTuple):
    """A document's text, or a stretch of it: `ends` says that nothing of the document follows.

    `place` tells its source where the document lies, so that reading can go on after it: [file], or [file, row].
    """

    place: list[int]
    name: str
    text: str
    ends: bool = True


class Size(NamedTuple):
    """How much text a source holds, where that is known without reading it; bytes are an estimate."""

    documents: int | None = None
    bytes: int | None = None


def leave_out(data, left_out: dict[str, str], name: str, error: UserError) -> None:
    """Raise the error about a file, or, with on_bad_file=skip, say it once and remember it in `left_out`."""
    if data.on_bad_file == "stop":
        raise error
    if name not in left_out:
        left_out[name] = str(error)
        say(f"left out: {error}")


def say(line: str) -> None:
    """Print a line on stderr in the first process alone (torchrun sets RANK), above a progress bar if one is shown."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def as_list(entries: list[str] | str) -> list[str]:
    """Return one entry as a list of one."""
    return [entries] if isinstance(entries, str) else list(entries)


def match_files(field: str, entry: str) -> list[Path]:
    """Return the file that `entry` names, or the files that it matches as a glob (** at any depth), sorted."""
    if Path(entry).is_file():
        return [Path(entry)]
    if not glob.has_magic(entry):
        raise UserError(f"{field}={entry!r}: there is no such file; check the path (it is taken from {Path.cwd()})")
    matches = sorted(path for path in glob.glob(entry, recursive=True) if Path(path).is_file())
    if not matches:
        raise UserError(f"{field}={entry!r}: the pattern matches no file; check it, and quote it in the shell")
    return [Path(path) for path in matches]


def fingerprint_files(files: Iterable[tuple[str, Path]]) -> dict:
    """Return names, sizes and hashes of files, as a dict fit for JSON."""
    listed = [{"path": name, "bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files]
    return {"files": listed, "bytes": sum(entry["bytes"] for entry in listed)}


def sha256(path: Path) -> str:
    """Return the hash of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
