"""What is read: a document, or a stretch of one, and a position in a source from which reading goes on."""

from typing import NamedTuple


class Document(NamedTuple):
    """A text, or a stretch of one.

    name: of its file and row, for messages. place: where it lies in its source, as [file] or [file, row].
    number: of the document in all that is read; one that a mixture draws twice has one number both times.
    at: how many characters of the document lie before this stretch. starts, ends: whether it is the document's first
    and last stretch (within its split, where there is one). split: "train" or "validation", once that is decided.
    """

    name: str
    text: str
    place: list[int]
    number: int = 0
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

    def after(self, document: Document, characters: int | None = None) -> "Position":
        """Return the position behind the next stretch; `characters` is its length where its text is gone already."""
        if not document.ends:
            return self._replace(stretches=self.stretches + 1)
        length = document.at + (len(document.text) if characters is None else characters)
        return Position(self.documents + 1, document.place, 0, self.characters + length)


START = Position()
