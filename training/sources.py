"""Where text comes from: the standard library, text files, tables of documents, Hub data sets, and mixtures of them."""

import glob
import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from .errors import UserError, one_line, unknown

PYTHON_STDLIB = "python-stdlib"
PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own conversion, which also exists where a script was the data set
SOURCE_DEFAULTS = {
    "dataset": None,
    "dataset_config": None,
    "dataset_split": "train",
    "text_column": "text",
    "streaming": False,
    "text_files": None,
    "data_files": None,
}


class Document(NamedTuple):
    """One text and its number; a document that a mixture draws twice has the same number both times."""

    number: int
    name: str
    text: str


class Source(NamedTuple):
    """A kind of source: how to read its documents, and what identifies them (a dict fit for JSON)."""

    read: Callable[[Any], Iterator[tuple[str, str]]]
    fingerprint: Callable[[Any], dict]


def documents(data) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document that the data arguments name, in an order that never changes."""
    for document in numbered_documents(data):
        yield document.name, document.text


def numbered_documents(data) -> Iterator[Document]:
    """Yield the documents with their numbers; errors in the sources are raised as UserErrors."""
    kind = source_kind(data)
    if kind == "mixture":
        yield from _mixed_documents(data)
        return
    for number, (name, text) in enumerate(SOURCES[kind].read(data)):
        yield Document(number, name, text)


def source_kind(data) -> str:
    """Return the one kind of source that is named; the standard library stands in and yields to any other."""
    named = named_sources(data)
    if not named:
        raise UserError("no text: name a source, such as --text_files FILE, or --dataset python-stdlib")
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: two sources at once; name one of them, or list both under mixture")
    return named[0]


def named_sources(data) -> list[str]:
    """Return the kinds of source that the data arguments name; the embedded text counts only where it is alone."""
    kinds = [kind for kind in ("mixture", "text_files", "data_files", "dataset") if getattr(data, kind, None)]
    if "dataset" in kinds and data.dataset == PYTHON_STDLIB:
        kinds.remove("dataset")
        kinds = kinds or [PYTHON_STDLIB]
    return kinds


def fingerprint_sources(data) -> dict:
    """Return what identifies the text: contents of local files, id and revision on the Hub, Python's version."""
    kind = source_kind(data)
    if kind == "mixture":
        entries = _mixture_entries(data)
        parts = [{"weight": weight} | fingerprint_sources(entry) for weight, entry in entries]
        return {"kind": kind, "seed": _mixture_seed(data), "parts": parts}
    return {"kind": kind} | SOURCES[kind].fingerprint(data)


def licence_of(data) -> str | None:
    """Return the SPDX name of the text's licence where Acorn knows it."""
    return "PSF-2.0" if named_sources(data) == [PYTHON_STDLIB] else None


# --- the standard library of the running Python -----------------------------------------------------------------------


def _stdlib_files() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _read_stdlib(data) -> Iterator[tuple[str, str]]:
    for path in _stdlib_files():
        if path.stat().st_size:
            yield path.name, read_text(path, str(path))


def _fingerprint_stdlib(data) -> dict:
    # a distributor may have patched a module, so the version alone does not identify the text
    return {"python": platform.python_version()} | _fingerprint_files([(path.name, path) for path in _stdlib_files()])


# --- text files: one file, one document -------------------------------------------------------------------------------


def _read_text_files(data) -> Iterator[tuple[str, str]]:
    for name, path in find_text_files(data.text_files):
        yield name, read_text(path, name)


def _fingerprint_text_files(data) -> dict:
    return _fingerprint_files(find_text_files(data.text_files))


def find_text_files(entries: list[str] | str) -> list[tuple[str, Path]]:
    """Resolve files, folders, globs and URLs to (name, local path), each once: entries as given, each one sorted.

    Of a folder come the text files at any depth: hidden, empty and binary ones (a NUL byte) are left out.
    """
    found: dict[str, Path] = {}
    for entry in _as_list(entries):
        if entry.startswith(("http://", "https://")):
            found[entry] = download(entry)
        elif Path(entry).is_dir():
            found |= {str(path): path for path in _text_files_below(Path(entry))}
        else:
            found |= {str(path): path for path in match_files("text_files", entry)}
    return list(found.items())


def _text_files_below(folder: Path) -> list[Path]:
    """List the text files of a folder, sorted; whether one is text is seen from its first 8 kB, as git does."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    visible = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    texts = [path for path in visible if not _looks_binary(path)]
    if not texts:
        raise UserError(f"text_files={str(folder)!r}: the folder holds no text file; name one that does")
    return texts


def _looks_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


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


def download(url: str) -> Path:
    """Download `url` once, into the cache of `datasets`, and return the local path."""
    from datasets import DownloadManager

    try:
        return Path(DownloadManager().download(url))
    except Exception as error:  # aiohttp, requests, fsspec and OSErrors: all mean that the file did not come
        why = one_line(error)
        raise UserError(f"text_files={url!r}: can not be downloaded ({why}); name a local file") from error


def read_text(path: Path, name: str) -> str:
    """Read a file as UTF-8 with its line breaks as they are; refuse an empty, binary or wrongly encoded one."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"text_files={name!r}: can not be read ({error.strerror}); check it") from error
    if not raw:
        raise UserError(f"text_files={name!r}: the file is empty; name one with text in it")
    if (offset := raw.find(b"\0")) >= 0:
        raise UserError(f"text_files={name!r}: is binary (a NUL byte at offset {offset}); name text files only")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02X} at offset {error.start}"
        raise UserError(f"text_files={name!r}: is not UTF-8 ({where}); convert it, as with iconv -t UTF-8") from error


def _fingerprint_files(files: list[tuple[str, Path]]) -> dict:
    listed = [{"path": name, "bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in files]
    return {"files": listed, "bytes": sum(entry["bytes"] for entry in listed)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- tables of documents: .jsonl, .json, .parquet ---------------------------------------------------------------------

TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # ending -> the builder in `datasets`


def _read_data_files(data) -> Iterator[tuple[str, str]]:
    from datasets import load_dataset

    for path in find_data_files(data.data_files):
        # streamed, so that no second copy of the text lands in the cache
        builder = TABLE_BUILDERS[path.suffix]
        rows = load_dataset(builder, data_files=glob.escape(str(path)), split="train", streaming=True)
        yield from _texts_of_rows(_rows_of_file(rows, path), "data_files", str(path), data.text_column)


def _rows_of_file(rows, path: Path) -> Iterator[dict]:
    try:
        yield from rows
    except (ValueError, OSError, RuntimeError) as error:  # pyarrow's and datasets' errors are subclasses of these
        raise UserError(f"data_files={str(path)!r}: can not be read ({one_line(error)}); mend the file") from error


def _fingerprint_data_files(data) -> dict:
    files = [(str(path), path) for path in find_data_files(data.data_files)]
    return {"text_column": data.text_column} | _fingerprint_files(files)


def find_data_files(entries: list[str] | str) -> list[Path]:
    """Resolve files and globs to paths, each once, and refuse endings that no builder reads."""
    paths = list(dict.fromkeys(path for entry in _as_list(entries) for path in match_files("data_files", entry)))
    for path in paths:
        if path.suffix not in TABLE_BUILDERS:
            endings = ", ".join(TABLE_BUILDERS)
            raise UserError(f"data_files={str(path)!r}: the ending must be one of {endings}; or use text_files")
        if not path.stat().st_size:
            raise UserError(f"data_files={str(path)!r}: the file is empty; name one with rows in it")
    return paths


def _texts_of_rows(rows, field: str, name: str, column: str) -> Iterator[tuple[str, str]]:
    """Yield (name:row, text) from rows (dicts), with rows counted from 0."""
    for number, row in enumerate(rows):
        if column not in row:
            raise UserError(f"text_column={column!r}: {name} has no such column; it has {', '.join(row)}")
        text = row[column]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f"{field}={name!r}: row {number} holds {kind} in {column!r}, not text; name another column")
        yield f"{name}:{number}", text


# --- data sets on the Hub, or in local directories --------------------------------------------------------------------


def _read_dataset(data) -> Iterator[tuple[str, str]]:
    yield from _texts_of_rows(load_hub_dataset(data), "dataset", data.dataset, data.text_column)


def load_hub_dataset(data):
    """Load the rows of a Hub data set or a local directory with `datasets.load_dataset`.

    Plain text files come as whole documents: by default `datasets` would make a row a line and drop the line breaks.
    """
    import datasets

    options = {"name": data.dataset_config, "split": data.dataset_split, "streaming": data.streaming}
    try:
        rows = _load_or_parquet(datasets, data.dataset, options)
        if rows.info.builder_name == "text":
            rows = datasets.load_dataset(data.dataset, sample_by="document", **options)
        return rows
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = "check id, dataset_config and dataset_split, or give a local directory"
        raise UserError(f"dataset={data.dataset!r}: can not be loaded ({one_line(error)}); {hint}") from error


def _load_or_parquet(datasets, name: str, options: dict):
    """Load as it is, or, where the data set was a script (which `datasets` no longer runs), the Hub's conversion."""
    try:
        return datasets.load_dataset(name, **options)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        return datasets.load_dataset(name, revision=PARQUET_REVISION, **options)


def _fingerprint_dataset(data) -> dict:
    choice = {"id": data.dataset, "config": data.dataset_config, "split": data.dataset_split}
    choice["text_column"] = data.text_column
    folder = Path(data.dataset)
    if not folder.is_dir():
        return choice | {"revision": _hub_revision(data.dataset)}
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return choice | _fingerprint_files([(str(path.relative_to(folder)), path) for path in paths])


def _hub_revision(dataset: str) -> str | None:
    """Return the commit that the data set is at, or None where the Hub does not answer (a cached copy may serve)."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(dataset, timeout=10).sha
    except Exception:  # no network, no such id, no access: loading it is what tells the person which
        return None


# --- mixtures ---------------------------------------------------------------------------------------------------------


def _mixed_documents(data) -> Iterator[Document]:
    """Draw documents from several sources until every one of them has been read to its end at least once.

    With [0, 1) shared out by weight, draw k takes the next document of the source that holds
    unit_hash("mixture", validation_seed, k): a weight is the share of documents drawn. A source that is at its end
    starts over, so small sources repeat.
    """
    weights, entries = zip(*_mixture_entries(data), strict=True)
    bounds = [sum(weights[: index + 1]) / sum(weights) for index in range(len(weights))]
    readers = [_endless(entry, index, len(entries)) for index, entry in enumerate(entries)]
    unfinished, draw = set(range(len(entries))), 0
    while unfinished:
        point = unit_hash("mixture", _mixture_seed(data), draw)
        drawn = next((index for index, bound in enumerate(bounds) if point < bound), len(bounds) - 1)
        document, is_last = next(readers[drawn])
        yield document
        unfinished -= {drawn} if is_last else set()
        draw += 1


def _endless(entry, index: int, count: int) -> Iterator[tuple[Document, bool]]:
    """Yield (document, is it the source's last) for ever; numbers are made distinct between the `count` sources."""
    while True:
        ahead = None
        for document in numbered_documents(entry):
            if ahead is not None:
                yield ahead, False
            ahead = document._replace(number=document.number * count + index)
        if ahead is None:
            raise UserError(f"mixture[{index}]: the source holds no document; remove it")
        yield ahead, True


def _mixture_entries(data) -> list[tuple[float, SimpleNamespace]]:
    """Return (weight, data arguments) of each entry, checked."""
    return [_mixture_entry(index, dict(entry)) for index, entry in enumerate(data.mixture)]


def _mixture_entry(index: int, entry: dict) -> tuple[float, SimpleNamespace]:
    weight = entry.pop("weight", None)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"mixture[{index}].weight={weight!r}: must be a number above 0, the share of documents drawn")
    for key in entry:
        if key not in SOURCE_DEFAULTS:
            raise unknown(f"key in mixture[{index}]", key, SOURCE_DEFAULTS)
    source = SimpleNamespace(**SOURCE_DEFAULTS | entry)
    source_kind(source)
    return float(weight), source


def _mixture_seed(data) -> int:
    return getattr(data, "validation_seed", 0)


def unit_hash(*keys: str | int) -> float:
    """Return a number in [0, 1) that depends on nothing but the keys; 53 bits of BLAKE2b."""
    digest = hashlib.blake2b(":".join(map(str, keys)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _as_list(entries: list[str] | str) -> list[str]:
    return [entries] if isinstance(entries, str) else list(entries)


SOURCES = {
    PYTHON_STDLIB: Source(_read_stdlib, _fingerprint_stdlib),
    "text_files": Source(_read_text_files, _fingerprint_text_files),
    "data_files": Source(_read_data_files, _fingerprint_data_files),
    "dataset": Source(_read_dataset, _fingerprint_dataset),
}
