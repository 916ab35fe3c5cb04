"""A text that becomes tokens and rows while training goes: nothing is prepared, and a row depends on its index alone.

The documents of the source follow each other in one endless sequence of tokens, each closed by the end-of-text token;
after the last document the first one comes again. The first `validation_characters` of the text validate and are left
out of it. Every process reads the whole stream and keeps the rows that are its own.
"""

import bisect
import copy
import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..system.errors import UserError
from ..system.files import digest
from .corpus import Corpus, Inputs, text_digest, tokenizer_facts
from .dataset import TokenArray, TokenRows, Tokens
from .documents import START, Document, Position
from .encoding import encode_documents
from .sources import fingerprint_sources, licence_of, named_sources, read_stretches
from .tokenizers import build_tokenizer

BATCH_CHARACTERS = 1_000_000  # of text that is encoded at once: what a resumed run encodes again, at most
BATCHES_AHEAD = 2  # encoded by a thread of their own while the model trains
VALIDATION_CHARACTERS = 200_000


def is_streamed(data) -> bool:
    """Say whether the data arguments ask for training without preparation."""
    return bool(data.streaming and not data.data_dir)


def held_out_characters(data) -> int:
    """How many characters at the beginning of a stream validate."""
    return VALIDATION_CHARACTERS if data.validation_characters is None else data.validation_characters


def refuse_stream_options(data) -> None:
    """Refuse, where text is prepared, what only a stream would read."""
    if data.validation_characters is not None:
        why = "is for --streaming without --data_dir; prepared text is split by validation_fraction"
        raise UserError(f"validation_characters={data.validation_characters}: {why}")


def stream_corpus(data, num_workers: int = 0) -> Corpus:
    """Open the text that the data arguments name; raise UserError for what a stream cannot do."""
    if num_workers:
        why = "a stream is read ahead by a thread of its own"
        raise UserError(f"dataloader_num_workers={num_workers}: {why}; set it to 0")
    if data.tokenizer in ("char", "bpe"):
        why = "is made from the whole text, which a stream has not read"
        mend = "make it with acorn tokenizer and name its directory, or leave --streaming out"
        raise UserError(f"tokenizer={data.tokenizer!r}: {why}; {mend}")
    if data.mixture:  # what holds for the whole holds for its parts
        data = replace(data, mixture=[{**entry, "streaming": True} for entry in data.mixture])
    tokenizer = build_tokenizer(data.tokenizer, None, data.tokenizer_vocab_size)
    held = hold_out(data, tokenizer)
    validation = {"documents": len(held.numbers), "tokens": len(held.ids), "bytes": held.num_bytes}
    manifest = tokenizer_facts(data.tokenizer, tokenizer) | {
        "source": named_sources(data)[0],
        "licence": licence_of(data),
        "splits": {"validation": validation},  # of "train" nothing is known before it is read
    }
    tokens = {"train": TokenStream(data, tokenizer, held), "validation": TokenArray(held.ids)}

    def find_inputs() -> Inputs:
        return {
            "the text": text_digest(fingerprint_sources(data)),
            "the tokenizer": manifest["tokenizer"]["hash"],
            "the validation tokens": digest(held.ids.tobytes()),
        }

    return Corpus(None, manifest, tokenizer, tokens, find_inputs)


# --- what validates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """The beginning of the text, which validates, and the place after it, where training begins.

    numbers: of the documents in it, whole or in part; a mixture may draw them again, and then they are left out.
    position, character: where training begins: at a stretch of a document, and in its text.
    """

    ids: np.ndarray
    num_bytes: int
    numbers: frozenset[int]
    position: Position
    character: int

    def training_part(self, position: Position, stretch: Document) -> str | None:
        """Return the text of a stretch, as far as it is trained on; None where it is held out."""
        here, begin = ((place.documents, place.stretches) for place in (position, self.position))
        if here <= begin:
            return stretch.text[self.character :] if here == begin else None
        is_drawn_again = stretch.number in self.numbers and position.documents != self.position.documents
        return None if is_drawn_again else stretch.text


def hold_out(data, tokenizer) -> HeldOut:
    """Read and encode the first `validation_characters`; the document that is cut there goes on in training."""
    wanted = held_out_characters(data)
    if wanted < 2:
        raise UserError(f"validation_characters={wanted}: must be at least 2, to predict one from the other")
    heads, room, position = [], wanted, START
    for stretch in read_stretches(data):
        if len(stretch.text) > room:
            heads += [stretch._replace(text=stretch.text[:room], ends=False)] if room else []
            num_bytes, numbers = sum(len(head.text.encode()) for head in heads), frozenset(h.number for h in heads)
            return HeldOut(encode_stretches(tokenizer, heads), num_bytes, numbers, position, room)
        heads.append(stretch)
        room, position = room - len(stretch.text), position.after(stretch)
    why = f"the text has no more than {wanted - room:,} characters, so nothing is left to train on"
    raise UserError(f"validation_characters={wanted}: {why}; lower it, or leave --streaming out")


def encode_stretches(tokenizer, stretches: list[Document]) -> np.ndarray:
    """Return the token ids of stretches in a row, with the end-of-text token after each that ends its document."""
    texts, names = [stretch.text for stretch in stretches], [stretch.name for stretch in stretches]
    end = np.array([tokenizer.eos_token_id], dtype=np.uint32)
    encoded = zip(encode_documents(tokenizer, texts, names), stretches, strict=True)
    return np.concatenate([end[:0], *(part for ids, stretch in encoded for part in (ids, end[: stretch.ends]))])


# --- the endless tokens -----------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """Where a batch begins: `token` tokens of training lie before it in all passes, and `position` is in its own pass.

    digest: of the text of its first stretch, to know it again.
    """

    token: int = 0
    position: Position = START
    digest: str = ""

    def to_json(self) -> dict:
        """Return what a checkpoint keeps."""
        documents, place, stretches, _ = self.position
        return {"token": self.token, "documents": documents, "place": place, "inside": stretches, "digest": self.digest}

    @classmethod
    def from_json(cls, saved: dict) -> "Mark":
        """Return the mark of a checkpoint; those of earlier versions hold more."""
        return cls(saved["token"], Position(saved["documents"], saved["place"], saved["inside"]), saved["digest"])


class TokenStream(Tokens):
    """The endless tokens of a text, encoded ahead by a thread; reading on is cheap, and going back starts at a mark."""

    def __init__(self, data, tokenizer, held: HeldOut):
        self.data, self.held = data, held
        self.tokenizer = copy.deepcopy(tokenizer)  # the thread's own: a fast tokenizer is not for two threads
        self.marks = [Mark()]  # in order; the text's beginning is always known
        self._base, self._buffer = 0, np.zeros(0, dtype=np.uint32)  # the tokens at hand, and the number of their first
        self._ahead: deque = deque()
        self._pool = self._batches = None

    def __len__(self) -> int:
        raise UserError("max_steps=-1: a stream does not know its length, so it cannot count epochs; give --max_steps")

    def training_rows(self, context_length: int, seed: int, num_rows: int, sampling: str) -> "StreamRows":
        """Return rows in the order of the text: seed and sampling are for texts that are known whole."""
        return StreamRows(self, context_length, num_rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return tokens[start : stop] as uint32; what lies before `start` is forgotten."""
        if self._batches is None or start < self._base:
            self._seek(start)
        while self._base + len(self._buffer) < stop:
            self._take(forget=start - self._base)
        return self._buffer[start - self._base : stop - self._base]

    def _fill(self, row: np.ndarray, start: int) -> None:
        row[:] = self.read(start, start + len(row))

    def mark_at(self, token: int) -> Mark:
        """Return the last known mark at or before a token."""
        return self.marks[bisect.bisect_right(self.marks, token, key=lambda mark: mark.token) - 1]

    def know(self, mark: Mark) -> None:
        """Keep this mark and later ones: what lies between it and the text's beginning will not be needed again."""
        later = [kept for kept in self.marks if kept.token > mark.token]
        self.marks = [Mark(), *([mark] if mark.token else []), *later]

    def close(self) -> None:
        """End the thread; reading again would start another."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._batches = None

    def _seek(self, token: int) -> None:
        """Have a thread encode from the last mark before `token` on."""
        self.close()
        mark = self.mark_at(token)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._batches = encoded_batches(self.data, self.tokenizer, self.held, mark)
        self._base, self._buffer = mark.token, self._buffer[:0]
        self._ahead = deque(self._pool.submit(next, self._batches) for _ in range(BATCHES_AHEAD))

    def _take(self, forget: int) -> None:
        """Append the next batch, which the thread has encoded, and drop the first `forget` tokens."""
        mark, ids = self._ahead.popleft().result()
        self._ahead.append(self._pool.submit(next, self._batches))
        if mark.token > self.marks[-1].token:
            self.marks.append(mark)
        forget = min(max(forget, 0), len(self._buffer))
        self._base, self._buffer = self._base + forget, np.concatenate([self._buffer[forget:], ids])


def encoded_batches(data, tokenizer, held: HeldOut, mark: Mark) -> Iterator[tuple[Mark, np.ndarray]]:
    """Yield (where it begins, its token ids) of each batch from a mark on, pass after pass, for ever."""
    token = mark.token
    while True:
        before = token
        for begin, stretches in batches_of_pass(data, held, mark):
            ids = encode_stretches(tokenizer, stretches)
            yield begin._replace(token=token), ids
            token += len(ids)
        if token == before and mark.position == START:
            raise UserError("streaming: every document is held out, none trains; lower --validation_characters")
        mark = Mark()


def batches_of_pass(data, held: HeldOut, mark: Mark) -> Iterator[tuple[Mark, list[Document]]]:
    """Yield (where it begins, what of it trains) of each batch from a mark to the text's end.

    Raises UserError where the text is not what it was.
    """
    position, begin, batch, size = mark.position, None, [], 0
    for stretch in read_stretches(data, position):
        if begin is None:
            begin = Mark(0, position, _digest(stretch.text))
            if position == mark.position and mark.digest not in ("", begin.digest):
                raise _changed(mark)
        text = held.training_part(position, stretch)
        batch += [] if text is None else [stretch._replace(text=text)]
        size, position = size + len(stretch.text), position.after(stretch)
        if size >= BATCH_CHARACTERS:
            yield begin, batch
            begin, batch, size = None, [], 0
    if begin is not None:
        yield begin, batch
    elif position == mark.position and mark.digest:
        raise _changed(mark)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _changed(mark: Mark) -> UserError:
    why = f"document {mark.position.documents} of the text is not the one that it was, so the run cannot go on exactly"
    return UserError(f"streaming: {why}; bring the text back as it was, or start another run")


# --- rows and their position ------------------------------------------------------------------------------------------


class StreamRows(TokenRows):
    """`num_rows` rows side by side in a stream: row i reads tokens i * context_length to (i + 1) * context_length."""

    def _inputs_and_labels(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = indices * self.context_length
        first = int(starts.min())
        block = self.tokens.read(first, int(starts.max()) + self.context_length + 1)
        sequences = block[(starts - first)[:, None] + np.arange(self.context_length + 1)].astype(np.int64)
        return sequences[:, :-1], sequences[:, 1:]


class StreamPosition(TrainerCallback, ExportableState):
    """Keeps in each checkpoint where its next row begins in the text, and goes on from there: no batch is replayed."""

    def __init__(self, trainer):
        self.trainer, self.stream = trainer, trainer.corpus.tokens("train")
        self.tokenizer = trainer.corpus.manifest["tokenizer"]

    def state(self) -> dict:
        """Return the mark from which the next row can be read, as a dict fit for JSON."""
        mark = self.stream.mark_at(self.trainer.state.global_step * self.trainer.tokens_per_step)
        self.stream.know(mark)
        return {"args": {"mark": mark.to_json(), "tokenizer": self.tokenizer["hash"]}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get("StreamPosition", {}).get("args") if state.global_step else None
        if saved is None:
            return
        if saved["tokenizer"] != self.tokenizer["hash"]:
            raise UserError(
                f"tokenizer={self.tokenizer['name']!r}: is not what it was when the run began; bring it back"
            )
        self.stream.know(Mark.from_json(saved["mark"]))

    def on_train_end(self, args, state, control, **kwargs):
        self.stream.close()
