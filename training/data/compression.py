"""Files plain or compressed, which their first bytes tell: gzip, bzip2, xz, zstandard, lz4, and zip of one file."""

import bz2
import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..system.errors import UserError, one_line

ENDINGS = (".gz", ".gzip", ".bz2", ".xz", ".lzma", ".zst", ".zstd", ".lz4", ".zip")  # that a table's name may have
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
    while name.lower().endswith(ENDINGS):
        name = name.rpartition(".")[0]
    return name


def damaged(field: str, name: str, error: BaseException, mend: str = "check it") -> UserError:
    """Say that a file cannot be read, and why."""
    why = getattr(error, "strerror", None) or one_line(error)
    return UserError(f"{field}={name!r}: cannot be read ({why}); {mend}")
