"""Tables of documents: .jsonl, .json and .parquet files, and data sets on the Hub or in local directories.

Parquet is read by pyarrow, a few rows at a time and without a second copy in a cache, wherever its files come from: so
a data set on the Hub, a folder of it and --data_files take the same way. Other formats are read by `datasets`.
"""

import glob
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from .errors import UserError, one_line, unknown
from .reading import Part, Size, as_list, fingerprint_files, leave_out, match_files

PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own conversion, which also exists where a script was the data set
ROWS_AT_ONCE = 32  # of parquet: bounds memory where documents are long
BUFFER_BYTES = 1 << 20  # a column of a row group is read through such a window, however large the row group is


# --- files: .jsonl, .json, .parquet -----------------------------------------------------------------------------------


def read_data_files(data, after: list[int] | None, left_out: dict[str, str]) -> Iterator[Part]:
    """Yield a document a row of the files that `data_files` names, from the place after `after` ([file, row]) on."""
    names = [str(path) for path in find_data_files(data.data_files)]
    return _read_tables("data_files", names, Path, data, after, left_out)


def fingerprint_data_files(data) -> dict:
    """Return the column that is read, and what the files hold."""
    files = [(str(path), path) for path in find_data_files(data.data_files)]
    return {"text_column": data.text_column} | fingerprint_files(files)


def size_of_data_files(data) -> Size:
    """Return the rows and bytes of text, as far as footers and file sizes tell; refuse a bad footer before any work."""
    return _size_of_tables("data_files", find_data_files(data.data_files), data)


def find_data_files(entries: list[str] | str) -> list[Path]:
    """Resolve files and globs to paths, each once, and refuse endings that nothing reads."""
    paths = list(dict.fromkeys(path for entry in as_list(entries) for path in match_files("data_files", entry)))
    for path in paths:
        if path.suffix not in TABLES:
            endings = ", ".join(TABLES)
            raise UserError(f"data_files={str(path)!r}: the ending must be one of {endings}; or use text_files")
        if not path.stat().st_size:
            raise UserError(f"data_files={str(path)!r}: the file is empty; name one with rows in it")
    return paths


def _read_tables(
    field: str, names: list[str], locate: Callable[[str], Path], data, after: list[int] | None, left_out: dict[str, str]
) -> Iterator[Part]:
    """Yield a document a row; `locate` brings a file to this machine when its turn comes."""
    file, row = after or (0, -1)
    for index in range(file, len(names)):
        name, first = names[index], row + 1 if index == file else 0
        path, number = locate(name), first - 1
        rows = TABLES[Path(name).suffix](path, name, data.text_column, first)
        try:
            for number, text in rows:
                yield Part([index, number], f"{name}:{number}", _checked_text(text, field, name, number, data))
        except _bad_file_errors() as error:
            what = f"{field}={name!r}: can not be read ({one_line(error)}), from row {number + 1} on"
            mend = "mend the file, or leave out what is bad with --on_bad_file skip"
            leave_out(data, left_out, name, UserError(f"{what}; {mend}"))


def _bad_file_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, ValueError, OSError, RuntimeError)  # the last ones are raised by `datasets`


def _checked_text(text, field: str, name: str, number: int, data) -> str:
    if not isinstance(text, str):
        kind, column = type(text).__name__, data.text_column
        raise UserError(f"{field}={name!r}: row {number} holds {kind} in {column!r}, not text; name another column")
    return text


def _missing_column(column: str, name: str, columns) -> UserError:
    return UserError(f"text_column={column!r}: {name} has no such column; it has {', '.join(columns)}")


def _parquet_rows(path: Path, name: str, column: str, first: int) -> Iterator[tuple[int, str]]:
    """Yield (row, text) from row `first` on; row groups before it are not read."""
    with _open_parquet(path, name, column) as file:
        end = 0
        for group in range(file.num_row_groups):
            start, end = end, end + file.metadata.row_group(group).num_rows
            if end <= first:
                continue
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False):
                wanted = max(0, first - start)
                yield from enumerate(batch.column(0).slice(wanted).to_pylist(), start=start + wanted)
                start += len(batch)


def _open_parquet(path: Path, name: str, column: str):
    """Open a parquet file that has the column; raise UserError naming the columns there are."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
    if column not in file.schema_arrow.names:
        file.close()
        raise _missing_column(column, name, file.schema_arrow.names)
    return file


def _json_rows(path: Path, name: str, column: str, first: int) -> Iterator[tuple[int, str]]:
    """Yield (row, text) from row `first` on; those before it are read and passed over."""
    from datasets import load_dataset

    # streamed, so that no second copy of the text lands in the cache
    rows = load_dataset("json", data_files=glob.escape(str(path)), split="train", streaming=True)
    for number, row in islice(enumerate(rows), first, None):
        if column not in row:
            raise _missing_column(column, name, row)
        yield number, row[column]


TABLES = {".jsonl": _json_rows, ".json": _json_rows, ".parquet": _parquet_rows}


def _size_of_tables(field: str, paths: list[Path], data) -> Size:
    """Add up rows and bytes; JSON does not tell its rows, and its escapes and other columns count as text."""
    sizes = [_size_of_table(field, path, data) for path in paths]
    known = all(size.documents is not None for size in sizes)
    return Size(sum(size.documents for size in sizes) if known else None, sum(size.bytes for size in sizes))


def _size_of_table(field: str, path: Path, data) -> Size:
    if path.suffix != ".parquet":
        return Size(None, path.stat().st_size)
    try:
        with _open_parquet(path, str(path), data.text_column) as file:
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
            columns = [group.column(index) for group in groups for index in range(group.num_columns)]
            texts = [column for column in columns if column.path_in_schema == data.text_column]
            return Size(file.metadata.num_rows, sum(column.total_uncompressed_size for column in texts))
    except _bad_file_errors() as error:
        if data.on_bad_file == "skip":
            return Size(0, 0)  # reading it says so
        mend = "mend the file, or leave out what is bad with --on_bad_file skip"
        raise UserError(f"{field}={str(path)!r}: can not be read ({one_line(error)}); {mend}") from error


# --- data sets on the Hub, or in local directories --------------------------------------------------------------------


def read_dataset(data, after: list[int] | None, left_out: dict[str, str]) -> Iterator[Part]:
    """Yield a document a row of a Hub data set or a folder of one: parquet files as they lie, others row by row."""
    files = _parquet_files(data)
    if files is not None:
        yield from _read_tables("dataset", files, lambda name: _downloaded(data, name), data, after, left_out)
        return
    first = after[0] + 1 if after else 0
    rows = load_rows(data)
    rows = rows.skip(first) if first else rows
    for number, row in enumerate(_guarded(rows, data), start=first):
        if data.text_column not in row:
            raise _missing_column(data.text_column, data.dataset, row)
        text = _checked_text(row[data.text_column], "dataset", data.dataset, number, data)
        yield Part([number], f"{data.dataset}:{number}", text)


def _guarded(rows, data) -> Iterator[dict]:
    try:
        yield from rows
    except _bad_file_errors() as error:
        why = f"dataset={data.dataset!r}: can not be read on ({one_line(error)})"
        raise UserError(f"{why}; the same command goes on from where it was") from error


def _parquet_files(data) -> list[str] | None:
    """Return the parquet files of the split (paths, or hf:// addresses), or None where rows are read otherwise."""
    if data.streaming:
        return None
    builder = _load(data, "load_dataset_builder", name=data.dataset_config)
    files = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    is_plain = not set("[+") & set(data.dataset_split)  # slices and sums of splits are for `datasets`
    if builder.info.builder_name != "parquet" or not is_plain:
        return None
    if data.dataset_split not in files:
        raise unknown("dataset_split", data.dataset_split, files, f"It is of dataset={data.dataset!r}.")
    return [str(name) for name in files[data.dataset_split]]


def _downloaded(data, name: str) -> Path:
    """Return the local path of a file of the data set: itself, or the copy in the Hub's cache, fetched now."""
    from datasets import DownloadManager

    try:
        return Path(DownloadManager().download(name))
    except Exception as error:  # httpx, fsspec, Hub and OSErrors: all mean that the file did not come
        why = f"dataset={data.dataset!r}: {name} can not be downloaded ({one_line(error)})"
        raise UserError(f"{why}; the same command goes on from where it was") from error


def load_rows(data):
    """Load the rows with `datasets.load_dataset`.

    Plain text files come as whole documents: by default `datasets` would make a row a line and drop the line breaks.
    """
    options = {"name": data.dataset_config, "split": data.dataset_split, "streaming": data.streaming}
    rows = _load(data, "load_dataset", **options)
    if rows.info.builder_name == "text":
        rows = _load(data, "load_dataset", sample_by="document", **options)
    return rows


def _load(data, loader: str, **options):
    """Call a loader of `datasets`: the data set as it is, or, where it was a script, the Hub's conversion of it."""
    import datasets

    load, name = getattr(datasets, loader), data.dataset
    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        return load(name, **options)
    except failures as error:
        is_script = isinstance(error, RuntimeError) and "script" in str(error)
        if not is_script:
            raise _not_loaded(name, one_line(error)) from error
    try:
        return load(name, revision=PARQUET_REVISION, **options)
    except failures as error:
        why = f"it needs a script, which `datasets` no longer runs, and its parquet revision: {one_line(error)}"
        raise _not_loaded(name, why) from error


def _not_loaded(name: str, why: str) -> UserError:
    if Path(name).exists():
        hint = "check dataset_config and dataset_split, or name its files with --data_files"
    else:
        hint = (
            "check id, dataset_config and dataset_split; without a network, fetch its parquet files elsewhere and name "
            "them with --data_files 'FOLDER/*.parquet'"
        )
    return UserError(f"dataset={name!r}: can not be loaded ({why}); {hint}")


def fingerprint_dataset(data) -> dict:
    """Return id, configuration, split, column and revision, or the contents of a local directory."""
    choice = {"id": data.dataset, "config": data.dataset_config, "split": data.dataset_split}
    choice["text_column"] = data.text_column
    if not Path(data.dataset).is_dir():
        return choice | {"revision": _hub_revision(data.dataset)}
    return choice | fingerprint_files([(str(path.relative_to(data.dataset)), path) for path in _files_below(data)])


def _files_below(data) -> list[Path]:
    return [path for path in sorted(Path(data.dataset).rglob("*")) if path.is_file()]


def size_of_dataset(data) -> Size:
    """Return the size of local files, or what the Hub's card of the data set says."""
    files = _parquet_files(data)
    if files is not None and all(Path(name).is_file() for name in files):
        return _size_of_tables("dataset", [Path(name) for name in files], data)
    if Path(data.dataset).is_dir():
        return Size(None, sum(path.stat().st_size for path in _files_below(data)))
    info = _load(data, "load_dataset_builder", name=data.dataset_config).info
    split = (info.splits or {}).get(data.dataset_split)
    return Size(split.num_examples or None, split.num_bytes or None) if split is not None else Size()


def _hub_revision(dataset: str) -> str | None:
    """Return the commit that the data set is at, or None where the Hub does not answer (a cached copy may serve)."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, timeout=10).sha
    except Exception:  # no network, no such id, no access: loading it is what tells the person which
        return None
