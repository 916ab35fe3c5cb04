"""Text to shards of tokens in bounded memory: shard after shard, and from the last saved state on if it was killed."""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..system.errors import UserError, log
from ..system.files import write_whole
from . import files, splitting
from .building import CORPUS, STATE, disk_full
from .dataset import ShardWriter
from .documents import Position, skipped_in_words
from .sources import named_sources, open_source, read_stretches
from .splitting import SPLITS, Piece, cutting_rule, encodable, find_rule, split
from .tokenizers import load_tokenizer
from .workers import encode_in_order

SAVE_SECONDS = 5  # of work that a kill costs, at most
REPORT_SECONDS = 60  # between lines where there is no terminal
LONG_BYTES = 1_000_000_000  # of text: reading it takes so long that a person should know why


# --- how far it has come ----------------------------------------------------------------------------------------------


@dataclass
class State:
    """How far a preparation has come, as a dict fit for JSON.

    settings: what must be the same to go on. rule: of splitting. total_bytes: of the text, where known. Of the text are
    done: `documents`, the last of them at `place`, with `characters`; and of the document after them, `pieces` with
    `open_characters`. splits: what each SplitWriter has written. left_out: files and rows, and why.
    """

    settings: dict
    rule: dict = field(default_factory=dict)
    total_bytes: int | None = None
    documents: int = 0
    place: list[int] | None = None
    characters: int = 0
    pieces: int = 0
    open_characters: int = 0
    splits: dict[str, dict] = field(default_factory=lambda: {split: {} for split in SPLITS})
    left_out: dict = field(default_factory=dict)

    def advance(self, piece: Piece, characters: int) -> None:
        """Count a piece as done."""
        self.pieces, self.open_characters = self.pieces + 1, self.open_characters + characters
        if piece.ends:
            self.documents, self.place = self.documents + 1, piece.place
            self.characters += self.open_characters
            self.pieces = self.open_characters = 0

    def save(self, folder: Path, writers: "dict[str, SplitWriter]") -> None:
        """Write the state, after the tokens that it counts are on the disk."""
        self.splits = {split: writer.state() for split, writer in writers.items()}
        write_whole(folder / STATE, json.dumps(asdict(self)))


@dataclass
class SplitWriter:
    """Hands one split's tokens to its shards and counts what goes in; a document that is cut counts in both splits."""

    shards: ShardWriter
    documents: int = 0
    bytes: int = 0

    @classmethod
    def going_on(cls, folder: Path, split: str, dtype: np.dtype, shard_size: int, saved: dict) -> "SplitWriter":
        """Return the writer that goes on from what `state` said, or begins."""
        shards = ShardWriter(folder, split, dtype, shard_size, saved.get("shards", ()), saved.get("open_tokens", 0))
        return cls(shards, saved.get("documents", 0), saved.get("bytes", 0))

    def add(self, piece: Piece, ids: np.ndarray, size: int, eos_token_id: int) -> None:
        """Append a piece's tokens, with the end-of-text token after it where it ends its document."""
        self.shards.write(ids)
        if piece.ends:
            self.shards.write(np.array([eos_token_id]))
        self.documents += piece.starts
        self.bytes += size

    def state(self) -> dict:
        """Return what `going_on` needs, with the tokens on the disk."""
        self.shards.flush()
        counts = {"documents": self.documents, "bytes": self.bytes}
        return counts | {"shards": self.shards.finished, "open_tokens": self.shards.tokens}

    def manifest(self) -> dict:
        """Return this split's part of the manifest, once its shards are closed."""
        shards = self.shards.finished
        tokens = sum(shard["tokens"] for shard in shards)
        return {"documents": self.documents, "tokens": tokens, "bytes": self.bytes, "shards": shards}


def read_state(folder: Path, fingerprint: str, shard_size: int) -> State:
    """Return the state that a preparation of the same text left, or a new one in a folder that is empty but for it."""
    sizes = [files.STRETCH_BYTES, splitting.PIECE_CHARACTERS]  # of what a state counts
    settings = {"fingerprint": fingerprint, "shard_size": shard_size, "pieces": sizes}
    if (folder / STATE).exists():
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if saved["settings"] == settings:
            return State(**saved)
        log(f"{folder}: was begun with another shard_size, or by another version; starting over")
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / CORPUS, ignore_errors=True)
    (folder / CORPUS).mkdir()
    return State(settings)


# --- writing ----------------------------------------------------------------------------------------------------------


def dtype_of(tokenizer) -> np.dtype:
    """Return the smallest unsigned type on disk, two or four bytes, that holds every id."""
    return np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")


def write_tokens(folder: Path, state: State, data, tokenizer, begun: float) -> dict:
    """Write the shards of both splits below `folder`, from a state on, and return what the manifest says of them.

    begun: the monotonic time when work that would be lost began, such as training the tokenizer. Raises UserError where
    a split stays empty and where the disk is too small.
    """
    writers = _open_writers(folder, state, data, tokenizer)
    if not state.rule:
        size = open_source(data).size()
        if data.validation_by == "position" and (size.bytes or 0) > LONG_BYTES:
            log(f"counting characters, to cut by position: one pass over about {size.bytes / 1e6:,.0f} MB")
        state.rule = find_rule(data, state.left_out)
        state.total_bytes = state.rule.get("bytes", size.bytes)
    elif state.documents or state.pieces:
        log(f"going on where a preparation was stopped: {state.documents:,} documents are done")
    try:
        _write_pieces(folder, state, data, tokenizer, writers, begun)
    finally:
        for writer in writers.values():
            writer.shards.close()
    _refuse_empty_splits(data, writers)
    left_out = {"left_out": skipped_in_words(state.left_out)} if state.left_out else {}
    return {"splits": {split: writer.manifest() for split, writer in writers.items()}} | left_out


def _open_writers(folder: Path, state: State, data, tokenizer) -> dict[str, SplitWriter]:
    arguments = (dtype_of(tokenizer), data.shard_size)
    saved = state.splits.items()
    try:
        return {split: SplitWriter.going_on(folder / CORPUS, split, *arguments, counts) for split, counts in saved}
    except ValueError as error:
        (folder / STATE).unlink()  # so that the folder goes, too
        raise UserError(f"{error}, so a preparation that was stopped cannot go on; start it again") from error


def _pieces_from(state: State, data, tokenizer) -> Iterator[Piece]:
    """Yield the pieces that are not done; those of a document that is done in part are made again and passed over."""
    parts = read_stretches(data, Position(state.documents, state.place), state.left_out)
    pieces = split(parts, data, state.rule, state.characters)
    pieces = encodable(pieces, cutting_rule(tokenizer), splitting.PIECE_CHARACTERS)
    return islice(pieces, state.pieces, None)


def _write_pieces(folder: Path, state: State, data, tokenizer, writers: dict[str, SplitWriter], saved: float) -> None:
    """Encode the pieces and hand them to their split's writer, saving the state now and then."""
    dtype, is_checked = dtype_of(tokenizer), False
    encoding = encode_in_order(_pieces_from(state, data, tokenizer), tokenizer, dtype, data.num_proc)
    with closing(encoding), Progress(state.total_bytes, *_counts(writers)) as progress:
        for batch, encoded in encoding:
            if not is_checked:
                left = None if state.total_bytes is None else state.total_bytes - _counts(writers)[1]
                _refuse_full_disk(folder, left, sum(encoded.bytes), encoded.ids.nbytes)
                is_checked = True
            for piece, (ids, size, characters) in zip(batch, encoded.each(), strict=True):
                writers[piece.split].add(piece, ids, size, tokenizer.eos_token_id)
                state.advance(piece, characters)
            progress.show(*_counts(writers))
            if time.monotonic() - saved >= SAVE_SECONDS:
                state.save(folder, writers)
                saved = time.monotonic()


def _counts(writers: dict[str, SplitWriter]) -> tuple[int, int]:
    """Return documents and bytes done; a document that is cut between the splits counts twice."""
    return sum(writer.documents for writer in writers.values()), sum(writer.bytes for writer in writers.values())


def _refuse_full_disk(folder: Path, left: int | None, text_bytes: int, token_bytes: int) -> None:
    """Foretell the size of all tokens from a first batch, and stop where the disk has less than that free."""
    if left is None or not text_bytes:
        return
    needed = int(left * token_bytes / text_bytes)
    if shutil.disk_usage(folder).free < needed:
        raise disk_full(folder.parent, needed)


def _refuse_empty_splits(data, writers: dict[str, SplitWriter]) -> None:
    if not any(writer.bytes for writer in writers.values()):
        raise UserError(f"{named_sources(data)[0]}: the source holds no text at all; name one that does")
    for split_name, writer in writers.items():
        if not writer.bytes:
            field_and_value = f"validation_fraction={data.validation_fraction} (by {data.validation_by})"
            raise UserError(f"{field_and_value}: no text is left for the {split_name} split; change it or add text")


def saved_tokenizer(folder: Path):
    """Load the very tokenizer that is kept with the tokens."""
    return load_tokenizer(str(folder / CORPUS / "tokenizer"))


# --- progress ---------------------------------------------------------------------------------------------------------


class Progress:
    """Shows documents/s, MB/s and the time left: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self, total_bytes: int | None, documents: int, size: int):
        self.total, self.documents, self.bytes = total_bytes, documents, size
        self.begun = self.reported = time.monotonic()
        options = {"unit": "B", "unit_scale": True, "desc": "tokens", "disable": not sys.stderr.isatty()}
        self.bar = tqdm(total=total_bytes, initial=size, **options)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def show(self, documents: int, size: int) -> None:
        """Say how much is done in all."""
        seconds = max(time.monotonic() - self.begun, 1e-9)
        rate = f"{(documents - self.documents) / seconds:,.0f} documents/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(f"{documents:,} documents, {rate}", refresh=False)
            self.bar.update(size - self.bar.n)
        elif time.monotonic() - self.reported >= REPORT_SECONDS:
            self.reported = time.monotonic()
            log(progress_line(documents, size, self.total, rate, (size - self.bytes) / seconds))


def progress_line(documents: int, size: int, total: int | None, rate: str, speed: float) -> str:
    """Return what is done, the speed (bytes/s) and, where the whole is known, the time left."""
    whole = f" of about {total / 1e6:,.0f}" if total else ""
    line = f"prepare: {documents:,} documents, {size / 1e6:,.0f}{whole} MB; {rate}, {speed / 1e6:,.1f} MB/s"
    if not total or not speed:
        return line
    minutes = max(total - size, 0) / speed / 60
    return f"{line}, about {minutes:,.0f} min left" if minutes >= 1 else f"{line}, less than a minute left"
