"""Tables as rows: the one reader of JSON, CSV, parquet and arrow files, plain or compressed, for every verb.

A line ends with a line feed, a carriage return or both; no other character ends one. What is not UTF-8, not JSON, or
not of the table's shape is one bad row, and the rows after it are read.
"""

import csv
import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..system.errors import UserError
from .files import DAMAGED, is_compressed, open_bytes, without_compression

ROWS_AT_ONCE = 32  # of parquet: bounds memory where documents are long
BUFFER_BYTES = 1 << 20  # a column of a row group is read through such a window, however large the row group is
LONGEST_CELL = 2**31 - 1  # characters; Python's csv module stops at 131,072 by itself
ENDINGS = {  # as `datasets` knows them
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".geoparquet": "parquet", ".gpq": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}


class Row(NamedTuple):
    """One row: its number from 0, its place in words, and its values by column, or why it is bad."""

    number: int
    place: str
    values: dict[str, Any]
    why_bad: str = ""


def named_format(name: str) -> str | None:
    """Return the format that a file's name ends as, compressed or not; None for no table's."""
    return ENDINGS.get(Path(without_compression(name)).suffix.lower())


def format_of(path: Path, name: str) -> str | None:
    """Return the format of a table's file, by the ending of its name or else by its first bytes; None for no table."""
    if named := named_format(name):
        return named
    try:
        with open_bytes(path) as file:
            head = file.read(1024)
    except DAMAGED:
        return None
    by_content = next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)
    return by_content or ("json" if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[") else None)


def read_rows(path: Path, name: str, columns: list[str] | None = None, first: int = 0) -> Iterator[Row]:
    """Yield the rows of a file from number `first` on; `columns` (None: all) are those that parquet need read.

    Raises UserError for a column that the table lacks, and one of `bad_file_errors` where the file cannot be read on.
    """
    for row in READERS[format_of(path, name)](path, name, columns, first):
        missing = [] if row.why_bad else [column for column in columns or () if column not in row.values]
        if missing and row.number == 0:
            raise missing_column(missing[0], name, row.values)
        yield row._replace(why_bad=f"has no column {missing[0]!r}") if missing else row


def missing_column(column: str, name: str, columns) -> UserError:
    """Say that a table has no such column, and which it has."""
    return UserError(f"text_column={column!r}: {name} has no such column; it has {', '.join(map(str, columns))}")


def bad_file_errors() -> tuple[type[Exception], ...]:
    """Return what reading a damaged table raises."""
    import pyarrow

    return (pyarrow.ArrowException, ValueError, RuntimeError, *DAMAGED)  # the first ones are `datasets`' too


# --- text: JSON and CSV -----------------------------------------------------------------------------------------------


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """Open as UTF-8 without its byte-order mark; bytes that are none become lone surrogates, to be refused by row."""
    return io.TextIOWrapper(
        io.BufferedReader(open_bytes(path)), encoding="utf-8-sig", errors="surrogateescape", newline=newline
    )


def _json_rows(path: Path, name: str, columns: list[str] | None, first: int) -> Iterator[Row]:
    """Yield the objects of a file: one a line, or one list of them, or a single one over several lines."""
    with _open_text(path) as file:
        if _is_one_value(path):
            content, why = _parse_json(file.read())
            if why:
                raise ValueError(f"it {why}")
            entries = content if isinstance(content, list) else [content]
            for number, entry in enumerate(entries[first:], start=first):
                yield _json_row(number, f"entry {number + 1}", entry)
            return
        lines = ((line_number, line) for line_number, line in enumerate(file, 1) if line.strip())
        for number, (line_number, line) in enumerate(lines):
            if number >= first:
                yield _json_row(number, f"line {line_number}", *_parse_json(line))


def _is_one_value(path: Path) -> bool:
    """Say whether a file holds one list, or one object over several lines; else it has an object a line."""
    with _open_text(path) as file:
        line = next((line for line in file if line.strip()), "").strip()
    if not line.startswith("{"):
        return line.startswith("[")
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        return getattr(error, "pos", 0) >= len(line)
    return False


def _parse_json(text: str) -> tuple[Any, str]:
    """Return (value, why there is none)."""
    try:
        return json.loads(text), ""
    except RecursionError:
        return None, "is nested too deeply"
    except ValueError as error:
        return None, why_not_utf8(text) or f"is not JSON ({error})"


def _json_row(number: int, place: str, value: Any, why: str = "") -> Row:
    if not why and not isinstance(value, dict):
        why = f"holds {type(value).__name__}, not an object with columns"
    return Row(number, place, {} if why else value, why)


def _csv_rows(path: Path, name: str, columns: list[str] | None, first: int, delimiter: str = ",") -> Iterator[Row]:
    """Yield the rows below a header; every cell is text, as it is written, and may hold quoted line breaks."""
    csv.field_size_limit(LONGEST_CELL)
    number = -1
    with _open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, None) or []
        if why := why_not_utf8("".join(header)):
            raise ValueError(f"its header {why}")
        while True:
            line, why = reader.line_num + 1, ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells, why = ["?"], f"is not CSV ({error})"
            if not cells:
                continue
            number += 1
            if not why and len(cells) != len(header):
                why = f"has {len(cells)} cells, and the header has {len(header)}"
            if number >= first:
                yield Row(number, f"line {line}", {} if why else dict(zip(header, cells, strict=True)), why)


def why_not_utf8(text: str) -> str:
    """Say which byte or character of a text cannot be written as UTF-8, if one cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        byte = f"byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate U+{code:04X}"
        return f"is not UTF-8 ({byte} at character {error.start})"
    return ""


def text_of(value: Any, column: str) -> tuple[str, str]:
    """Return (text, why it is none): nothing at all is a text of no characters."""
    if value is None:
        return "", ""
    if not isinstance(value, str):
        return "", f"holds {type(value).__name__} in {column!r}, not text"
    return value, why_not_utf8(value)


# --- parquet and arrow ------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path, name: str, columns: list[str] | None, first: int) -> Iterator[Row]:
    """Yield the rows from `first` on; row groups before it are not read."""
    with open_parquet(path, name, columns) as file:
        end = 0
        for group in range(file.num_row_groups):
            start, end = end, end + file.metadata.row_group(group).num_rows
            if end <= first:
                continue
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                yield from _rows_of_batch(batch, start, first)
                start += len(batch)


def _rows_of_batch(batch, start: int, first: int) -> Iterator[Row]:
    wanted = max(0, first - start)
    batch, start = batch.slice(wanted), start + wanted
    try:
        rows = batch.to_pylist()
    except ValueError as error:  # a text that is not UTF-8, or a date that Python has not: which row's?
        if len(batch) == 1:
            yield Row(start, f"row {start + 1}", {}, f"cannot be read ({error})")
            return
        for at in range(len(batch)):
            yield from _rows_of_batch(batch.slice(at, 1), start + at, first)
        return
    for number, values in enumerate(rows, start=start):
        yield Row(number, f"row {number + 1}", values)


def open_parquet(path: Path, name: str, columns: list[str] | None):
    """Open a parquet file that has the columns; raise UserError naming the columns there are."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(_seekable(path), buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
    for column in columns or ():
        if column not in file.schema_arrow.names:
            names = file.schema_arrow.names
            file.close()
            raise missing_column(column, name, names)
    return file


def _seekable(path: Path) -> Path | io.BytesIO:
    """Return the file, or all that is in it where it is compressed: tables of columns are not read in order."""
    if not is_compressed(path):
        return path
    with open_bytes(path) as file:
        return io.BytesIO(file.read())


def _arrow_rows(path: Path, name: str, columns: list[str] | None, first: int) -> Iterator[Row]:
    """Yield the rows of an arrow file or stream, batch by batch."""
    import pyarrow

    source = _seekable(path)
    with source.open("rb") if isinstance(source, Path) else source as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        start = 0
        for batch in batches:
            for at in range(0, len(batch), ROWS_AT_ONCE):
                few = batch.slice(at, ROWS_AT_ONCE)
                few = few.select(columns) if columns and set(columns) <= set(few.schema.names) else few
                if start + len(few) > first:
                    yield from _rows_of_batch(few, start, first)
                start += len(few)


# (path, name, the columns that are wanted or None for all, the first row that is wanted) -> rows
READERS: dict[str, Callable[[Path, str, list[str] | None, int], Iterator[Row]]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "tsv": functools.partial(_csv_rows, delimiter="\t"),
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}
