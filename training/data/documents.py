"""Documents, and the three kinds of source that hold them: text files, tables of rows, and data sets of the Hub."""

import atexit
import bisect
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..system.errors import UserError, log_once, one_line, unknown
from .files import Files, find_files, fingerprint_files, is_compressed, looks_like_text, read_text
from .rows import (
    ENDINGS,
    Row,
    bad_file_errors,
    format_of,
    missing_column,
    named_format,
    open_parquet,
    read_rows,
    text_of,
)  # fmt: skip

PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own conversion, which also exists where a script was the data set
FIX = "fix it, or skip what is bad with --on_bad_file skip"
GO_ON = "the same command goes on from where it was"


class Document(NamedTuple):
    """A text, or a stretch of one.

    name: of its file and row, for messages. place: where it lies in its source, as [file], [file, row] or [row].
    number: of the document in all that is read, once it is counted; one that a mixture draws twice has one number.
    at: how many characters of the document lie before this stretch. starts, ends: whether it is the document's first
    and last stretch (within its split, where there is one). split: "train" or "validation", once that is decided.
    """

    name: str
    text: str
    place: list[int]
    number: int = -1
    at: int = 0
    starts: bool = True
    ends: bool = True
    split: str = ""


class Position(NamedTuple):
    """Where reading goes on: behind so many whole documents, and so many stretches of the one after them.

    place: of the last whole document in its source; None: there is none. characters: of all the whole documents.
    """

    documents: int = 0
    place: list[int] | None = None
    stretches: int = 0
    characters: int = 0

    def after(self, document: Document) -> "Position":
        """Return the position behind the next stretch."""
        if not document.ends:
            return self._replace(stretches=self.stretches + 1)
        characters = self.characters + document.at + len(document.text)
        return Position(self.documents + 1, document.place, 0, characters)


START = Position()
PlacedRow = tuple[str, list[int], Row]  # the name of its file, its place, and itself


class Size(NamedTuple):
    """How much text a source holds, where that is known without reading it; bytes are an estimate."""

    documents: int | None = None
    bytes: int | None = None


class Source(ABC):
    """A source of documents, as `data` (the data arguments) names it in `field`.

    skipped: what on_bad_file=skip leaves out, a dict fit for JSON: of a file why, and of rows why the first is, and
    their numbers. It may hold what was skipped before a preparation was stopped.
    """

    field = ""

    def __init__(self, data, skipped: dict | None = None):
        self.data, self.skipped = data, {} if skipped is None else skipped

    def skip_file(self, name: str, error: UserError) -> None:
        """Raise the error about a file, or, with on_bad_file=skip, log it once and remember it."""
        if self.data.on_bad_file == "stop":
            raise error
        if name not in self.skipped:
            self.skipped[name] = str(error)
            log_once(f"skipped: {error}")

    def skip_row(self, name: str, row: Row, why: str) -> None:
        """Raise what is wrong with a row, or, with on_bad_file=skip, remember its number; a file's first is logged."""
        error = UserError(f"{self.field}={name!r}: {row.place}: {why}; {FIX}")
        if self.data.on_bad_file == "stop":
            raise error
        entry = self.skipped.setdefault(f"rows of {name}", {"why": f"{row.place}: {why}", "rows": []})
        numbers, place = entry["rows"], bisect.bisect_left(entry["rows"], row.number)
        if not numbers:
            log_once(f"skipped: {error}")
        if numbers[place : place + 1] != [row.number]:  # it is read several times
            numbers.insert(place, row.number)

    @abstractmethod
    def read(self, after: list[int] | None = None) -> Iterator[Document]:
        """Yield the documents behind the one whose place is `after`, in an order that never changes."""

    @abstractmethod
    def fingerprint(self) -> dict:
        """Return what identifies the text, as a dict fit for JSON."""

    @abstractmethod
    def size(self) -> Size:
        """Return how much text there is, as far as that is known without reading it."""


def skipped_in_words(skipped: dict) -> dict[str, str]:
    """Return what was skipped, and why."""
    counted = {name: entry for name, entry in skipped.items() if isinstance(entry, dict)}
    return skipped | {name: f"{len(entry['rows']):,}, the first: {entry['why']}" for name, entry in counted.items()}


# --- text files: one file, one document -------------------------------------------------------------------------------


class TextFiles(Source):
    """Files, folders, globs and addresses; of a folder those that are no binaries, which their first 8 kB show."""

    field = "text_files"

    @cached_property
    def files(self) -> Files:
        """Return (name, local path) of each file."""
        return find_files(self.field, self.data.text_files, looks_like_text, "text file")

    def read(self, after: list[int] | None = None) -> Iterator[Document]:
        """Yield the files in stretches of about STRETCH_BYTES."""
        first = after[0] + 1 if after else 0
        for index, (name, path) in enumerate(self.files[first:], start=first):
            if self.data.on_bad_file == "skip":
                try:
                    for _ in read_text(path, name):  # all of it, before any of it is used
                        pass
                except UserError as error:
                    self.skip_file(name, error)
                    continue
            for text, ends in read_text(path, name):
                yield Document(name, text, [index], ends=ends)

    def fingerprint(self) -> dict:
        """Return what the files hold."""
        return fingerprint_files(self.files)

    def size(self) -> Size:
        """Return files and bytes; how much a compressed one holds is not known before it is read."""
        paths = [path for _, path in self.files]
        return Size(len(paths), None if any(map(is_compressed, paths)) else sum(path.stat().st_size for path in paths))


class StandardLibrary(TextFiles):
    """The top-level modules of the running Python's standard library, by name."""

    @cached_property
    def files(self) -> Files:
        """Return those that hold anything."""
        paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return [(path.name, path) for path in paths if path.stat().st_size]

    def fingerprint(self) -> dict:
        """Return the version and the files: a distributor may have patched a module."""
        return {"python": platform.python_version()} | super().fingerprint()


# --- tables: one row, one document ------------------------------------------------------------------------------------


class Tables(Source):
    """Files of rows: JSON, CSV, parquet and arrow, read a few rows at a time and without a second copy in a cache."""

    field = "data_files"

    @cached_property
    def files(self) -> Files:
        """Return (name, local path) of each file, and refuse what is no table."""
        files = find_files("data_files", self.data.data_files, lambda path: bool(named_format(path.name)), "table")
        for name, path in files:
            if not path.stat().st_size:
                raise UserError(f"data_files={name!r}: the file is empty; name one with rows in it")
            if format_of(path, name) is None:
                raise UserError(f"data_files={name!r}: is not a known kind of table ({', '.join(ENDINGS)}, compressed "
                                "or not); or use text_files")  # fmt: skip
        return files

    @cached_property
    def names(self) -> list[str]:
        """Return the names of the files."""
        return [name for name, _ in self.files]

    def locate(self, index: int) -> Path:
        """Return where a file lies on this machine."""
        return self.files[index][1]

    def rows(self, columns: list[str] | None = None, after: list[int] | None = None) -> Iterator[PlacedRow]:
        """Yield (file, place, row) of all rows that can be read, with all columns or those that are wanted."""
        first, last = after or (0, -1)
        for index, name in enumerate(self.names[first:], start=first):
            path, number = self.locate(index), last if index == first else -1
            try:
                for row in read_rows(path, name, columns, number + 1):
                    number = row.number
                    if row.why_bad:
                        self.skip_row(name, row, row.why_bad)
                    else:
                        yield name, [index, number], row
            except bad_file_errors() as error:
                what = f"{self.field}={name!r}: cannot be read ({one_line(error)}), from row {number + 1} on"
                self.skip_file(name, UserError(f"{what}; {FIX}"))

    def read(self, after: list[int] | None = None) -> Iterator[Document]:
        """Yield a document a row; a row without any text is none."""
        column = self.data.text_column
        for name, place, row in self.rows([column], after):
            text, why = text_of(row.values[column], column)
            if why:
                self.skip_row(name, row, why)
            elif text:
                yield Document(f"{name}:{row.number}", text, place)

    def fingerprint(self) -> dict:
        """Return the column that is read, and what the files hold."""
        return {"text_column": self.data.text_column} | fingerprint_files(self.files)

    def size(self) -> Size:
        """Add up rows and bytes; text formats do not tell their rows, and their other columns count as text."""
        sizes = [self._size_of(name, self.locate(index)) for index, name in enumerate(self.names)]
        return Size(*(None if None in column else sum(column) for column in zip(*sizes, strict=True)))

    def _size_of(self, name: str, path: Path) -> Size:
        """Return what a parquet file's footer says; refuse a bad one before any work."""
        if is_compressed(path):
            return Size()
        if format_of(path, name) != "parquet":
            return Size(None, path.stat().st_size)
        column = self.data.text_column
        try:
            with open_parquet(path, name, [column]) as file:
                groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
                chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
                texts = [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column]
                return Size(file.metadata.num_rows, sum(texts))
        except bad_file_errors() as error:
            if self.data.on_bad_file == "skip":
                return Size(0, 0)  # reading it says so
            raise UserError(f"{self.field}={name!r}: cannot be read ({one_line(error)}); {FIX}") from error


# --- data sets of the Hub, or in local folders ------------------------------------------------------------------------


class HubSet(Tables):
    """A data set by id or folder: its tables are read as `Tables`, what else it may be is read by `datasets`."""

    field = "dataset"

    @cached_property
    def names(self) -> list[str] | None:
        """Return the split's tables (paths, or hf:// addresses), or None where `datasets` has to read the rows.

        Streaming is for what would have to be downloaded: what lies here is read as it lies.
        """
        data = self.data
        if data.streaming and not Path(data.dataset).is_dir():
            return None
        builder = self._load("load_dataset_builder", name=data.dataset_config)
        files = {str(split): list(map(str, names)) for split, names in (builder.config.data_files or {}).items()}
        is_plain = not set("[+") & set(data.dataset_split)  # slices and sums of splits are for `datasets`
        is_table = builder.info.builder_name in ("parquet", "json", "csv", "arrow")
        if not (is_table and is_plain) or _says_how_to_read(builder):
            return None
        if data.dataset_split not in files:
            raise unknown("dataset_split", data.dataset_split, files, f"It is of dataset={data.dataset!r}.")
        return files[data.dataset_split]

    def locate(self, index: int) -> Path:
        """Return a file itself, or its copy in the Hub's cache, fetched when its turn comes."""
        from datasets import DownloadManager

        name = self.names[index]
        try:
            return Path(DownloadManager().download(name))
        except Exception as error:  # httpx, fsspec, Hub and OSErrors: all mean that the file did not come
            why = f"dataset={self.data.dataset!r}: {name} cannot be downloaded ({one_line(error)})"
            raise UserError(f"{why}; {GO_ON}") from error

    def rows(self, columns: list[str] | None = None, after: list[int] | None = None) -> Iterator[PlacedRow]:
        """Yield (file or data set, place, row)."""
        if self.names is not None:
            yield from super().rows(columns, after)
            return
        name, first = self.data.dataset, after[0] + 1 if after else 0
        rows, failures = self._load_rows(), bad_file_errors()
        stream = iter(rows.skip(first) if first else rows)
        atexit.register(stream.close)  # half-read parquet has threads that keep Python from ending (Arrow issue 45214)
        try:
            for number, values in enumerate(stream, start=first):
                if missing := [column for column in columns or () if column not in values]:
                    raise missing_column(missing[0], name, values)
                yield name, [number], Row(number, f"row {number + 1}", values)
        except failures as error:
            raise UserError(f"dataset={name!r}: cannot be read on ({one_line(error)}); {GO_ON}") from error
        finally:
            atexit.unregister(stream.close)
            stream.close()

    def fingerprint(self) -> dict:
        """Return id, configuration, split, column and revision, or the contents of a local folder."""
        data = self.data
        choice = {"id": data.dataset, "config": data.dataset_config, "split": data.dataset_split}
        choice["text_column"] = data.text_column
        if not Path(data.dataset).is_dir():
            return choice | {"revision": _hub_revision(data.dataset)}
        return choice | fingerprint_files([(str(path.relative_to(data.dataset)), path) for path in self._local_files()])

    def size(self) -> Size:
        """Return the size of local files, or what the Hub's card of the data set says."""
        if self.names is not None and all(Path(name).is_file() for name in self.names):
            return super().size()
        if Path(self.data.dataset).is_dir():
            return Size(None, sum(path.stat().st_size for path in self._local_files()))
        info = self._load("load_dataset_builder", name=self.data.dataset_config).info
        split = (info.splits or {}).get(self.data.dataset_split)
        return Size(split.num_examples or None, split.num_bytes or None) if split is not None else Size()

    def _local_files(self) -> list[Path]:
        return [path for path in sorted(Path(self.data.dataset).rglob("*")) if path.is_file()]

    def _load_rows(self):
        """Load with `datasets`; text files as whole documents: by default a row is a line without its line break."""
        data = self.data
        options = {"name": data.dataset_config, "split": data.dataset_split, "streaming": data.streaming}
        rows = self._load("load_dataset", **options)
        return self._load("load_dataset", sample_by="document", **options) if rows.info.builder_name == "text" else rows

    def _load(self, loader: str, **options):
        """Call a loader of `datasets`: the data set as it is, or, where it was a script, the Hub's conversion of it."""
        import datasets

        load, name = getattr(datasets, loader), self.data.dataset
        failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
        try:
            return load(name, **options)
        except failures as error:
            if not (isinstance(error, RuntimeError) and "script" in str(error)):
                raise _not_loaded(name, one_line(error)) from error
        try:
            return load(name, revision=PARQUET_REVISION, **options)
        except failures as error:
            why = f"it needs a script, which `datasets` no longer runs, and its parquet revision: {one_line(error)}"
            raise _not_loaded(name, why) from error


def _says_how_to_read(builder) -> bool:
    """Say whether a data set's own page tells how its files are to be read, beyond their names."""
    usual = {"field": (None,), "sep": (",", "\t"), "delimiter": (None,), "column_names": (None,), "names": (None,)}
    return any(getattr(builder.config, key, values[0]) not in values for key, values in usual.items())


def _not_loaded(name: str, why: str) -> UserError:
    if Path(name).exists():
        hint = "check dataset_config and dataset_split, or name its files with --data_files"
    else:
        hint = (
            "check id, dataset_config and dataset_split; without a network, fetch its parquet files elsewhere and name "
            "them with --data_files 'FOLDER/*.parquet'"
        )
    return UserError(f"dataset={name!r}: cannot be loaded ({why}); {hint}")


def _hub_revision(dataset: str) -> str | None:
    """Return the commit that the data set is at, or None where the Hub does not answer (a cached copy may serve)."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, timeout=10).sha
    except Exception:  # no network, no such id, no access: loading it is what tells the person which
        return None
