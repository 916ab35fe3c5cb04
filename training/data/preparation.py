"""Any text → token shards, a tokenizer and `manifest.json` in one directory, in bounded memory, whole or not at all.

A preparation works in a folder beside that directory, shard after shard. What a killed one left there is gone on with.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ..system.errors import UserError, is_disk_full, log
from ..system.files import digest, making, publish, write_whole
from ..system.lock import InUse, locked
from . import encoding, files
from .corpus import (
    ELSEWHERE,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    Corpus,
    check_shards,
    load_corpus,
    read_manifest,
    split_rule,
    tokenizer_facts,
)
from .dataset import ShardWriter
from .documents import START, Document, Position, skipped_in_words
from .encoding import encodable, encode_in_order
from .sources import (
    SPLITTERS,
    check_split_options,
    fingerprint_sources,
    licence_of,
    named_sources,
    open_source,
    read_documents,
    read_stretches,
)
from .tokenizers import BUILDERS, build_tokenizer, cutting_rule, load_tokenizer, tokenizer_hash

CORPUS = "corpus"  # what takes the place of the directory in the end; state and lock lie beside it
STATE = "state.json"
POSITION_KEYS = ("documents", "place", "pieces", "characters")  # of a Position, as they are called there
LOCK_SECONDS = 1  # between attempts to take over from another process
SAVE_SECONDS = 5  # of work that a kill costs, at most
REPORT_SECONDS = 60  # between lines where there is no terminal
LONG_BYTES = 1_000_000_000  # of text: reading it takes so long that a person should know why
# What preparing decides: with tokens that are prepared it can only be said again.
DECIDED = """
validation_fraction validation_by validation_seed validation_characters shard_size num_proc streaming on_bad_file
tokenizer_vocab_size text_column dataset_config dataset_split
""".split()


def prepare(data, tokenizer=None, name: str = "corpus", check_hashes: bool = False) -> Corpus:
    """Tokenise the text that the data arguments name into `data_dir`, or use what already lies there.

    `data_dir` defaults to corpora/<name>-<first 8 hex digits of the fingerprint>. The fingerprint covers sources,
    tokenizer and split options, so preparing the same thing again does nothing, and a preparation that was killed goes
    on where it was. `check_hashes` compares what is there already with its hashes. Raises UserError for arguments that
    cannot be met, for a directory that holds something else, for shards that are damaged and for a full disk.
    """
    if data.data_dir and not named_sources(data):
        return _open_prepared(data)
    check_split_options(data)
    description = describe(data, tokenizer)
    fingerprint = digest([FORMAT_VERSION, description])
    directory = Path(data.data_dir or f"corpora/{name}-{fingerprint[:8]}")
    if _is_prepared(directory, fingerprint):
        shutil.rmtree(building_folder(directory, fingerprint), ignore_errors=True)  # if it was killed at the very end
        corpus = load_corpus(directory)
        whole = f", and its {check_shards(directory, corpus.manifest)} shards are whole" if check_hashes else ""
        if os.environ.get("RANK", "0") == "0":  # torchrun's number of this process: one line, not one a process
            print(f"{directory} is prepared already{whole}: nothing to do.")
        return corpus
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "fingerprint": fingerprint}
    with _built_aside(directory, fingerprint) as folder:
        if not _is_prepared(directory, fingerprint):  # the process that this one waited for may have done it
            _build(folder, directory, data, tokenizer, header | description)
    return load_corpus(directory)


# --- what is to be prepared, or is there already ----------------------------------------------------------------------


def describe(data, tokenizer=None) -> dict:
    """Return all that decides which tokens come out, as a dict fit for JSON.

    A tokenizer that is built is named by its recipe, and one that exists by what it does.
    """
    if tokenizer is None and data.tokenizer in BUILDERS:
        choice = {"build": data.tokenizer, "vocab_size": data.tokenizer_vocab_size}
    else:
        choice = {"hash": tokenizer_hash(tokenizer or load_tokenizer(data.tokenizer))}
    return {"sources": fingerprint_sources(data), "tokenizer_choice": choice, "validation": split_rule(data)}


def _is_prepared(directory: Path, fingerprint: str) -> bool:
    """Say whether the directory holds just this; raise UserError where it holds anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    held = read_manifest(directory).get("fingerprint", "unknown")
    if held != fingerprint:
        what = f"holds another corpus ({held[:8]}, and this one is {fingerprint[:8]})"
        raise UserError(f"data_dir={str(directory)!r}: {what}; name another --data_dir, or remove it yourself")
    return True


def _open_prepared(data) -> Corpus:
    """Open `data_dir`, and refuse what was decided otherwise when its tokens were prepared.

    "byte" is what stands there when nobody named a tokenizer. Names are compared first: a machine without a network,
    to which tokens were carried, cannot load "gpt2".
    """
    corpus = load_corpus(data.data_dir)
    decided = {f"validation_{key}": value for key, value in (corpus.manifest.get("validation") or {}).items()}
    for option in (option for option in fields(data) if option.name in DECIDED):
        value = getattr(data, option.name)
        if value not in (option.default, decided.get(option.name, option.default)):
            was = f"prepared with {decided[option.name]!r}" if option.name in decided else "prepared already"
            what = f"the tokens in data_dir={data.data_dir!r} were {was}"
            raise UserError(f"{option.name}={value!r}: {what}; leave it out, or {ELSEWHERE}")
    held = corpus.manifest["tokenizer"]
    if data.tokenizer in ("byte", held["name"]):
        return corpus
    if data.tokenizer in BUILDERS or tokenizer_hash(load_tokenizer(data.tokenizer)) != held["hash"]:
        what = f"data_dir={data.data_dir!r} is not its: its tokens were made with {held['name']!r}"
        raise UserError(f"tokenizer={data.tokenizer!r}: {what}; name that one, or {ELSEWHERE}")
    return corpus


# --- the folder beside ------------------------------------------------------------------------------------------------


def building_folder(directory: Path, fingerprint: str) -> Path:
    """Return where `directory` is built: another text for the same place has another folder."""
    return directory.parent / f".{directory.name}-{fingerprint[:8]}.building"


@contextmanager
def _built_aside(directory: Path, fingerprint: str) -> Iterator[Path]:
    """Yield a folder of this process alone, with what one that was killed left there; it is removed in the end.

    While another process has it, this one waits. When work fails, the folder stays if it holds a STATE to go on from.
    Raises UserError for a disk that is full and a place that cannot be written to.
    """
    folder = building_folder(directory, fingerprint)
    with making(folder, f"data_dir={str(directory)!r}"), _locked_after_waiting(folder):
        try:
            yield folder
            (folder / STATE).unlink(missing_ok=True)
        except OSError as error:
            if not is_disk_full(error):
                raise
            written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            raise _disk_full(directory.parent, written) from error
        finally:
            if (folder / STATE).exists():
                log(f"what is done is kept: the same command goes on from there (if you will not, remove {folder})")
            else:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked_after_waiting(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, once no other process does."""
    is_told = False
    with ExitStack() as held:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(locked(folder))
                break
            except InUse as error:
                if not is_told:
                    log(f"{error.holder} prepares the same text, in {folder}: waiting until it ends")
                is_told = True
                time.sleep(LOCK_SECONDS)
            except FileNotFoundError:  # the other one has just finished, and removed the folder
                continue
        yield


def _disk_full(folder: Path, needed: int) -> UserError:
    free = shutil.disk_usage(folder).free
    sizes = f"at least {needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free"
    return UserError(f"data_dir: the disk of {folder} is full: {sizes}; free some, or name another --data_dir")


def _build(folder: Path, directory: Path, data, tokenizer, header: dict) -> None:
    """Prepare the text below `folder`, going on with what is there, and put it in the place of `directory`."""
    begun = time.monotonic()
    state, made = read_state(folder, header["fingerprint"], data.shard_size), folder / CORPUS
    if not state.rule:
        texts = (document.text for document in read_documents(data))  # read once, if at all
        tokenizer = tokenizer or build_tokenizer(data.tokenizer, lambda: texts, data.tokenizer_vocab_size)
        tokenizer.save_pretrained(made / "tokenizer")
    tokenizer = load_tokenizer(str(made / "tokenizer"))
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")  # that holds every id
    manifest = header | tokenizer_facts(data.tokenizer, tokenizer) | {"dtype": dtype.name, "licence": licence_of(data)}
    writers = _open_writers(folder, state, dtype, data.shard_size)
    write_tokens(folder, state, data, tokenizer, writers, begun)
    _refuse_changed_files(folder, data, header["sources"])
    manifest["splits"] = {split: writer.manifest() for split, writer in writers.items()}
    manifest |= {"left_out": skipped_in_words(state.left_out)} if state.left_out else {}
    write_whole(made / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    if not publish(made, directory):
        _is_prepared(directory, header["fingerprint"])  # by a process that does not see this one's lock


def _refuse_changed_files(folder: Path, data, sources: dict) -> None:
    """Refuse tokens of files that were written to after their fingerprint was taken; only such files are read again."""
    before = _files_in(sources)
    changed = sorted({path for path, *_ in before ^ _files_in(fingerprint_sources(data))}) if before else []
    if changed:
        (folder / STATE).unlink(missing_ok=True)  # so that the folder goes, too
        why = "was written to while it was being prepared; start again when nothing writes to it, or name a copy"
        raise UserError(f"{named_sources(data)[0]}: {changed[0]} {why}")


def _files_in(sources: dict) -> set[tuple]:
    """Return (path, bytes, hash) of each local file in a fingerprint of sources."""
    files = {(file["path"], file["bytes"], file["sha256"]) for file in sources.get("files", ())}
    return files.union(*map(_files_in, sources.get("parts", ())))


# --- how far it has come ----------------------------------------------------------------------------------------------


@dataclass
class State:
    """How far a preparation has come; its file holds a dict, in which the position is taken apart.

    settings: what must be the same to go on. rule: of splitting. total_bytes: of the text, where known. position: the
    pieces before it are done, its stretches are such pieces. splits: what each ShardWriter has written. left_out: files
    and rows, and why.
    """

    settings: dict
    rule: dict = field(default_factory=dict)
    total_bytes: int | None = None
    position: Position = START
    splits: dict[str, dict] = field(default_factory=lambda: {split: {} for split in SPLITS})
    left_out: dict = field(default_factory=dict)

    def save(self, folder: Path, writers: dict[str, ShardWriter]) -> None:
        """Write the state, after the tokens that it counts are on the disk."""
        self.splits = {split: writer.state() for split, writer in writers.items()}
        saved = vars(self) | dict(zip(POSITION_KEYS, self.position, strict=True))
        del saved["position"]
        write_whole(folder / STATE, json.dumps(saved))


def read_state(folder: Path, fingerprint: str, shard_size: int) -> State:
    """Return the state that a preparation of the same text left, or a new one in a folder that is empty but for it."""
    sizes = [files.STRETCH_BYTES, encoding.PIECE_CHARACTERS]  # of what a state counts
    settings = {"fingerprint": fingerprint, "shard_size": shard_size, "pieces": sizes}
    if (folder / STATE).exists():
        saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if saved["settings"] == settings:
            kept = {key: saved[key] for key in ("settings", "rule", "total_bytes", "splits", "left_out")}
            return State(**kept, position=Position(*(saved[key] for key in POSITION_KEYS)))
        log(f"{folder}: was begun with another shard_size, or by another version; starting over")
    (folder / STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / CORPUS, ignore_errors=True)
    (folder / CORPUS).mkdir()
    return State(settings)


# --- writing ----------------------------------------------------------------------------------------------------------


def _open_writers(folder: Path, state: State, dtype: np.dtype, shard_size: int) -> dict[str, ShardWriter]:
    made = folder / CORPUS
    try:
        return {split: ShardWriter(made, split, dtype, shard_size, saved) for split, saved in state.splits.items()}
    except ValueError as error:
        (folder / STATE).unlink()  # so that the folder goes, too
        raise UserError(f"{error}, so a preparation that was stopped cannot go on; start it again") from error


def write_tokens(folder: Path, state: State, data, tokenizer, writers: dict[str, ShardWriter], begun: float) -> None:
    """Write what is not done yet of the shards of both splits below `folder`, and close them.

    begun: the monotonic time when work that would be lost began, such as training the tokenizer. Raises UserError where
    a split stays empty and where the disk is too small.
    """
    if not state.rule:
        size = open_source(data).size()
        if data.validation_by == "position" and (size.bytes or 0) > LONG_BYTES:
            log(f"counting characters, to cut by position: one pass over about {size.bytes / 1e6:,.0f} MB")
        state.rule = SPLITTERS[data.validation_by].find(data, state.left_out)
        state.total_bytes = state.rule.get("bytes", size.bytes)
    elif state.position != START:
        log(f"going on where a preparation was stopped: {state.position.documents:,} documents are done")
    try:
        _write_pieces(folder, state, data, tokenizer, writers, begun)
    finally:
        for writer in writers.values():
            writer.close()
    if not any(writer.bytes for writer in writers.values()):
        raise UserError(f"{named_sources(data)[0]}: the source holds no text at all; name one that does")
    for split, writer in writers.items():
        if not writer.bytes:
            field_and_value = f"validation_fraction={data.validation_fraction} (by {data.validation_by})"
            raise UserError(f"{field_and_value}: no text is left for the {split} split; change it or add text")


def _write_pieces(folder: Path, state: State, data, tokenizer, writers: dict[str, ShardWriter], saved: float) -> None:
    """Encode the pieces and hand them to their split's writer, saving the state now and then."""
    is_first, dtype = True, writers["train"].dtype
    end_of_text = np.array([tokenizer.eos_token_id], dtype)
    encoding = encode_in_order(_pieces_from(state, data, tokenizer), tokenizer, dtype, data.num_proc)
    with closing(encoding), closing(Progress(state.total_bytes, *_counts(writers))) as progress:
        for batch, encoded in encoding:
            sizes = [len(piece.text.encode()) for piece in batch]
            if is_first and state.total_bytes is not None:
                left = state.total_bytes - _counts(writers)[1]
                _refuse_full_disk(folder, left, sum(sizes), sum(ids.nbytes for ids in encoded))
            is_first = False
            for piece, ids, size in zip(batch, encoded, sizes, strict=True):
                writer = writers[piece.split]
                writer.write(np.append(ids, end_of_text) if piece.ends else ids)
                writer.documents, writer.bytes = writer.documents + piece.starts, writer.bytes + size
                state.position = state.position.after(piece)
            progress.show(*_counts(writers))
            if time.monotonic() - saved >= SAVE_SECONDS:
                state.save(folder, writers)
                saved = time.monotonic()


def _pieces_from(state: State, data, tokenizer) -> Iterator[Document]:
    """Yield the pieces that are not done; those of a document that is done in part are made again and passed over."""
    stretches = read_stretches(data, state.position._replace(stretches=0), state.left_out)
    pieces = SPLITTERS[state.rule["by"]].split(stretches, data, state.rule, state.position.characters)
    pieces = encodable(pieces, cutting_rule(tokenizer), encoding.PIECE_CHARACTERS)
    return islice(pieces, state.position.stretches, None)


def _counts(writers: dict[str, ShardWriter]) -> tuple[int, int]:
    """Return documents and bytes done; a document that is cut between the splits counts twice."""
    return sum(writer.documents for writer in writers.values()), sum(writer.bytes for writer in writers.values())


def _refuse_full_disk(folder: Path, left: int, text_bytes: int, token_bytes: int) -> None:
    """Foretell the size of all tokens from a first batch, and stop where the disk has less than that free."""
    needed = int(left * token_bytes / text_bytes) if text_bytes else 0
    if shutil.disk_usage(folder).free < needed:
        raise _disk_full(folder.parent, needed)


class Progress:
    """Shows documents/s, MB/s and the time left: a bar on a terminal, a line a minute elsewhere."""

    def __init__(self, total_bytes: int | None, documents: int, size: int):
        self.total, self.documents, self.bytes = total_bytes, documents, size
        self.begun = self.reported = time.monotonic()
        options = {"unit": "B", "unit_scale": True, "desc": "tokens", "disable": not sys.stderr.isatty()}
        self.bar = tqdm(total=total_bytes, initial=size, **options)

    def close(self) -> None:
        """Take the bar away."""
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
