"""Files of text: found, downloaded, opened plain or compressed (their first bytes tell), known by their hashes."""

import bisect
import bz2
import functools
import glob
import gzip
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..system.addresses import is_address, public_name
from ..system.errors import UserError, log_once, one_line
from ..system.files import hash_file

Files = list[tuple[str, Path]]  # the name that is shown and stored, and where the file lies on this machine


class Size(NamedTuple):
    """How much text a source holds, where that is known without reading it; bytes are an estimate."""

    documents: int | None = None
    bytes: int | None = None


def skip_file(data, skipped: dict, name: str, error: UserError) -> None:
    """Raise the error about a file, or, with on_bad_file=skip, say it once and remember it in `skipped`."""
    if data.on_bad_file == "stop":
        raise error
    if name not in skipped:
        skipped[name] = str(error)
        log_once(f"skipped: {error}")


def skip_row(data, skipped: dict, field: str, name: str, row, why: str) -> None:
    """Raise what is wrong with one row, or, with on_bad_file=skip, remember its number; the first of a file is said.

    The rows of a file are one entry in `skipped`, however often they are read: why the first is, and their numbers.
    """
    error = UserError(f"{field}={name!r}: {row.place}: {why}; fix it, or skip what is bad with --on_bad_file skip")
    if data.on_bad_file == "stop":
        raise error
    entry = skipped.setdefault(f"rows of {name}", {"why": f"{row.place}: {why}", "rows": []})
    rows, place = entry["rows"], bisect.bisect_left(entry["rows"], row.number)
    if not rows:
        log_once(f"skipped: {error}")
    if rows[place : place + 1] != [row.number]:
        rows.insert(place, row.number)


def skipped_in_words(skipped: dict) -> dict[str, str]:
    """Return what was left out, and why, in words."""
    counted = {name: entry for name, entry in skipped.items() if isinstance(entry, dict)}
    return skipped | {name: f"{len(entry['rows']):,}, the first: {entry['why']}" for name, entry in counted.items()}


def as_list(field: str, entries: list[str] | str) -> list[str]:
    """Return one entry as a list of one; refuse what names nothing."""
    entries = [entries] if isinstance(entries, str) else list(entries)
    for entry in entries:
        if not isinstance(entry, str) or not entry.strip():
            raise UserError(f"{field}={entry!r}: does not name a file; give one, or leave it out")
        try:
            with suppress(FileNotFoundError, NotADirectoryError):  # a pattern, or what `match_files` refuses
                os.stat(entry if not is_address(entry) else os.curdir)
        except (OSError, ValueError) as error:
            raise UserError(f"{field}={entry[:100]!r}: {getattr(error, 'strerror', error)}; check the path") from error
    return entries


def match_files(field: str, entry: str) -> Files:
    """Return the file that `entry` names, downloaded if it is an address, or the files that match it as a glob.

    ** matches at any depth; the files are sorted.
    """
    if is_address(entry):
        return [(public_name(entry), download(field, entry))]
    if Path(entry).is_file():
        return [(str(Path(entry)), Path(entry))]
    if not glob.has_magic(entry):
        raise UserError(f"{field}={entry!r}: there is no such file; check the path (it is taken from {Path.cwd()})")
    matches = sorted(path for path in glob.glob(entry, recursive=True) if Path(path).is_file())
    if not matches:
        raise UserError(f"{field}={entry!r}: the pattern matches no file; check it, and quote it in the shell")
    return [(str(Path(path)), Path(path)) for path in matches]


def files_below(field: str, folder: Path) -> list[Path]:
    """List the files of a folder at any depth, sorted, that hold anything.

    What is hidden, and folders that tools fill (node_modules, __pycache__, virtual environments), are left out.
    """
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"{field}={str(folder)!r}: {error.filename} cannot be listed ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_a_tools(Path(parent, name))]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file() and path.stat().st_size)


def _is_a_tools(folder: Path) -> bool:
    is_environment = (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").is_dir()
    return folder.name.startswith(".") or folder.name in ("node_modules", "__pycache__") or is_environment


@functools.cache
def download(field: str, address: str) -> Path:
    """Download from an address, once a process, into the cache of `datasets`, and return the local path."""
    from datasets import DownloadManager

    public = public_name(address)
    if public != address:
        log_once(f"{field}: the user and query of {public} are not stored; what reads it again, such as a resume "
                 f"without the prepared tokens, needs --{field} again")  # fmt: skip
    try:
        path = Path(DownloadManager().download(address))
    except Exception as error:  # aiohttp, requests, fsspec and OSErrors: all mean that the file did not come
        again = f"if it needs a user or a query, which are not stored, give --{field} again; or name a local file"
        raise UserError(f"{field}={public!r}: cannot be downloaded ({one_line(error)}); {again}") from error
    if public != address:  # what `datasets` notes beside its copy
        Path(f"{path}.json").write_text(json.dumps({"url": public, "etag": None}), encoding="utf-8")
    return path


def fingerprint_files(files: Files) -> dict:
    """Return names, sizes and hashes of files, as a dict fit for JSON."""
    listed = []
    for name, path in files:
        try:
            listed.append({"path": name, "bytes": path.stat().st_size, "sha256": _hash_as_it_was(path)})
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror}); check it, or name others") from error
    return {"files": listed, "bytes": sum(entry["bytes"] for entry in listed)}


def _hash_as_it_was(path: Path) -> str:
    """Return the hash of a file's content, without reading a file twice that was not written to since."""
    status = path.stat()
    return _hash_at(path, status.st_size, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=1_000_000)
def _hash_at(path: Path, *status: int) -> str:
    return hash_file(path)


# --- plain or compressed ---

COMPRESSED_ENDINGS = (
    ".gz",
    ".gzip",
    ".bz2",
    ".xz",
    ".lzma",
    ".zst",
    ".zstd",
    ".lz4",
    ".zip",
)  # that a table's name may have
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)  # what reading them raises


def _open_with_pyarrow(path: Path) -> BinaryIO:
    import pyarrow

    codec = "zstd" if path.open("rb").read(4) == b"\x28\xb5\x2f\xfd" else "lz4"
    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec)


def _open_zip(path: Path) -> BinaryIO:
    archive = zipfile.ZipFile(path)
    members = [entry for entry in archive.infolist() if not entry.is_dir() and "__MACOSX" not in entry.filename]
    if len(members) != 1:
        raise zipfile.BadZipFile(f"a zip archive of {len(members)} files, of which only one can be read; unpack it")
    if members[0].flag_bits & 1:
        raise zipfile.BadZipFile("a zip archive with a password; unpack it")
    return archive.open(members[0])


# the first bytes of a file: how it is opened
MAGIC: dict[bytes, Callable[[Path], BinaryIO]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x5d\x00\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _open_with_pyarrow,
    b"\x04\x22\x4d\x18": _open_with_pyarrow,
    b"PK\x03\x04": _open_zip,
}


def _opener(path: Path) -> Callable[[Path], BinaryIO] | None:
    with path.open("rb") as file:
        head = file.read(10)
    found = next((opener for magic, opener in MAGIC.items() if head.startswith(magic)), None)
    is_text = head.startswith(b"BZh") and head[4:] != b"1AY&SY"  # bzip2's magic alone may begin a text
    return None if is_text else found


def is_compressed(path: Path) -> bool:
    """Say whether a file's first bytes are those of a compressed one."""
    return _opener(path) is not None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading what is in it, decompressed as it is read; errors are those in DAMAGED."""
    opener = _opener(path)
    return opener(path) if opener else path.open("rb")


def without_compression(name: str) -> str:
    """Return a file's name without the endings that compression gave it."""
    while name.lower().endswith(COMPRESSED_ENDINGS):
        name = name.rpartition(".")[0]
    return name


def damaged(field: str, name: str, error: BaseException, mend: str = "check it") -> UserError:
    """Say that a file cannot be read, and why."""
    why = getattr(error, "strerror", None) or one_line(error)
    return UserError(f"{field}={name!r}: cannot be read ({why}); {mend}")
