"""Pieces of text to token ids in the order they came, in this process or shared out among several."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from ..system.errors import UserError
from .encoding import encode_documents, fast_bpe
from .splitting import Piece

BATCH_CHARACTERS = 1_000_000  # of text that is encoded at once, by each of up to eight processes; by more, less each
PROCESSES_AT_FULL_SIZE = 8
THREADS = "TOKENIZERS_PARALLELISM"  # the environment variable that `tokenizers` reads
IS_FORKED = "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux"  # macOS's is not safe

Batch = list[Piece]


@dataclass
class Encoded:
    """The tokens of a batch: `ids` of all pieces in one array, and of each piece its tokens, bytes and characters."""

    ids: np.ndarray
    tokens: list[int]
    bytes: list[int]
    characters: list[int]

    def each(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """Yield (ids, bytes, characters) of each piece."""
        ends = np.cumsum(self.tokens)[:-1]
        yield from zip(np.split(self.ids, ends), self.bytes, self.characters, strict=True)


def encode(tokenizer, dtype: np.dtype, texts: list[str], names: list[str]) -> Encoded:
    """Encode texts; a UserError names the one that cannot be."""
    arrays = encode_documents(tokenizer, texts, names)
    ids = np.concatenate(arrays).astype(dtype)
    sizes = [len(text.encode()) for text in texts]
    return Encoded(ids, [len(array) for array in arrays], sizes, [len(text) for text in texts])


def encode_in_order(
    pieces: Iterable[Piece], tokenizer, dtype: np.dtype, num_proc: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Yield batches of pieces (their texts dropped) with their tokens, in the order of the pieces.

    With num_proc > 1 so many processes encode, each without threads, and no more than two batches a process are under
    way; what comes out is the same. A text of one batch is encoded here.
    """
    batches = _batches(iter(pieces), BATCH_CHARACTERS * PROCESSES_AT_FULL_SIZE // max(num_proc, PROCESSES_AT_FULL_SIZE))
    first = list(islice(batches, 2))
    batches = chain(first, batches)
    if num_proc == 1 or len(first) < 2:
        for batch in batches:
            yield _without_texts(batch), encode(tokenizer, dtype, *_texts_and_names(batch))
    else:
        yield from _encode_by_processes(batches, tokenizer, dtype, num_proc)


def _batches(pieces: Iterator[Piece], characters: int) -> Iterator[Batch]:
    """Group pieces until they hold so many characters of text; a piece is never taken apart."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _texts_and_names(batch: Batch) -> tuple[list[str], list[str]]:
    names = [f"{piece.name} (from character {piece.at} on)" if piece.at else piece.name for piece in batch]
    return [piece.text for piece in batch], names


def _without_texts(batch: Batch) -> Batch:
    return [piece._replace(text="") for piece in batch]


# --- several processes ------------------------------------------------------------------------------------------------


def _encode_by_processes(batches: Iterator[Batch], tokenizer, dtype, num_proc: int) -> Iterator[tuple[Batch, Encoded]]:
    waiting: deque = deque()
    with _without_threads():
        pool = _start_pool(tokenizer, dtype, num_proc)
        try:
            for batch in batches:
                waiting.append((_without_texts(batch), pool.submit(_encode_here, *_texts_and_names(batch))))
                if len(waiting) >= 2 * num_proc:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        except BrokenProcessPool as error:
            why = f"num_proc={num_proc}: one of the processes was ended from outside, as for want of memory"
            raise UserError(f"{why}; the same command goes on from where it was, perhaps with fewer") from error
        finally:
            pool.shutdown(cancel_futures=True)
            gc.unfreeze()


@contextmanager
def _without_threads() -> Iterator[None]:
    """Have `tokenizers` use no threads for a while: processes are started, and each of them is one."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        yield
    finally:
        os.environ.pop(THREADS) if before is None else os.environ.update({THREADS: before})


def _finished(batch: Batch, future) -> tuple[Batch, Encoded]:
    return batch, future.result()


def _start_pool(tokenizer, dtype, num_proc: int) -> ProcessPoolExecutor:
    """Start the processes; where they can be forked they share the tokenizer's and the libraries' memory."""
    context = multiprocessing.get_context("fork" if IS_FORKED else "spawn")
    fast_bpe(tokenizer)  # built once, here
    gc.collect()
    gc.freeze()  # so that collecting garbage in a fork does not copy what it shares
    arguments = (tokenizer, dtype, os.getpid())
    return ProcessPoolExecutor(num_proc, mp_context=context, initializer=_begin_work, initargs=arguments)


_worker: dict = {}  # what _begin_work sets in a worker process, and nobody in any other


def _begin_work(tokenizer, dtype, parent: int) -> None:
    """Make this process a worker: Ctrl-C is the parent's affair, and it does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker.update(tokenizer=tokenizer, dtype=dtype)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: a parent that was killed cannot tell its workers."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_here(texts: list[str], names: list[str]) -> Encoded:
    return encode(_worker["tokenizer"], _worker["dtype"], texts, names)
