"""Any text → token shards, a tokenizer and `manifest.json` in one directory, written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .dataset import ShardWriter, TokenShards
from .errors import UserError, is_disk_full
from .sources import documents, fingerprint_sources, licence_of, named_sources, numbered_documents, unit_hash
from .tokenizers import BUILDERS, build_tokenizer, encode_documents, load_tokenizer, tokenizer_hash

FORMAT = "acorn-corpus"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
BATCH_CHARACTERS = 4_000_000  # of text that is encoded at once: bounds memory, and keeps the encoder's threads busy


@dataclass(frozen=True)
class Corpus:
    """A prepared directory: `tokens(split)` for training, `tokenizer`, and the manifest that describes them."""

    directory: Path
    manifest: dict

    @cached_property
    def tokenizer(self):
        return load_tokenizer(str(self.directory / "tokenizer"))

    def tokens(self, split: str) -> TokenShards:
        """Return the tokens of "train" or "validation", memory-mapped."""
        shards = self.manifest["splits"][split]["shards"]
        return TokenShards([self.directory / shard["file"] for shard in shards], np.dtype(self.manifest["dtype"]).str)


class Piece(NamedTuple):
    """A document, or the part of it that falls into one split; `ends` says that the end-of-text token follows."""

    split: str
    name: str
    text: str
    ends: bool


@dataclass
class Plan:
    """What is known before a text is tokenised: its size where a pass has counted it, and the rule that splits it."""

    split: Callable[[], Iterator[Piece]]
    total_bytes: int | None


def prepare(data, tokenizer=None, name: str = "corpus") -> Corpus:
    """Tokenise the text that the data arguments name into `data_dir`, or use what already lies there.

    `data_dir` defaults to corpora/<name>-<first 8 hex digits of the fingerprint>. The fingerprint covers sources,
    tokenizer and split options, so preparing the same thing again does nothing. Raises UserError for arguments that
    can not be met, for a directory that holds something else, and for a full disk.
    """
    if data.data_dir and not named_sources(data):
        return load_corpus(data.data_dir)
    check_split_options(data)
    description = describe(data, tokenizer)
    fingerprint = _digest(description)
    directory = Path(data.data_dir or f"corpora/{name}-{fingerprint[:8]}")
    if _is_prepared(directory, fingerprint):
        if os.environ.get("RANK", "0") == "0":  # torchrun's number of this process: one line, not one a process
            print(f"{directory} is prepared already: nothing to do.")
        return load_corpus(directory)
    tokenizer = tokenizer or build_tokenizer(data.tokenizer, lambda: _texts(data), data.tokenizer_vocab_size)
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "fingerprint": fingerprint}
    with _built_aside(directory, fingerprint) as building:
        write_corpus(building, data, tokenizer, header | description)
    return load_corpus(directory)


def load_corpus(directory: str | os.PathLike) -> Corpus:
    """Open a prepared directory; raise UserError where shard sizes or tokenizer are not what the manifest says."""
    directory = Path(directory)
    corpus = Corpus(directory, read_manifest(directory))
    itemsize = np.dtype(corpus.manifest["dtype"]).itemsize
    for split in SPLITS:
        for shard in corpus.manifest["splits"][split]["shards"]:
            _check_shard(directory / shard["file"], shard["tokens"] * itemsize)
    if (found := tokenizer_hash(corpus.tokenizer)) != (expected := corpus.manifest["tokenizer"]["hash"]):
        where = f"{directory / 'tokenizer'}: its hash is {found[:8]} and the tokens were made with {expected[:8]}"
        raise UserError(f"{where}; prepare the text again into another --data_dir")
    return corpus


def read_manifest(directory: Path) -> dict:
    """Read the manifest of a prepared directory and refuse what is none."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"data_dir={str(directory)!r}: holds no {MANIFEST}; make it with acorn prepare") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can not be read ({error}); prepare the text again into another --data_dir") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("format_version")) != (FORMAT, 1):
        raise UserError(f"{path}: is not of format {FORMAT} {FORMAT_VERSION}; prepare the text again")
    return manifest


def _check_shard(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.exists() else "missing"
    if size != expected:
        have = size if size == "missing" else f"{size} bytes long, not {expected}"
        raise UserError(f"{path}: is {have}; prepare the text again into another --data_dir")


def summary(corpus: Corpus) -> str:
    """Return one line that says what a corpus holds."""
    splits = corpus.manifest["splits"]
    counts = " and ".join(f"{splits[split]['tokens']:,} {split}" for split in SPLITS)
    return f"{corpus.directory}: {counts} tokens, vocabulary {corpus.manifest['vocab_size']:,}."


# --- what is to be prepared -------------------------------------------------------------------------------------------


def check_split_options(data) -> None:
    """Refuse split options that can not be met, before any text is read."""
    fraction = data.validation_fraction
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise UserError(f"validation_fraction={fraction!r}: must lie between 0 and 1, such as 0.1")
    if data.validation_by not in PLANS:
        raise UserError(f"validation_by={data.validation_by!r}: must be one of {', '.join(PLANS)}")
    if data.shard_size < 1:
        raise UserError(f"shard_size={data.shard_size}: must be at least 1 token")
    if named_sources(data) == ["mixture"] and data.validation_by == "position":
        why = "a mixture repeats documents, so its last part may repeat what is trained on"
        raise UserError(f"validation_by='position': {why}; use --validation_by documents")


def describe(data, tokenizer=None) -> dict:
    """Return all that decides which tokens come out, as a dict fit for JSON."""
    split = {"by": data.validation_by, "fraction": data.validation_fraction, "seed": data.validation_seed}
    return {"sources": fingerprint_sources(data), "tokenizer_choice": _choice(data, tokenizer), "validation": split}


def _choice(data, tokenizer) -> dict:
    """Name a tokenizer that is built by its recipe, and one that exists by what it does."""
    if tokenizer is None and data.tokenizer in BUILDERS:
        return {"build": data.tokenizer, "vocab_size": data.tokenizer_vocab_size}
    return {"hash": tokenizer_hash(tokenizer or load_tokenizer(data.tokenizer))}


def _digest(description: dict) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, description], sort_keys=True).encode()).hexdigest()


def _texts(data) -> Iterator[str]:
    return (text for _, text in documents(data))


def _is_prepared(directory: Path, fingerprint: str) -> bool:
    """Say whether the directory holds just this; raise UserError where it holds anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    held = read_manifest(directory)["fingerprint"]
    if held != fingerprint:
        what = f"holds another corpus ({held[:8]}, and this one is {fingerprint[:8]})"
        raise UserError(f"data_dir={str(directory)!r}: {what}; name another --data_dir, or remove it yourself")
    return True


# --- splitting: data arguments -> Plan --------------------------------------------------------------------------------


def plan_by_position(data) -> Plan:
    """Cut the concatenated text at int(characters * (1 - fraction)), as nanoGPT does, in two passes over the text.

    The document that is cut goes on in the validation split; its head gets no end-of-text token.
    """
    characters = size = 0
    for _, text in documents(data):
        characters, size = characters + len(text), size + len(text.encode())
    cut = int(characters * (1 - data.validation_fraction))

    def split() -> Iterator[Piece]:
        room = cut
        for name, text in documents(data):
            head, tail = text[:room], text[room:]
            if room:
                yield Piece("train", name, head, ends=not tail)
            if tail or not room:
                yield Piece("validation", name, tail, ends=True)
            room -= len(head)

    return Plan(split, size)


def plan_by_documents(data) -> Plan:
    """Give a document to validation when unit_hash("validation", seed, its number) < fraction, and at least one.

    Where that gives one split nothing, the document with the smallest hash is the only one in validation. A text of
    one document is split by position instead, and that is said.
    """
    seed, limit, sides = data.validation_seed, data.validation_fraction, set()
    lowest, count = 1.0, 0
    for count, document in enumerate(numbered_documents(data), start=1):  # noqa: B007
        point = unit_hash("validation", seed, document.number)
        lowest = min(lowest, point)
        sides.add(point < limit)
        if len(sides) == 2:  # most texts show both sides early, and then are not read twice
            break
    if count == 1:
        print("one document cannot be split by documents: its end validates (validation_by=position)")
        return plan_by_position(data)
    last = limit if len(sides) == 2 else np.nextafter(lowest, 1)

    def split() -> Iterator[Piece]:
        for number, name, text in numbered_documents(data):
            is_validation = unit_hash("validation", seed, number) < last
            yield Piece("validation" if is_validation else "train", name, text, ends=True)

    return Plan(split, None)


PLANS = {"position": plan_by_position, "documents": plan_by_documents}


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class SplitWriter:
    """Hands one split's tokens to its shards and counts what goes in; a document that is cut counts in both splits."""

    shards: ShardWriter
    documents: int = 0
    bytes: int = 0

    def add(self, pieces: list[Piece], encoded: list[np.ndarray], eos_token_id: int) -> None:
        """Append pieces that are encoded already, with the end-of-text token after each that ends."""
        end = np.array([eos_token_id], dtype=np.uint32)
        for piece, ids in zip(pieces, encoded, strict=True):
            self.shards.write(np.append(ids, end) if piece.ends else ids)
            self.documents += 1
            self.bytes += len(piece.text.encode())

    def manifest(self) -> dict:
        """Return this split's part of the manifest."""
        shards = self.shards.finished
        tokens = sum(shard["tokens"] for shard in shards)
        return {"documents": self.documents, "tokens": tokens, "bytes": self.bytes, "shards": shards}


def write_corpus(directory: Path, data, tokenizer, header: dict) -> None:
    """Write tokenizer, shards and manifest into an empty directory; raise UserError where a split stays empty."""
    tokenizer.save_pretrained(directory / "tokenizer")
    saved = load_tokenizer(str(directory / "tokenizer"))  # the tokens are made with the very tokenizer that is kept
    dtype = np.dtype("<u2" if len(saved) <= 2**16 else "<u4")
    writers = {split: SplitWriter(ShardWriter(directory, split, dtype, data.shard_size)) for split in SPLITS}
    try:
        _write_tokens(directory, PLANS[data.validation_by](data), saved, writers)
    finally:
        for writer in writers.values():
            writer.shards.close()
    _refuse_empty_splits(data, writers)
    manifest = header | {
        "tokenizer": {"name": data.tokenizer, "hash": tokenizer_hash(saved)},
        "vocab_size": len(saved),
        "eos_token_id": saved.eos_token_id,
        "dtype": dtype.name,
        "licence": licence_of(data),
        "splits": {split: writer.manifest() for split, writer in writers.items()},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _write_tokens(directory: Path, plan: Plan, tokenizer, writers: dict[str, SplitWriter]) -> None:
    """Encode the pieces batch by batch and hand them to their split's writer, with a progress bar on a terminal."""
    with tqdm(total=plan.total_bytes, unit="B", unit_scale=True, desc="tokens", disable=not sys.stderr.isatty()) as bar:
        for number, pieces in enumerate(_batches(plan.split())):
            encoded = encode_documents(tokenizer, [piece.text for piece in pieces], [piece.name for piece in pieces])
            if number == 0:
                _refuse_full_disk(directory, plan, pieces, encoded, writers["train"].shards.dtype)
            for split, writer in writers.items():
                chosen = [index for index, piece in enumerate(pieces) if piece.split == split]
                writer.add([pieces[i] for i in chosen], [encoded[i] for i in chosen], tokenizer.eos_token_id)
            bar.update(sum(writer.bytes for writer in writers.values()) - bar.n)
            bar.set_postfix(documents=sum(writer.documents for writer in writers.values()), refresh=False)


def _refuse_empty_splits(data, writers: dict[str, SplitWriter]) -> None:
    if not any(writer.bytes for writer in writers.values()):
        raise UserError(f"{named_sources(data)[0]}: the source holds no text at all; name one that does")
    for split, writer in writers.items():
        if not writer.bytes:
            field_and_value = f"validation_fraction={data.validation_fraction} (by {data.validation_by})"
            raise UserError(f"{field_and_value}: no text is left for the {split} split; change it or add text")


def _refuse_full_disk(directory: Path, plan: Plan, pieces: list[Piece], encoded: list[np.ndarray], dtype) -> None:
    """Foretell the size of all tokens from the first batch, and stop where the disk has less than that free."""
    text_bytes = sum(len(piece.text.encode()) for piece in pieces)
    if plan.total_bytes is None or not text_bytes:
        return
    needed = int(sum(map(len, encoded)) * dtype.itemsize * plan.total_bytes / text_bytes)
    if shutil.disk_usage(directory).free < needed:
        raise disk_full(directory.parent, needed)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Group pieces until they hold BATCH_CHARACTERS of text; a document is never taken apart."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _built_aside(directory: Path, fingerprint: str) -> Iterator[Path]:
    """Yield a new directory beside `directory`, which takes that name when all went well and is removed when not."""
    missing = [folder for folder in directory.parents if not folder.exists()]
    building = directory.parent / f".{directory.name}-{uuid.uuid4().hex[:8]}"
    try:
        building.mkdir(parents=True)
        yield building
        _sync(building)
        _rename(building, directory, fingerprint)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(directory.parent, _bytes_below(building)) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
            raise UserError(f"data_dir={str(directory)!r}: {error.strerror}; name another --data_dir") from error
        raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # not empty: it holds what was built
                folder.rmdir()


def _sync(building: Path) -> None:
    """Have the system write every file and folder to the disk, so that a power cut after the rename loses nothing."""
    for path in [*building.rglob("*"), building]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _rename(building: Path, directory: Path, fingerprint: str) -> None:
    """Give the finished directory its name, unless another process was first and prepared the same."""
    try:
        os.rename(building, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _is_prepared(directory, fingerprint):
            raise


def disk_full(folder: Path, needed: int) -> UserError:
    """Say that the tokens do not fit, in MB."""
    free = shutil.disk_usage(folder).free
    sizes = f"at least {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free"
    return UserError(f"data_dir: the disk of {folder} is full: {sizes}; free some, or name another --data_dir")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
