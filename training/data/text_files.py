"""Text files, a document each: the standard library's, and those that a person names by path, folder, glob or URL."""

import codecs
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ..system.errors import UserError, log_once
from .documents import Document
from .files import (
    DAMAGED,
    Files,
    Size,
    as_list,
    damaged,
    files_below,
    fingerprint_files,
    is_compressed,
    match_files,
    open_bytes,
    skip_file,
)

PART_BYTES = 4 << 20  # of a file that is read at once: one book of many gigabytes needs no more memory than a page

BYTE_ORDER_MARK = "\ufeff"


# --- the standard library of the running Python -----------------------------------------------------------------------


def find_stdlib(data) -> Files:
    """List the top-level modules of the standard library that hold anything."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [(path.name, path) for path in paths if path.stat().st_size]


def read_stdlib(data, after: list[int] | None, skipped: dict) -> Iterator[Document]:
    """Yield the modules in the order of their names."""
    return _read_files(find_stdlib(data), data, after, skipped)


def fingerprint_stdlib(data) -> dict:
    """Return the version and the files: a distributor may have patched a module."""
    return {"python": platform.python_version()} | fingerprint_files(find_stdlib(data))


def size_of_stdlib(data) -> Size:
    """Return the number of modules and their bytes."""
    return _size_of(find_stdlib(data))


# --- text files: one file, one document -------------------------------------------------------------------------------


def read_text_files(data, after: list[int] | None, skipped: dict) -> Iterator[Document]:
    """Yield the files after the one numbered `after[0]`, each in parts of about PART_BYTES."""
    return _read_files(find_text_files(data.text_files), data, after, skipped)


def fingerprint_text_files(data) -> dict:
    """Return what the files hold."""
    return fingerprint_files(find_text_files(data.text_files))


def size_of_text_files(data) -> Size:
    """Return the number of files and their bytes."""
    return _size_of(find_text_files(data.text_files))


def _size_of(files: Files) -> Size:
    """Return files and bytes; how much a compressed one holds is not known before it is read."""
    size = None if any(is_compressed(path) for _, path in files) else sum(path.stat().st_size for _, path in files)
    return Size(len(files), size)


def _read_files(files: Files, data, after: list[int] | None, skipped: dict) -> Iterator[Document]:
    first = after[0] + 1 if after else 0
    for index, (name, path) in enumerate(files[first:], start=first):
        if data.on_bad_file == "skip":
            try:
                for _ in read_parts(path, name):  # all of it, before any of it is used
                    pass
            except UserError as error:
                skip_file(data, skipped, name, error)
                continue
        for text, ends in read_parts(path, name):
            yield Document(name, text, [index], ends=ends)


def find_text_files(entries: list[str] | str) -> Files:
    """Resolve files, folders, globs and addresses to (name, local path), each once: entries as given, each one sorted.

    Of a folder come the text files at any depth; hidden, empty and binary ones (a NUL byte) are left out, and it is
    said how much is left.
    """
    found: dict[Path, str] = {}
    for entry in as_list("text_files", entries):
        for name, path in _text_files_below(Path(entry)) if Path(entry).is_dir() else match_files("text_files", entry):
            found.setdefault(path, name)
    return [(name, path) for path, name in found.items()]


def _text_files_below(folder: Path) -> Files:
    """List the text files of a folder; whether one is text is seen from its first 8 kB, as git does."""
    files = files_below("text_files", folder)
    texts = [path for path in files if not _looks_binary(path)]
    if not texts:
        raise UserError(f"text_files={str(folder)!r}: the folder holds no text file; name one that does")
    size = sum(path.stat().st_size for path in texts)
    others = f" (binary ones left out: {len(files) - len(texts):,})" if len(texts) < len(files) else ""
    log_once(f"text_files={str(folder)!r}: {len(texts):,} text file{'s' * (len(texts) > 1)}, {size:,} bytes{others}")
    return [(str(path), path) for path in texts]


def _looks_binary(path: Path) -> bool:
    try:
        with open_bytes(path) as file:
            return b"\0" in file.read(8192)
    except PermissionError as error:
        raise damaged("text_files", str(path), error) from error
    except DAMAGED:  # an archive of several files, or half of one
        return True


def read_parts(path: Path, name: str) -> Iterator[tuple[str, bool]]:
    """Yield (text, is it the last) of a UTF-8 file with its line breaks as they are; refuse an empty or binary one.

    A byte-order mark at its beginning is no part of the text. What is compressed is read as what it holds.
    """
    decoder, offset, is_start, has_text = codecs.getincrementaldecoder("utf-8")(), 0, True, False
    try:
        with open_bytes(path) as file:
            raw = file.read(PART_BYTES)
            while raw:
                following = file.read(PART_BYTES)
                text = _decode(decoder, raw, offset, name, final=not following)
                if is_start and text:
                    is_start, text = False, text.removeprefix(BYTE_ORDER_MARK)
                has_text = has_text or bool(text)
                if not following and not has_text:
                    break
                yield text, not following
                offset, raw = offset + len(raw), following
    except DAMAGED as error:
        raise damaged("text_files", name, error) from error
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
