"""Where text comes from: the standard library, text files, tables of documents, Hub data sets, and mixtures of them."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any, NamedTuple

from ..system.addresses import is_address, public_name
from ..system.errors import UserError, unknown
from .documents import START, Document, Position
from .files import Size
from .tables import (
    fingerprint_data_files,
    fingerprint_dataset,
    read_data_files,
    read_dataset,
    size_of_data_files,
    size_of_dataset,
)
from .text_files import (
    fingerprint_stdlib,
    fingerprint_text_files,
    read_stdlib,
    read_text_files,
    size_of_stdlib,
    size_of_text_files,
)

PYTHON_STDLIB = "python-stdlib"
SOURCE_DEFAULTS = {
    "dataset": None,
    "dataset_config": None,
    "dataset_split": "train",
    "text_column": "text",
    "streaming": False,
    "on_bad_file": "stop",
    "text_files": None,
    "data_files": None,
}
# What only some kinds of source read: the kinds, and the defaults, evaluation's among them.
READ_BY = {
    "dataset_config": (("dataset",), (None,)),
    "dataset_split": (("dataset",), ("train", "test")),
    "text_column": (("dataset", "data_files"), ("text",)),
}


class Source(NamedTuple):
    """A kind of source: how to read it from a place on, what identifies it (a dict fit for JSON), and its size."""

    read: Callable[[Any, list[int] | None, dict], Iterator[Document]]
    fingerprint: Callable[[Any], dict]
    size: Callable[[Any], Size]


SOURCES = {
    PYTHON_STDLIB: Source(read_stdlib, fingerprint_stdlib, size_of_stdlib),
    "text_files": Source(read_text_files, fingerprint_text_files, size_of_text_files),
    "data_files": Source(read_data_files, fingerprint_data_files, size_of_data_files),
    "dataset": Source(read_dataset, fingerprint_dataset, size_of_dataset),
}


def read_documents(data, skipped: dict | None = None) -> Iterator[Document]:
    """Yield the whole documents that the data arguments name, in an order that never changes."""
    texts = []
    for stretch in read_stretches(data, skipped=skipped):
        texts.append(stretch.text)
        if stretch.ends:
            yield stretch._replace(text="".join(texts), at=0, starts=True)
            texts = []


def read_stretches(data, position: Position = START, skipped: dict | None = None) -> Iterator[Document]:
    """Yield the documents behind a position, long text files in stretches; raise UserError for what is wrong with them.

    What on_bad_file=skip leaves out is added to `skipped`, a dict of name and reason. To go on in tables of parquet,
    in text files and in Hub data sets takes no time; JSON and mixtures are read again up to the position.
    """
    return islice(_stretches(data, position, {} if skipped is None else skipped), position.stretches, None)


def _stretches(data, position: Position, skipped: dict) -> Iterator[Document]:
    kind, number = source_kind(data), position.documents
    if kind == "mixture":
        yield from islice(_mixed_documents(data, skipped), number, None)
        return
    at, starts = 0, True
    for stretch in SOURCES[kind].read(data, position.place, skipped):
        yield stretch._replace(number=number, at=at, starts=starts)
        number, starts = number + stretch.ends, stretch.ends
        at = 0 if stretch.ends else at + len(stretch.text)


def source_kind(data) -> str:
    """Return the one kind of source that is named; the standard library stands in and yields to any other."""
    named = named_sources(data)
    if not named:
        raise UserError("no text: name a source, such as --text_files FILE, or --dataset python-stdlib")
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: two sources at once; name one of them, or list both under mixture")
    if named[0] == "dataset" and is_address(data.dataset):
        raise UserError(
            f"dataset={public_name(data.dataset)!r}: is a web address; give it to --text_files or --data_files"
        )
    for name, (kinds, defaults) in READ_BY.items():
        value = getattr(data, name, defaults[0])
        if named[0] not in kinds and value not in defaults:
            where = "put it into the entries of mixture" if named[0] == "mixture" else "leave it out"
            raise UserError(f"{name}={value!r}: has no effect on {named[0]}; {where}")
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
        parts = [{"weight": weight} | fingerprint_sources(entry) for weight, entry in _mixture_entries(data)]
        return {"kind": kind, "seed": _mixture_seed(data), "parts": parts}
    return {"kind": kind} | SOURCES[kind].fingerprint(data)


def size_of_sources(data) -> Size:
    """Return how many documents and bytes of text there are, as far as that is known without reading them."""
    kind = source_kind(data)
    return _size_of_mixture(data) if kind == "mixture" else SOURCES[kind].size(data)


def licence_of(data) -> str | None:
    """Return the SPDX name of the text's licence where Acorn knows it."""
    return "PSF-2.0" if named_sources(data) == [PYTHON_STDLIB] else None


# --- mixtures ---------------------------------------------------------------------------------------------------------


def _mixed_documents(data, skipped: dict) -> Iterator[Document]:
    """Draw documents from several sources until every one of them has been read to its end at least once.

    With [0, 1) shared out by weight, draw k takes the next document of the source that holds
    unit_hash("mixture", validation_seed, k): a weight is the share of documents drawn. A source that is at its end
    starts over, so small sources repeat.
    """
    weights, entries = zip(*_mixture_entries(data), strict=True)
    bounds = [sum(weights[: index + 1]) / sum(weights) for index in range(len(weights))]
    readers = [_endless(entry, index, len(entries), skipped) for index, entry in enumerate(entries)]
    unfinished, draw = set(range(len(entries))), 0
    while unfinished:
        point = unit_hash("mixture", _mixture_seed(data), draw)
        drawn = next((index for index, bound in enumerate(bounds) if point < bound), len(bounds) - 1)
        document, is_last = next(readers[drawn])
        yield document._replace(place=[draw])
        unfinished -= {drawn} if is_last else set()
        draw += 1


def _endless(entry, index: int, count: int, skipped: dict) -> Iterator[tuple[Document, bool]]:
    """Yield (document, is it the source's last) for ever; numbers are made distinct between the `count` sources."""
    while True:
        ahead = None
        for document in read_documents(entry, skipped):
            if ahead is not None:
                yield ahead, False
            ahead = document._replace(number=document.number * count + index)
        if ahead is None:
            raise UserError(f"mixture[{index}]: the source holds no document; remove it")
        yield ahead, True


def _size_of_mixture(data) -> Size:
    """Foretell the draws: as many as the source that ends last takes, of documents of each source's mean length."""
    weights, entries = zip(*_mixture_entries(data), strict=True)
    sizes = [size_of_sources(entry) for entry in entries]
    if not all(size.documents and size.bytes for size in sizes):
        return Size()
    shares = [weight / sum(weights) for weight in weights]
    draws = max(size.documents / share for size, share in zip(sizes, shares, strict=True))
    mean = sum(share * size.bytes / size.documents for size, share in zip(sizes, shares, strict=True))
    return Size(round(draws), round(draws * mean))


def _mixture_entries(data) -> list[tuple[float, SimpleNamespace]]:
    """Return (weight, data arguments) of each entry, checked; what to do with bad files is decided for all at once."""
    defaults = SOURCE_DEFAULTS | {"on_bad_file": data.on_bad_file}
    return [_mixture_entry(index, dict(entry), defaults) for index, entry in enumerate(data.mixture)]


def _mixture_entry(index: int, entry: dict, defaults: dict) -> tuple[float, SimpleNamespace]:
    weight = entry.pop("weight", None)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"mixture[{index}].weight={weight!r}: must be a number above 0, the share of documents drawn")
    for key in entry:
        if key not in defaults:
            raise unknown(f"key in mixture[{index}]", key, defaults)
    source = SimpleNamespace(**defaults | entry)
    source_kind(source)
    return float(weight), source


def _mixture_seed(data) -> int:
    return getattr(data, "validation_seed", 0)


def unit_hash(*keys: str | int) -> float:
    """Return a number in [0, 1) that depends on nothing but the keys; 53 bits of BLAKE2b."""
    digest = hashlib.blake2b(":".join(map(str, keys)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
