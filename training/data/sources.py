"""Where text comes from: the table of sources, mixtures of them, and which part of the text validates."""

import bisect
import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from ..system.addresses import is_address, public_name
from ..system.errors import UserError, log, unknown
from .documents import START, Document, HubSet, Position, Size, Source, StandardLibrary, Tables, TextFiles

PYTHON_STDLIB = "python-stdlib"
SYNTHETIC_CHAT = "synthetic-chat"  # which finetuning makes
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


def read_documents(data, skipped: dict | None = None) -> Iterator[Document]:
    """Yield the whole documents that the data arguments name, in an order that never changes."""
    texts = []
    for stretch in read_stretches(data, skipped=skipped):
        texts.append(stretch.text)
        if stretch.ends:
            yield stretch if stretch.starts else stretch._replace(text="".join(texts), at=0, starts=True)
            texts = []


def read_stretches(data, position: Position = START, skipped: dict | None = None) -> Iterator[Document]:
    """Yield the documents behind a position, long text files in stretches; raise UserError for what is wrong with them.

    What on_bad_file=skip leaves out is added to `skipped`, a dict of name and reason. To go on in tables of parquet,
    in text files and in Hub data sets takes no time; JSON and mixtures are read again up to the position.
    """
    stretches = open_source(data, skipped).read(position.place)
    return islice(_numbered(stretches, position.documents), position.stretches, None)


def _numbered(stretches: Iterator[Document], number: int) -> Iterator[Document]:
    """Say of each stretch in which document it lies, and where; a mixture has numbered its documents itself."""
    at, starts = 0, True
    for name, text, place, own_number, _, _, ends, _ in stretches:
        yield Document(name, text, place, number if own_number < 0 else own_number, at, starts, ends)
        number, starts = number + ends, ends
        at = 0 if ends else at + len(text)


def open_source(data, skipped: dict | None = None) -> Source:
    """Return the source that the data arguments name."""
    kind = source_kind(data)
    if kind == SYNTHETIC_CHAT:
        raise UserError(f"dataset={kind!r}: is a chat and not a text; only `acorn finetune` reads it, as a chat")
    return SOURCES[kind](data, skipped)


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
    return [SYNTHETIC_CHAT if kind == "dataset" and data.dataset == SYNTHETIC_CHAT else kind for kind in kinds]


def fingerprint_sources(data) -> dict:
    """Return what identifies the text: contents of local files, id and revision on the Hub, Python's version."""
    return {"kind": source_kind(data)} | open_source(data).fingerprint()


def licence_of(data) -> str | None:
    """Return the SPDX name of the text's licence where Acorn knows it."""
    return "PSF-2.0" if named_sources(data) == [PYTHON_STDLIB] else None


def unit_hash(*keys: str | int) -> float:
    """Return a number in [0, 1) that depends on nothing but the keys; 53 bits of BLAKE2b."""
    digest = hashlib.blake2b(":".join(map(str, keys)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


# --- mixtures ---------------------------------------------------------------------------------------------------------


class Mixture(Source):
    """Documents drawn from several sources until every one of them has been read to its end at least once.

    With [0, 1) shared out by weight, draw k takes the next document of the source that holds
    unit_hash("mixture", validation_seed, k): a weight is the share of documents drawn. A source that is at its end
    starts over, so small sources repeat.
    """

    def __init__(self, data, skipped: dict | None = None):
        super().__init__(data, skipped)
        self.seed = getattr(data, "validation_seed", 0)
        defaults = SOURCE_DEFAULTS | {"on_bad_file": data.on_bad_file}  # decided for all entries at once
        self.weights, self.entries = zip(
            *(_checked(index, dict(entry), defaults) for index, entry in enumerate(data.mixture)), strict=True
        )
        self.shares = [weight / sum(self.weights) for weight in self.weights]

    def read(self, after: list[int] | None = None) -> Iterator[Document]:
        """Yield the documents that are drawn after a draw, which is their place."""
        return islice(self._draw(), after[0] + 1 if after else 0, None)

    def _draw(self) -> Iterator[Document]:
        bounds = [sum(self.weights[: index + 1]) / sum(self.weights) for index in range(len(self.weights))]
        readers = [self._endless(index) for index in range(len(self.entries))]
        unfinished, draw = set(range(len(self.entries))), 0
        while unfinished:
            point = unit_hash("mixture", self.seed, draw)
            drawn = min(bisect.bisect_right(bounds, point), len(bounds) - 1)
            document, is_last = next(readers[drawn])
            yield document._replace(place=[draw])
            unfinished -= {drawn} if is_last else set()
            draw += 1

    def _endless(self, index: int) -> Iterator[tuple[Document, bool]]:
        """Yield (document, is it the source's last) for ever; numbers are made distinct between the sources."""
        while True:
            ahead = None
            for document in read_documents(self.entries[index], self.skipped):
                if ahead is not None:
                    yield ahead, False
                ahead = document._replace(number=document.number * len(self.entries) + index)
            if ahead is None:
                raise UserError(f"mixture[{index}]: the source holds no document; remove it")
            yield ahead, True

    def fingerprint(self) -> dict:
        """Return the seed, and weight and fingerprint of each entry."""
        entries = zip(self.weights, self.entries, strict=True)
        parts = [{"weight": weight} | fingerprint_sources(entry) for weight, entry in entries]
        return {"seed": self.seed, "parts": parts}

    def size(self) -> Size:
        """Foretell the draws: as many as the source that ends last takes, of documents of each source's mean length."""
        sizes = [open_source(entry).size() for entry in self.entries]
        if not all(size.documents and size.bytes for size in sizes):
            return Size()
        draws = max(size.documents / share for size, share in zip(sizes, self.shares, strict=True))
        mean = sum(share * size.bytes / size.documents for size, share in zip(sizes, self.shares, strict=True))
        return Size(round(draws), round(draws * mean))


def _checked(index: int, entry: dict, defaults: dict) -> tuple[float, SimpleNamespace]:
    """Return weight and data arguments of an entry."""
    weight = entry.pop("weight", None)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"mixture[{index}].weight={weight!r}: must be a number above 0, the share of documents drawn")
    for key in entry:
        if key not in defaults:
            raise unknown(f"key in mixture[{index}]", key, defaults)
    source = SimpleNamespace(**defaults | entry)
    source_kind(source)
    return float(weight), source


SOURCES = {
    PYTHON_STDLIB: StandardLibrary,
    "text_files": TextFiles,
    "data_files": Tables,
    "dataset": HubSet,
    "mixture": Mixture,
}


# --- which part of the text validates ---------------------------------------------------------------------------------


def check_split_options(data) -> None:
    """Refuse split options that cannot be met, before any text is read."""
    if named_sources(data) == ["mixture"] and data.validation_by == "position":
        why = "a mixture repeats documents, so its last part may repeat what is trained on"
        raise UserError(f"validation_by='position': {why}; use --validation_by documents")


def find_cut(data, skipped: dict) -> dict:
    """Cut the concatenated text at int(characters * (1 - fraction)), as nanoGPT does: one pass counts them."""
    characters = size = 0
    for stretch in read_stretches(data, skipped=skipped):
        characters, size = characters + len(stretch.text), size + len(stretch.text.encode())
    return {"by": "position", "cut": int(characters * (1 - data.validation_fraction)), "bytes": size}


def split_at_cut(stretches: Iterator[Document], data, rule: dict, characters: int) -> Iterator[Document]:
    """Give validation what lies after the cut; the head of the document that is cut gets no end-of-text token."""
    room, is_first = max(0, rule["cut"] - characters), True
    for stretch in stretches:
        head, tail = stretch.text[:room], stretch.text[room:]
        if room:
            yield stretch._replace(split="train", text=head, ends=stretch.ends and not tail)
        if tail or not room:
            starts = stretch.starts or is_first
            yield stretch._replace(split="validation", text=tail, at=stretch.at + len(head), starts=starts)
            is_first = False
        room -= len(head)


def find_limit(data, skipped: dict) -> dict:
    """Give a document to validation when unit_hash("validation", seed, its number) < fraction, and at least one.

    Where that gives one split nothing, the document with the smallest hash is the only one in validation. A text of
    one document is split by position instead, and that is said.
    """
    limit, sides, lowest, count = data.validation_fraction, set(), 1.0, 0
    for stretch in read_stretches(data, skipped=skipped):
        if not stretch.ends:
            continue
        point = unit_hash("validation", data.validation_seed, stretch.number)
        count, lowest = count + 1, min(lowest, point)
        sides.add(point < limit)
        if len(sides) == 2:  # most texts show both sides early, and then are not read twice
            return {"by": "documents", "limit": limit}
    if count == 1:
        log("one document cannot be split by documents: its end validates (validation_by=position)")
        return find_cut(data, skipped)
    return {"by": "documents", "limit": float(np.nextafter(lowest, 1))}


def split_by_limit(stretches: Iterator[Document], data, rule: dict, characters: int) -> Iterator[Document]:
    """Give whole documents to either split by the hash of their numbers."""
    for stretch in stretches:
        point = unit_hash("validation", data.validation_seed, stretch.number)
        yield stretch._replace(split="validation" if point < rule["limit"] else "train")


class Splitter(NamedTuple):
    """A way to split.

    find(data, skipped): reads as much of the text as it needs and returns its rule, a dict fit for JSON, which holds
    "bytes", the size of the text, where they were counted. split(stretches, data, rule, characters): says of each
    stretch which split it is in; so many characters of the text lie before the first.
    """

    find: Callable[..., dict]
    split: Callable[..., Iterator[Document]]


SPLITTERS = {"position": Splitter(find_cut, split_at_cut), "documents": Splitter(find_limit, split_by_limit)}
