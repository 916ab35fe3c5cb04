"""Which text trains and which validates, and where a long text may be taken apart without changing its tokens."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..system.errors import UserError, log
from .documents import Document
from .sources import named_sources, read_stretches, unit_hash
from .tokenizers import backend_state, splits_as_gpt2, tokenizer_kind

PIECE_CHARACTERS = 1_000_000  # a longer text is encoded in pieces where that makes no difference


# --- rules: which split a document, or a part of it, belongs to -------------------------------------------------------


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


# --- long texts: where they may be taken apart ------------------------------------------------------------------------

# finds, in text[start:], the place at or before `stop` (else the first after it) to cut at; None: nowhere
FindPlace = Callable[[str, int, int], int | None]
AFTER_WORD = re.compile(r"(?<=[^\W_])[ \n]")


def anywhere(text: str, start: int, stop: int) -> int | None:
    """Cut at `stop`: for tokenizers of single bytes or characters."""
    return stop if stop < len(text) else None


def after_words(text: str, start: int, stop: int) -> int | None:
    """Cut between a letter or digit and the space or line break after it, where GPT-2's splitting rule always cuts.

    No alternative of its pattern goes from what is not white space to white space, and none looks back. So the tokens
    on either side do not depend on the other. (Radford et al., "Language Models are Unsupervised Multitask Learners".)
    """
    for begin in (max(start + 1, stop - 1000), start + 1):  # the last one is mostly near
        if found := [match.start() for match in AFTER_WORD.finditer(text, begin, stop + 1)]:
            return found[-1]
    after = AFTER_WORD.search(text, stop + 1)
    return after.start() if after else None


def cutting_rule(tokenizer) -> FindPlace | None:
    """Return where texts may be taken apart with this tokenizer, or None where only whole documents are exact."""
    if tokenizer_kind(tokenizer) in ("byte", "char"):
        return anywhere
    state = backend_state(tokenizer.backend_tokenizer)
    is_exact = state["model"]["type"] == "BPE" and not state["model"].get("dropout")
    return after_words if is_exact and splits_as_gpt2(state) else None


def encodable(stretches: Iterator[Document], find_place: FindPlace | None, limit: int) -> Iterator[Document]:
    """Bring stretches to about `limit` characters, taking apart and joining them within a document and a split.

    Where `find_place` is None, or finds none, a text stays whole: memory then grows with the longest document.
    """
    held: list[Document] = []
    for stretch in stretches:
        if held and held[0].split != stretch.split:
            yield _joined(held)
            held = []
        held.append(stretch)
        if find_place is None and not stretch.ends:
            continue
        whole, start = _joined(held), 0
        while find_place and len(whole.text) - start > limit:
            place = find_place(whole.text, start, start + limit)
            if place is None:
                break
            yield _between(whole, start, place)
            start = place
        rest = _between(whole, start, len(whole.text))
        held = [] if rest.ends else [rest]
        yield from [rest] if rest.ends else []


def _joined(stretches: list[Document]) -> Document:
    return stretches[0]._replace(text="".join(stretch.text for stretch in stretches), ends=stretches[-1].ends)


def _between(whole: Document, start: int, stop: int) -> Document:
    """Return what is from character `start` to `stop` of a stretch."""
    starts, ends = whole.starts and start == 0, whole.ends and stop == len(whole.text)
    return whole._replace(text=whole.text[start:stop], at=whole.at + start, starts=starts, ends=ends)
