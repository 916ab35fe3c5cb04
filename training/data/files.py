"""Files of text: found, downloaded, opened plain or compressed (their first bytes tell), known by their hashes."""

import bz2
import codecs
import functools
import glob
import gzip
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..system.addresses import is_address, public_name
from ..system.errors import UserError, log_once, one_line
from ..system.files import hash_file

Files = list[tuple[str, Path]]  # the name that is shown and stored, and where the file lies on this machine


# --- finding ----------------------------------------------------------------------------------------------------------


def find_files(field: str, entries: list[str] | str, is_wanted: Callable[[Path], bool], what: str) -> Files:
    """Resolve files, folders, globs and addresses, each file once, in the order given; what one of them holds, sorted.

    Of a folder come the files at any depth for which `is_wanted` holds; how many those are is logged.
    """
    found: dict[Path, str] = {}
    for entry in [entries] if isinstance(entries, str) else entries:
        if not isinstance(entry, str) or not entry.strip():
            raise UserError(f"{field}={entry!r}: does not name a file; give one, or leave it out")
        if is_address(entry):
            found.setdefault(download(field, entry), public_name(entry))
            continue
        for path in _local_files(field, entry, is_wanted, what):
            found.setdefault(path, str(path))
    return [(name, path) for path, name in found.items()]


def _local_files(field: str, entry: str, is_wanted: Callable[[Path], bool], what: str) -> list[Path]:
    """Return the file of that name, those of the folder, or those that match it as a glob; ** matches at any depth."""
    path = Path(entry)
    try:
        with suppress(FileNotFoundError, NotADirectoryError):  # it may be a pattern
            path.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"{field}={entry[:100]!r}: {getattr(error, 'strerror', error)}; check the path") from error
    if path.is_dir():
        return _files_below(field, path, is_wanted, what)
    if path.is_file():
        return [path]
    if not glob.has_magic(entry):
        raise UserError(f"{field}={entry!r}: there is no such file; check the path (it is taken from {Path.cwd()})")
    matches = [Path(match) for match in sorted(glob.glob(entry, recursive=True)) if Path(match).is_file()]
    if not matches:
        raise UserError(f"{field}={entry!r}: the pattern matches no file; check it, and quote it in the shell")
    return matches


def _files_below(field: str, folder: Path, is_wanted: Callable[[Path], bool], what: str) -> list[Path]:
    """List the wanted files of a folder that hold anything.

    What is hidden, and folders that tools fill (node_modules, __pycache__, virtual environments), do not count.
    """
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"{field}={str(folder)!r}: {error.filename} cannot be listed ({error.strerror})")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not _is_a_tools(Path(parent, name))]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    found = sorted(path for path in found if path.is_file() and path.stat().st_size)
    wanted = [path for path in found if is_wanted(path)]
    if not wanted:
        raise UserError(f"{field}={str(folder)!r}: the folder holds no {what}; name one that does")
    size = sum(path.stat().st_size for path in wanted)
    others = f" (other files skipped: {len(found) - len(wanted):,})" if len(wanted) < len(found) else ""
    log_once(f"{field}={str(folder)!r}: {len(wanted):,} {what}{'s' * (len(wanted) > 1)}, {size:,} bytes{others}")
    return wanted


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
            status = path.stat()
            digest = _hash_at(path, status.st_size, status.st_mtime_ns, status.st_ino)
            listed.append({"path": name, "bytes": status.st_size, "sha256": digest})
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror}); check it, or name others") from error
    return {"files": listed, "bytes": sum(entry["bytes"] for entry in listed)}


@functools.lru_cache(maxsize=1_000_000)
def _hash_at(path: Path, *status: int) -> str:
    """Return the hash of a file's content; one that was not written to since is not read again."""
    return hash_file(path)


# --- plain or compressed ----------------------------------------------------------------------------------------------

COMPRESSED_ENDINGS = (".gz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4", ".zip")  # of a table's name
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)  # what reading them raises


def _open_with_pyarrow(codec: str, path: Path) -> BinaryIO:
    import pyarrow

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
    b"\x28\xb5\x2f\xfd": functools.partial(_open_with_pyarrow, "zstd"),
    b"\x04\x22\x4d\x18": functools.partial(_open_with_pyarrow, "lz4"),
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


def damaged(name: str, error: BaseException) -> UserError:
    """Say that a text file cannot be read, and why."""
    why = getattr(error, "strerror", None) or one_line(error)
    return UserError(f"text_files={name!r}: cannot be read ({why}); check it")


# --- text -------------------------------------------------------------------------------------------------------------

STRETCH_BYTES = 4 << 20  # that are read at once: a book of gigabytes needs no more memory than a page
BYTE_ORDER_MARK = "\ufeff"


def looks_like_text(path: Path) -> bool:
    """Say whether a file is no binary, which its first 8 kB show."""
    try:
        with open_bytes(path) as file:
            return b"\0" not in file.read(8192)  # as git does
    except PermissionError as error:
        raise damaged(str(path), error) from error
    except DAMAGED:  # an archive of several files, or half of one
        return False


def read_text(path: Path, name: str) -> Iterator[tuple[str, bool]]:
    """Yield (stretch, is it the last) of a UTF-8 file with its line breaks as they are; refuse an empty or binary one.

    A byte-order mark at its beginning is no part of the text. What is compressed is read as what it holds.
    """
    decoder, offset, is_start, has_text = codecs.getincrementaldecoder("utf-8")(), 0, True, False
    try:
        with open_bytes(path) as file:
            raw = file.read(STRETCH_BYTES)
            while raw:
                following = file.read(STRETCH_BYTES)
                text = _decode(decoder, raw, offset, name, final=not following)
                if is_start and text:
                    is_start, text = False, text.removeprefix(BYTE_ORDER_MARK)
                has_text = has_text or bool(text)
                if not following and not has_text:
                    break
                yield text, not following
                offset, raw = offset + len(raw), following
    except DAMAGED as error:
        raise damaged(name, error) from error
    if not has_text:
        raise UserError(f"text_files={name!r}: the file is empty; name one with text in it")


def _decode(decoder, raw: bytes, offset: int, name: str, final: bool) -> str:
    """Decode the bytes at `offset` of a file, with what the decoder holds back of the bytes before them."""
    if (found := raw.find(b"\0")) >= 0:
        raise UserError(f"text_files={name!r}: is binary (a NUL byte at offset {offset + found}); name text files only")
    held_back = len(decoder.getstate()[0])
    try:
        return decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        where = f"byte 0x{error.object[error.start]:02X} at offset {offset - held_back + error.start}"
        raise UserError(f"text_files={name!r}: is not UTF-8 ({where}); convert it, as with iconv -t UTF-8") from error
