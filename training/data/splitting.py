"""Which text trains and which validates, and where a long text may be taken apart without changing its tokens."""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..system.errors import UserError, log
from .documents import Document
from .sources import named_sources, read_stretches, unit_hash
from .tokenizers import tokenizer_kind

SPLITS = ("train", "validation")
PIECE_CHARACTERS = 1_000_000  # a longer text is encoded in pieces where that makes no difference


class Piece(NamedTuple):
    """A document, or a stretch of it within one split: `starts` and `ends` say whether it is the first and the last.

    Only the last piece of a document is followed by the end-of-text token. `place` is the document's (see Position),
    and `at` counts its characters before the piece.
    """

    split: str
    name: str
    text: str
    starts: bool
    ends: bool
    place: list[int]
    at: int = 0


# --- rules: which split a document, or a part of it, belongs to -------------------------------------------------------


class Splitter(NamedTuple):
    """A way to split: `find` reads the text for its rule (a dict fit for JSON), `apply` splits documents by it.

    find(data, left_out) -> rule, which holds "bytes", the size of the text, where finding it has counted them.
    apply(parts, data, rule, characters) -> pieces; `characters` of text lie before the first part.
    """

    find: Callable[..., dict]
    apply: Callable[..., Iterator[Piece]]


def check_split_options(data) -> None:
    """Refuse split options that cannot be met, before any text is read."""
    if named_sources(data) == ["mixture"] and data.validation_by == "position":
        why = "a mixture repeats documents, so its last part may repeat what is trained on"
        raise UserError(f"validation_by='position': {why}; use --validation_by documents")


def find_rule(data, left_out: dict) -> dict:
    """Read as much of the text as the way of splitting needs, and return its rule."""
    return SPLITTERS[data.validation_by].find(data, left_out)


def split(parts: Iterator[Document], data, rule: dict, characters: int = 0) -> Iterator[Piece]:
    """Split documents, of which the first has `characters` of text before it, by a rule that was found."""
    return SPLITTERS[rule["by"]].apply(parts, data, rule, characters)


def find_cut(data, left_out: dict) -> dict:
    """Cut the concatenated text at int(characters * (1 - fraction)), as nanoGPT does: one pass counts them."""
    characters = size = 0
    for part in read_stretches(data, skipped=left_out):
        characters, size = characters + len(part.text), size + len(part.text.encode())
    return {"by": "position", "cut": int(characters * (1 - data.validation_fraction)), "bytes": size}


def split_at_cut(parts: Iterator[Document], data, rule: dict, characters: int) -> Iterator[Piece]:
    """Give validation what lies after the cut; the head of the document that is cut gets no end-of-text token."""
    room, inside = max(0, rule["cut"] - characters), None
    for part in parts:
        head, tail = part.text[:room], part.text[room:]
        if room:
            yield Piece("train", part.name, head, inside != "train", part.ends and not tail, part.place, part.at)
            inside = "train"
        if tail or not room:
            yield Piece(
                "validation", part.name, tail, inside != "validation", part.ends, part.place, part.at + len(head)
            )
            inside = "validation"
        inside = None if part.ends else inside
        room -= len(head)


def find_limit(data, left_out: dict) -> dict:
    """Give a document to validation when unit_hash("validation", seed, its number) < fraction, and at least one.

    Where that gives one split nothing, the document with the smallest hash is the only one in validation. A text of
    one document is split by position instead, and that is said.
    """
    seed, limit, sides = data.validation_seed, data.validation_fraction, set()
    lowest, count = 1.0, 0
    for part in read_stretches(data, skipped=left_out):
        if not part.ends:
            continue
        count += 1
        point = unit_hash("validation", seed, part.number)
        lowest = min(lowest, point)
        sides.add(point < limit)
        if len(sides) == 2:  # most texts show both sides early, and then are not read twice
            return {"by": "documents", "limit": limit}
    if count == 1:
        log("one document cannot be split by documents: its end validates (validation_by=position)")
        return find_cut(data, left_out)
    return {"by": "documents", "limit": float(np.nextafter(lowest, 1))}


def split_by_limit(parts: Iterator[Document], data, rule: dict, characters: int) -> Iterator[Piece]:
    """Give whole documents to either split by the hash of their numbers."""
    starts = True
    for part in parts:
        is_validation = unit_hash("validation", data.validation_seed, part.number) < rule["limit"]
        side = "validation" if is_validation else "train"
        yield Piece(side, part.name, part.text, starts, part.ends, part.place, part.at)
        starts = part.ends


SPLITTERS = {"position": Splitter(find_cut, split_at_cut), "documents": Splitter(find_limit, split_by_limit)}


# --- long texts: where they may be taken apart ------------------------------------------------------------------------

# finds, in text[start:], the place at or before `stop` (else the first after it) to cut at; None: nowhere
FindPlace = Callable[[str, int, int], int | None]


def anywhere(text: str, start: int, stop: int) -> int | None:
    """Cut at `stop`: for tokenizers of single bytes or characters."""
    return stop if stop < len(text) else None


def after_words(text: str, start: int, stop: int) -> int | None:
    """Cut between a letter or digit and the space or line break after it, where GPT-2's splitting rule always cuts.

    No alternative of its pattern goes from what is not white space to white space, and none looks back. So the tokens
    on either side do not depend on the other. (Radford et al., "Language Models are Unsupervised Multitask Learners".)
    """
    for place in _white_space_backwards(text, start + 1, min(stop + 1, len(text))):
        if text[place - 1].isalnum():
            return place
    place = stop
    while (place := _next_white_space(text, place + 1)) is not None:
        if text[place - 1].isalnum():
            return place
    return None


def _white_space_backwards(text: str, start: int, stop: int) -> Iterator[int]:
    while (place := max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))) >= 0:
        yield place
        stop = place


def _next_white_space(text: str, start: int) -> int | None:
    found = [place for place in (text.find(" ", start), text.find("\n", start)) if place >= 0]
    return min(found, default=None)


def cutting_rule(tokenizer) -> FindPlace | None:
    """Return where texts may be taken apart with this tokenizer, or None where only whole documents are exact."""
    if tokenizer_kind(tokenizer) in ("byte", "char"):
        return anywhere
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitting = state["model"], state["pre_tokenizer"] or {}
    is_gpt2s = splitting.get("type") == "ByteLevel" and splitting.get("use_regex", True)
    is_gpt2s = is_gpt2s and not splitting.get("add_prefix_space") and not state["normalizer"]
    is_exact = model["type"] == "BPE" and not model.get("dropout")
    has_only_special = all(token["special"] for token in state["added_tokens"])  # others may hold white space
    return after_words if is_gpt2s and is_exact and has_only_special else None


def encodable(pieces: Iterator[Piece], find_place: FindPlace | None, limit: int) -> Iterator[Piece]:
    """Bring pieces to about `limit` characters, taking apart and joining them within a document and a split.

    Where `find_place` is None, or finds none, a text stays whole: memory then grows with the longest document.
    """
    held: list[Piece] = []
    for piece in pieces:
        if held and held[0].split != piece.split:
            yield _joined(held)
            held = []
        held.append(piece)
        if piece.ends or find_place:
            *cut, rest = _take_apart(_joined(held), find_place, limit)
            yield from cut
            held = [] if rest.ends else [rest]
            if rest.ends:
                yield rest


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    text = "".join(piece.text for piece in pieces)
    return pieces[0]._replace(text=text, ends=pieces[-1].ends)


def _take_apart(piece: Piece, find_place: FindPlace | None, limit: int) -> Iterator[Piece]:
    """Yield the pieces of a piece, the last of them with what is left over."""
    text, start = piece.text, 0
    while find_place and len(text) - start > limit:
        place = find_place(text, start, start + limit)
        if place is None or place >= len(text):
            break
        yield piece._replace(
            text=text[start:place], starts=piece.starts and start == 0, ends=False, at=piece.at + start
        )
        start = place
    yield piece._replace(text=text[start:], starts=piece.starts and start == 0, at=piece.at + start)
