"""Documents to token ids: by a table, by `tokenizers`, or by tiktoken, in this process or shared out among several."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from weakref import WeakKeyDictionary

import numpy as np
from accelerate.utils import patch_environment
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..system.errors import UserError
from .documents import Document
from .tokenizers import BYTE_VOCABULARY, FindPlace, backend_state, characters_of, splits_as_gpt2, tokenizer_kind

THE_PROMPT = "the prompt"
PIECE_CHARACTERS = 1_000_000  # a longer text is encoded in pieces where that makes no difference
BATCH_CHARACTERS = 1_000_000  # of text that is encoded at once, by each of up to eight processes; by more, less each
PROCESSES_AT_FULL_SIZE = 8
IS_FORKED = "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux"  # macOS's is not safe
Batch = list[Document]


def _encode_bytes(tokenizer, texts: list[str], names: list[str]) -> list[np.ndarray]:
    return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]


def _encode_characters(tokenizer, texts: list[str], names: list[str]) -> list[np.ndarray]:
    """Look characters up in a table over code points; the last entry stands for all that lie beyond the table."""
    characters = characters_of(tokenizer)
    code_points = np.array([ord(character) for character in characters])
    unknown = len(characters)
    table = np.full(code_points.max() + 2, unknown, dtype=np.uint32)
    table[code_points] = np.arange(unknown)
    encoded = []
    for text, name in zip(texts, names, strict=True):
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = table[np.minimum(points, len(table) - 1)]
        if (ids == unknown).any():
            offset = int((ids == unknown).argmax())
            raise _unknown_character(text[offset], offset, name)
        encoded.append(ids)
    return encoded


def _unknown_character(character: str, offset: int, name: str) -> UserError:
    where = f"{character!r} (U+{ord(character):04X}) at offset {offset} of {name}"
    mend = "give another --prompt" if name == THE_PROMPT else "build it on this text too"
    return UserError(f"tokenizer='char': it does not know {where}; {mend}, or use tokenizer=byte")


def _encode_others(tokenizer, texts: list[str], names: list[str]) -> list[np.ndarray]:
    """Encode by tiktoken what it is known to encode alike, and all else by `tokenizers`."""
    fast = fast_bpe(tokenizer, sum(map(len, texts)))
    encoded = fast.encode(texts) if fast else [None] * len(texts)
    left = [index for index, ids in enumerate(encoded) if ids is None]
    by_itself = _encode_by_itself(tokenizer, [texts[index] for index in left], [names[index] for index in left])
    for index, ids in zip(left, by_itself, strict=True):
        encoded[index] = ids
    return encoded


def _encode_by_itself(tokenizer, texts: list[str], names: list[str]) -> list[np.ndarray]:
    """Encode by `tokenizers`, with special tokens in text, truncation and padding switched off for a while."""
    backend = tokenizer.backend_tokenizer
    special, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the only class that `tokenizers` raises
        raise UserError(f"tokenizer: cannot encode {names[0]} or one after it ({error}); try byte") from error
    finally:
        backend.encode_special_tokens = special
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


ENCODERS = {"byte": _encode_bytes, "char": _encode_characters, "other": _encode_others}


def encode_documents(tokenizer, texts: list[str], names: list[str] | None = None) -> list[np.ndarray]:
    """Encode whole documents as ordinary text: nothing is appended, cut off, or read as a special token.

    Returns one uint32 array of token ids a text. Raises UserError naming the first character that the tokenizer
    does not know, its offset in characters and, when `names` are given, its document.
    """
    names = names or [f"text {number}" for number in range(len(texts))]
    return ENCODERS[tokenizer_kind(tokenizer)](tokenizer, texts, names)


# --- byte-level BPE as GPT-2's, by tiktoken: several times faster, and only where its ids are provably the same ------
#
# Two things could differ, and both are checked before a token is trusted. How text is split: the pattern depends on a
# character only by its being a letter, a number, whitespace or none of them, so each 256 code points that a text uses
# are asked for in both libraries. How a piece is merged: tiktoken joins neighbours that together spell a token,
# `tokenizers` only those that a merge names. Where merges are numbered in order and every token, encoded alone, is
# itself, both are the same: a span between two boundaries that survive is merged as if it were alone, so when its turn
# comes it is the two parts that the merge names, or it never becomes that token.

# GPT-2's rule, written so that it never goes back: after a possessive run nothing follows that could fail.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PLAIN_MODEL = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False, "ignore_merges": False}
WORTH_IT = 500_000  # characters: fewer are encoded sooner than the fast encoder is built
BLOCK_BITS = 8  # code points whose kind is checked together
SURROGATES = range(0xD800, 0xE000)


class FastBPE:
    """A tiktoken encoding and the blocks of code points in which it is known to split as `tokenizers` does."""

    def __init__(self, ranks: dict[bytes, int]):
        self.encoding, self.agrees = _encoding(ranks), {}

    def encode(self, texts: list[str]) -> list[np.ndarray | None]:
        """Return the uint32 ids of each text, or None for a text that `tokenizers` itself must encode."""
        threads = min(_threads(), len(texts))
        if threads < 2:
            return [self._encode(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, texts))

    def _encode(self, text: str) -> np.ndarray | None:
        return np.array(self.encoding.encode_ordinary(text), dtype=np.uint32) if self._is_sure(text) else None

    def _is_sure(self, text: str) -> bool:
        """Say whether every character of the text is of one kind in both libraries, each block of them asked once."""
        used = [0]
        if not text.isascii():
            try:
                points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            except UnicodeEncodeError:  # half a surrogate pair: `tokenizers` says what is wrong
                return False
            used = np.flatnonzero(np.bincount(points >> BLOCK_BITS)).tolist()
        for block in used:
            if block not in self.agrees:
                self.agrees[block] = kinds_agree(range(block << BLOCK_BITS, (block + 1) << BLOCK_BITS))
        return all(self.agrees[block] for block in used)


@dataclass
class Known:
    """What is known of a tokenizer of so many tokens: the characters it has met, and then its fast encoder or None."""

    size: int
    characters: int = 0
    is_built: bool = False
    fast: FastBPE | None = None


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerFast, Known] = WeakKeyDictionary()


def fast_bpe(tokenizer, characters: int = WORTH_IT) -> FastBPE | None:
    """Return the fast encoder of a tokenizer, or None where tiktoken is not installed or could give other ids.

    characters: how many are to be encoded now; to build the encoder takes about a second, so it is None until there
    have been enough.
    """
    known = _KNOWN.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _KNOWN[tokenizer] = Known(len(tokenizer))
    known.characters += characters
    if not known.is_built and known.characters >= WORTH_IT:
        is_installed = find_spec("tiktoken") is not None
        ranks = ranks_of(backend_state(tokenizer.backend_tokenizer)) if is_installed else None
        known.fast, known.is_built = None if ranks is None else FastBPE(ranks), True
    return known.fast


def ranks_of(state: dict) -> dict[bytes, int] | None:
    """Return tiktoken's table, bytes of a token to its id, of a backend's JSON; None where its ids could differ."""
    model = state["model"]
    is_plain = all(model.get(key) == value for key, value in PLAIN_MODEL.items()) and splits_as_gpt2(state)
    is_plain = is_plain and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    if not is_plain or not BYTE_VOCABULARY.keys() <= model["vocab"].keys():
        return None
    tokens = dict.fromkeys(BYTE_VOCABULARY)  # in the order of their merges
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left not in tokens or right not in tokens or left + right in tokens:
            return None  # parts are merged before the whole, and a token has one merge
        tokens[left + right] = None
    ids = [model["vocab"][token] for token in tokens]
    merged = ids[len(BYTE_VOCABULARY) :]
    if sorted(merged) != merged or not _spell_themselves(state, list(tokens), ids):
        return None
    spelled = (bytes(BYTE_VOCABULARY[character] for character in token) for token in tokens)
    return dict(zip(spelled, ids, strict=True))


def _spell_themselves(state: dict, tokens: list[str], ids: list[int]) -> bool:
    """Say whether each token, merged alone, becomes itself."""
    bare = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    encoded = Tokenizer.from_str(json.dumps(state | bare)).encode_batch_fast(tokens, add_special_tokens=False)
    return all(one.ids == [id] for one, id in zip(encoded, ids, strict=True))


def kinds_agree(points: range) -> bool:
    """Say whether both libraries take each code point for the same: a letter, a number, whitespace or none of them.

    A character is of the kind of the one before it if the two are one piece; what is none of three kinds is whitespace.
    """
    characters = [chr(point) for point in points if point not in SURROGATES and point < 0x110000]
    pairs = [before + character for before in "a1!" for character in characters]
    whole = {pair.encode(): 256 + number for number, pair in enumerate(dict.fromkeys(pairs))}
    probe = _encoding({bytes([byte]): byte for byte in range(256)} | whole)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    return all((len(split(pair)) == 1) == (len(probe.encode_ordinary(pair)) == 1) for pair in pairs)


def _encoding(ranks: dict[bytes, int]):
    import tiktoken

    return tiktoken.Encoding("acorn", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})


def _threads() -> int:
    """As many as `tokenizers` would use: its own two variables count for both."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "f", "n", "0"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("RAYON_NUM_THREADS", 0)) or cores or 1


# --- long texts: where they may be taken apart ------------------------------------------------------------------------


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


# --- in one process or several ----------------------------------------------------------------------------------------


def encode_batch(tokenizer, dtype: np.dtype, batch: Batch) -> list[np.ndarray]:
    """Return the ids of each text; a UserError names the one that cannot be encoded, and where in it."""
    names = [f"{part.name} (from character {part.at} on)" if part.at else part.name for part in batch]
    return [ids.astype(dtype) for ids in encode_documents(tokenizer, [part.text for part in batch], names)]


def encode_in_order(
    documents: Iterable[Document], tokenizer, dtype: np.dtype, num_proc: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """Yield batches of documents with the ids of each, in the order of the documents.

    With num_proc > 1 so many processes encode, each without threads, and no more than two batches a process are under
    way; what comes out is the same. A text of one batch is encoded here. (`Executor.map` takes a `buffersize` from
    Python 3.14 on; `datasets.map` and `Pool.imap` would take all of the text at once.)
    """
    batches = _batches(documents, BATCH_CHARACTERS * PROCESSES_AT_FULL_SIZE // max(num_proc, PROCESSES_AT_FULL_SIZE))
    first = list(islice(batches, 2))
    if num_proc == 1 or len(first) < 2:
        for batch in chain(first, batches):
            yield batch, encode_batch(tokenizer, dtype, batch)
        return
    waiting: deque = deque()
    with patch_environment(TOKENIZERS_PARALLELISM="false"):  # each process is one thread
        pool = _start_pool(tokenizer, dtype, num_proc)
        try:
            for batch in chain(first, batches):
                waiting.append((batch, pool.submit(_encode_here, batch)))
                if len(waiting) >= 2 * num_proc:
                    batch, future = waiting.popleft()
                    yield batch, future.result()
            for batch, future in waiting:
                yield batch, future.result()
        except BrokenProcessPool as error:
            why = f"num_proc={num_proc}: one of the processes was ended from outside, as for want of memory"
            raise UserError(f"{why}; the same command goes on from where it was, perhaps with fewer") from error
        finally:
            pool.shutdown(cancel_futures=True)
            gc.unfreeze()


def _batches(documents: Iterable[Document], characters: int) -> Iterator[Batch]:
    """Group documents until they hold so many characters; none is taken apart."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start_pool(tokenizer, dtype: np.dtype, num_proc: int) -> ProcessPoolExecutor:
    """Start the processes; where they can be forked they share the tokenizer's and the libraries' memory."""
    context = multiprocessing.get_context("fork" if IS_FORKED else "spawn")
    fast_bpe(tokenizer)  # built once, here
    gc.collect()
    gc.freeze()  # so that collecting garbage in a fork does not copy what it shares
    return ProcessPoolExecutor(num_proc, context, _begin_work, (tokenizer, dtype, os.getpid()))


_worker: list = []  # the tokenizer and the dtype of a worker process; empty in any other


def _begin_work(tokenizer, dtype: np.dtype, parent: int) -> None:
    """Make this process a worker: Ctrl-C is the parent's affair, and it does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker[:] = tokenizer, dtype
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a parent that was killed cannot tell its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_here(batch: Batch) -> list[np.ndarray]:
    return encode_batch(*_worker, batch)
