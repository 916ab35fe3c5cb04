"""Tables of documents: files of rows, and data sets on the Hub or in local directories.

Whatever its files come from, a table is read by `rows.read_rows`, a few rows at a time and without a second copy in a
cache: a data set on the Hub, a folder of it and --data_files take the same way. Other formats are read by `datasets`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from ..system.errors import UserError, log_once, one_line, unknown
from .documents import Document
from .files import Files, Size, as_list, files_below, fingerprint_files, is_compressed, match_files, skip_file, skip_row
from .rows import (
    ENDINGS,
    Row,
    bad_file_errors,
    format_of,
    is_named_as_table,
    missing_column,
    open_parquet,
    read_rows,
    text_of,
)

PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own conversion, which also exists where a script was the data set
MEND = "fix the file, or skip what is bad with --on_bad_file skip"


# --- files of rows ----------------------------------------------------------------------------------------------------


def read_data_files(data, after: list[int] | None, skipped: dict) -> Iterator[Document]:
    """Yield a document a row of the files that `data_files` names, from the place after `after` ([file, row]) on."""
    return _texts("data_files", *_names_and_paths(find_data_files(data.data_files)), data, after, skipped)


def fingerprint_data_files(data) -> dict:
    """Return the column that is read, and what the files hold."""
    return {"text_column": data.text_column} | fingerprint_files(find_data_files(data.data_files))


def size_of_data_files(data) -> Size:
    """Return the rows and bytes of text, as far as footers and file sizes tell; refuse a bad footer before any work."""
    return _size_of_tables("data_files", find_data_files(data.data_files), data)


def find_data_files(entries: list[str] | str) -> Files:
    """Resolve files, globs and addresses to (name, local path), each once, and refuse what is no table."""
    found: dict[Path, str] = {}
    for entry in as_list("data_files", entries):
        for name, path in _tables_below(Path(entry)) if Path(entry).is_dir() else match_files("data_files", entry):
            found.setdefault(path, name)
    for path, name in found.items():
        if not path.stat().st_size:
            raise UserError(f"data_files={name!r}: the file is empty; name one with rows in it")
        if format_of(path, name) is None:
            kinds = ", ".join(ENDINGS)
            raise UserError(f"data_files={name!r}: is not a known kind of table ({kinds}, compressed or not); "
                            "or use text_files")  # fmt: skip
    return [(name, path) for path, name in found.items()]


def _tables_below(folder: Path) -> Files:
    """List the files of a folder whose endings are those of tables, and say how much that is."""
    files = [path for path in files_below("data_files", folder) if is_named_as_table(path.name)]
    if not files:
        raise UserError(f"data_files={str(folder)!r}: the folder holds no table ({', '.join(ENDINGS)}); name one")
    size = sum(path.stat().st_size for path in files)
    log_once(f"data_files={str(folder)!r}: {len(files):,} table{'s' * (len(files) > 1)}, {size:,} bytes")
    return [(str(path), path) for path in files]


def _names_and_paths(files: Files) -> tuple[list[str], Callable[[str], Path]]:
    """Return the names, and what finds the path of each."""
    return [name for name, _ in files], dict(files).__getitem__


def rows_of_data_files(data, skipped: dict) -> Iterator[tuple[str, Row]]:
    """Yield (file, whole row) of all that `data_files` names; what is bad is refused or left out."""
    names, locate = _names_and_paths(find_data_files(data.data_files))
    return ((names[index], row) for index, row in _rows("data_files", names, locate, data, None, None, skipped))


def _rows(
    field: str,
    names: list[str],
    locate: Callable[[str], Path],
    data,
    columns: list[str] | None,
    after: list[int] | None,
    skipped: dict,
) -> Iterator[tuple[int, Row]]:
    """Yield (number of its file, row), good ones alone; `locate` brings a file to this machine when its turn comes."""
    file, last = after or (0, -1)
    for index in range(file, len(names)):
        name, number = names[index], last if index == file else -1
        path = locate(name)
        try:
            for row in read_rows(path, name, columns, number + 1):
                number = row.number
                if row.why_bad:
                    skip_row(data, skipped, field, name, row, row.why_bad)
                else:
                    yield index, row
        except bad_file_errors() as error:
            what = f"{field}={name!r}: cannot be read ({one_line(error)}), from row {number + 1} on"
            skip_file(data, skipped, name, UserError(f"{what}; {MEND}"))


def _texts(
    field: str, names: list[str], locate: Callable[[str], Path], data, after: list[int] | None, skipped: dict
) -> Iterator[Document]:
    """Yield a document a row; a row without any text is none."""
    for index, row in _rows(field, names, locate, data, [data.text_column], after, skipped):
        text, why = text_of(row.values[data.text_column], data.text_column)
        if why:
            skip_row(data, skipped, field, names[index], row, why)
        elif text:
            yield Document(f"{names[index]}:{row.number}", text, [index, row.number])


def _size_of_tables(field: str, files: Files, data) -> Size:
    """Add up rows and bytes; text formats do not tell their rows, and their other columns count as text."""
    sizes = [_size_of_table(field, name, path, data) for name, path in files]
    documents, sizes_in_bytes = [size.documents for size in sizes], [size.bytes for size in sizes]
    return Size(*(None if None in column else sum(column) for column in (documents, sizes_in_bytes)))


def _size_of_table(field: str, name: str, path: Path, data) -> Size:
    if is_compressed(path):
        return Size()
    if format_of(path, name) != "parquet":
        return Size(None, path.stat().st_size)
    try:
        with open_parquet(path, name, [data.text_column]) as file:
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
            columns = [group.column(index) for group in groups for index in range(group.num_columns)]
            texts = [column for column in columns if column.path_in_schema == data.text_column]
            return Size(file.metadata.num_rows, sum(column.total_uncompressed_size for column in texts))
    except bad_file_errors() as error:
        if data.on_bad_file == "skip":
            return Size(0, 0)  # reading it says so
        raise UserError(f"{field}={name!r}: cannot be read ({one_line(error)}); {MEND}") from error


# --- data sets on the Hub, or in local directories --------------------------------------------------------------------


def read_dataset(data, after: list[int] | None, skipped: dict) -> Iterator[Document]:
    """Yield a document a row of a Hub data set or a folder of one: tables as they lie, others row by row."""
    files = _table_files(data)
    if files is not None:
        yield from _texts("dataset", files, lambda name: _downloaded(data, name), data, after, skipped)
        return
    for row in _loaded_rows(data, after[0] + 1 if after else 0):
        if data.text_column not in row.values:
            raise missing_column(data.text_column, data.dataset, row.values)
        text, why = text_of(row.values[data.text_column], data.text_column)
        if why:
            skip_row(data, skipped, "dataset", data.dataset, row, why)
        elif text:
            yield Document(f"{data.dataset}:{row.number}", text, [row.number])


def rows_of_dataset(data, skipped: dict) -> Iterator[tuple[str, Row]]:
    """Yield (file or data set, whole row) of a Hub data set or a folder of one."""
    files = _table_files(data)
    if files is None:
        yield from ((data.dataset, row) for row in _loaded_rows(data, 0))
        return
    rows = _rows("dataset", files, lambda name: _downloaded(data, name), data, None, None, skipped)
    yield from ((files[index], row) for index, row in rows)


def _loaded_rows(data, first: int) -> Iterator[Row]:
    rows = load_rows(data)
    rows = rows.skip(first) if first else rows
    for number, values in enumerate(_guarded(rows, data), start=first):
        yield Row(number, f"row {number + 1}", values)


def _guarded(rows, data) -> Iterator[dict]:
    try:
        yield from rows
    except bad_file_errors() as error:
        why = f"dataset={data.dataset!r}: cannot be read on ({one_line(error)})"
        raise UserError(f"{why}; the same command goes on from where it was") from error


def _table_files(data) -> list[str] | None:
    """Return the files of the split (paths, or hf:// addresses) where `read_rows` reads them, or None for `datasets`.

    Streaming is for what would have to be downloaded: what lies here is read as it lies.
    """
    if data.streaming and not Path(data.dataset).is_dir():
        return None
    builder = _load(data, "load_dataset_builder", name=data.dataset_config)
    files = {str(split): list(map(str, names)) for split, names in (builder.config.data_files or {}).items()}
    is_plain = not set("[+") & set(data.dataset_split)  # slices and sums of splits are for `datasets`
    if builder.info.builder_name not in ("parquet", "json", "csv", "arrow") or not is_plain or _is_configured(builder):
        return None
    if data.dataset_split not in files:
        raise unknown("dataset_split", data.dataset_split, files, f"It is of dataset={data.dataset!r}.")
    return files[data.dataset_split]


def _is_configured(builder) -> bool:
    """Say whether a data set's own page tells how its files are to be read, beyond their names."""
    usual = {"field": (None,), "sep": (",", "\t"), "delimiter": (None,), "column_names": (None,), "names": (None,)}
    return any(getattr(builder.config, key, values[0]) not in values for key, values in usual.items())


def _downloaded(data, name: str) -> Path:
    """Return the local path of a file of the data set: itself, or the copy in the Hub's cache, fetched now."""
    from datasets import DownloadManager

    try:
        return Path(DownloadManager().download(name))
    except Exception as error:  # httpx, fsspec, Hub and OSErrors: all mean that the file did not come
        why = f"dataset={data.dataset!r}: {name} cannot be downloaded ({one_line(error)})"
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
    return UserError(f"dataset={name!r}: cannot be loaded ({why}); {hint}")


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
    files = _table_files(data)
    if files is not None and all(Path(name).is_file() for name in files):
        return _size_of_tables("dataset", [(name, Path(name)) for name in files], data)
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
