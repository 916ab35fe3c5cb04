"""Token shards on disk → rows of a training batch, each computed from its index alone, so that resuming is O(1)."""

import hashlib
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..system.errors import UserError

IGNORED = -100  # the label that cross entropy leaves out


class Tokens(ABC):
    """A long read-only sequence of token ids; a subclass says its length and copies from it in `_fill`."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the tokens."""

    def sequence(self, start: int, length: int) -> np.ndarray:
        """Return tokens[start : start + length] as int64 [length]; IndexError where that is not all inside."""
        return self.sequences(np.array([start]), length)[0]

    def sequences(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return one sequence a start, as int64 [len(starts), length]."""
        rows = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            self._fill(row, start)
        return rows

    def training_rows(self, context_length: int, seed: int, num_rows: int, sampling: str) -> "Rows":
        """Return the rows to train on, in sequences drawn as `sampling` says."""
        return TrainingRows(self, context_length, seed, num_rows, sampling)

    @abstractmethod
    def _fill(self, row: np.ndarray, start: int) -> None:
        """Copy the tokens from `start` on into `row`."""

    def _check_inside(self, start: int, length: int) -> None:
        if start < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} are not all among the {len(self)} there are")


class TokenArray(Tokens):
    """Token ids in memory."""

    def __init__(self, ids: np.ndarray):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def _fill(self, row: np.ndarray, start: int) -> None:
        self._check_inside(start, len(row))
        row[:] = self.ids[start : start + len(row)]


class TokenParts(Tokens):
    """Parts that follow each other as one sequence of tokens; a subclass copies from one part in `_copy`."""

    def __init__(self, lengths: np.ndarray):
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _fill(self, row: np.ndarray, start: int) -> None:
        self._check_inside(start, len(row))
        part, filled = int(np.searchsorted(self._ends, start, side="right")), 0
        while filled < len(row):
            begin = start + filled - (int(self._ends[part - 1]) if part else 0)
            length = min(len(row) - filled, int(self._ends[part]) - start - filled)
            self._copy(part, begin, row[filled : filled + length])
            filled, part = filled + length, part + 1

    @abstractmethod
    def _copy(self, part: int, begin: int, row: np.ndarray) -> None:
        """Copy a part's tokens from `begin` on into `row`, which goes no further than the part."""


class TokenSpans(TokenParts):
    """Some stretches of other tokens, starts[i] to ends[i] in order, as one sequence of its own."""

    def __init__(self, tokens: Tokens, starts: np.ndarray, ends: np.ndarray):
        super().__init__(ends - starts)
        self.tokens, self.starts = tokens, starts

    def _copy(self, part: int, begin: int, row: np.ndarray) -> None:
        self.tokens._fill(row, int(self.starts[part]) + begin)


class TokenShards(TokenParts):
    """One long read-only sequence of token ids over several files, memory-mapped when first read.

    `dtype` is the little-endian type on disk ("<u2" or "<u4"). Pickles by path: data loader workers map for themselves.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], dtype: str = "<u2"):
        self.paths, self.dtype = [os.fspath(path) for path in paths], np.dtype(dtype)
        self._sizes = [os.path.getsize(path) // self.dtype.itemsize for path in self.paths]
        super().__init__(np.array(self._sizes, dtype=np.int64))

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_shards"}

    @cached_property
    def _shards(self) -> list[tuple[np.ndarray, mmap.mmap]]:
        """Each file as a plain array (slicing an np.memmap costs some microseconds more), and what maps it."""
        return [self._mapped(shard) for shard in range(len(self.paths))]

    def _mapped(self, shard: int) -> tuple[np.ndarray, mmap.mmap]:
        with open(self.paths[shard], "rb") as file:
            self._check_size(shard, os.fstat(file.fileno()).st_size)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, self.dtype, self._sizes[shard]), mapping

    def _check_size(self, shard: int, now: int) -> None:
        """Refuse a file that was cut: the system kills, without a word, who reads what is no longer there."""
        expected = self._sizes[shard] * self.dtype.itemsize
        if now < expected:
            why = f"was {expected:,} bytes long and is {now:,} now"
            raise UserError(f"{self.paths[shard]}: {why}; restore the prepared tokens, and resume the run")

    def _copy(self, part: int, begin: int, row: np.ndarray) -> None:
        tokens, mapping = self._shards[part]
        self._check_size(part, mapping.size())
        row[:] = tokens[begin : begin + len(row)]


class ShardWriter:
    """Writes a split's tokens to `<split>-00000.bin` and on, `shard_size` tokens each, one file open at a time.

    finished: of each closed file its name, its tokens and its sha256. tokens: how many the open one has. documents,
    bytes: of the text, which are counted by whoever writes. Given the `state()` of a writer before, it goes on from
    there: later files are removed and the open one is cut. Raises ValueError where the files there hold less than that.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_size: int, saved: dict | None = None):
        saved = saved or {}
        self.directory, self.split, self.dtype, self.shard_size = directory, split, np.dtype(dtype), shard_size
        self.finished, self.tokens = list(saved.get("shards", ())), saved.get("open_tokens", 0)
        self.documents, self.bytes = saved.get("documents", 0), saved.get("bytes", 0)
        self._file = self._hash = None
        held = [*(shard["tokens"] for shard in self.finished), *([self.tokens] if self.tokens else [])]
        for path, tokens in zip(map(self._path, range(len(held))), held, strict=True):
            if not path.exists() or path.stat().st_size < tokens * self.dtype.itemsize:
                raise ValueError(f"{path} does not hold the {tokens:,} tokens that were written to it")
        for stale in sorted(directory.glob(f"{split}-*.bin"))[len(held) :]:
            stale.unlink()
        if self.tokens:
            self._reopen()

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, going on to new files where one is full."""
        while len(tokens):
            if self._file is None:
                self._file, self._hash = self._path(len(self.finished)).open("wb"), hashlib.sha256()
            raw = tokens[: self.shard_size - self.tokens].astype(self.dtype).tobytes()
            self._file.write(raw)
            self._hash.update(raw)
            written = len(raw) // self.dtype.itemsize
            self.tokens, tokens = self.tokens + written, tokens[written:]
            if self.tokens == self.shard_size:
                self.close()

    def state(self) -> dict:
        """Return what a writer needs to go on from here, with the tokens on the disk; it is fit for JSON."""
        self._flush()
        counts = {"documents": self.documents, "bytes": self.bytes}
        return counts | {"shards": self.finished, "open_tokens": self.tokens}

    def close(self) -> None:
        """Finish the file that is open, if one is."""
        if self._file is not None:
            self._flush()
            file, self._file = self._file, None
            file.close()
            name = self._path(len(self.finished)).name
            self.finished.append({"file": name, "tokens": self.tokens, "sha256": self._hash.hexdigest()})
            self.tokens = 0

    def manifest(self) -> dict:
        """Return the split's part of the manifest, once its shards are closed."""
        tokens = sum(shard["tokens"] for shard in self.finished)
        return {"documents": self.documents, "tokens": tokens, "bytes": self.bytes, "shards": self.finished}

    def _path(self, number: int) -> Path:
        return self.directory / f"{self.split}-{number:05d}.bin"

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def _reopen(self) -> None:
        """Cut the open file to its tokens and hash them again."""
        self._file, self._hash = self._path(len(self.finished)).open("r+b"), hashlib.sha256()
        self._file.truncate(self.tokens * self.dtype.itemsize)
        while raw := self._file.read(1 << 20):
            self._hash.update(raw)


class Rows(Dataset, ABC):
    """A map-style data set of `num_rows` next-token rows; a subclass reads them in `_read(indices)`.

    A row is {"input_ids": LongTensor[context_length], "shift_labels": LongTensor[context_length]}, where
    shift_labels[i] is the token after input_ids[i], or -100 where there is none to predict.
    """

    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Return the rows of a batch, read together; IndexError for a row that is not there."""
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= self.num_rows):
            raise IndexError(f"row {indices} is not among the {self.num_rows} there are")
        return self._read(chosen)

    @abstractmethod
    def _read(self, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """Return the rows of int64 indices that are there."""


class TokenRows(Rows):
    """Rows of one long sequence of tokens; a subclass says which in `_inputs_and_labels(indices)`."""

    def __init__(self, tokens: Tokens, context_length: int, num_rows: int):
        self.tokens, self.context_length, self.num_rows = tokens, context_length, num_rows

    def _read(self, indices: np.ndarray) -> list[dict[str, torch.Tensor]]:
        """Return views of two tensors, which are hashed and read together."""
        inputs, labels = self._inputs_and_labels(indices)
        pairs = zip(torch.from_numpy(inputs).unbind(0), torch.from_numpy(labels).unbind(0), strict=True)
        return [{"input_ids": row, "shift_labels": shifted} for row, shifted in pairs]

    @abstractmethod
    def _inputs_and_labels(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return two int64 arrays [len(indices), context_length]."""


def collate_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows into a batch of LongTensors [len(rows), context_length], as the default collator does too."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class TrainingRows(TokenRows):
    """`num_rows` sequences of the text, each a pure function of (seed, row index).

    sampling="random": every start is equally likely, with replacement, as in nanoGPT.
    sampling="shuffled": without replacement; each epoch visits adjacent blocks in a new order and from a new offset.
    Raises UserError when the text is shorter than one sequence, context_length + 1 tokens.
    """

    def __init__(self, tokens: Tokens, context_length: int, seed: int, num_rows: int, sampling: str = "random"):
        if sampling not in SAMPLERS:
            raise UserError(f"sampling={sampling!r}: must be one of {', '.join(SAMPLERS)}")
        _check_context_length(context_length)
        if len(tokens) <= context_length:
            need = f"a row needs {context_length + 1} tokens and the training split has {len(tokens)}"
            raise UserError(f"context_length={context_length}: {need}; lower it (--block_size) or add text")
        super().__init__(tokens, context_length, num_rows)
        self.seed, self.starts = seed, SAMPLERS[sampling]

    def _inputs_and_labels(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = self.starts(indices.astype(np.uint64), self.seed, len(self.tokens), self.context_length)
        sequences = self.tokens.sequences(starts, self.context_length + 1)
        return sequences[:, :-1], sequences[:, 1:]


class EvaluationRows(TokenRows):
    """The whole split once, in sequences `stride` apart: every token but the very first is predicted exactly once.

    Without a stride they are adjacent. With one they overlap, and all but the first count their last `stride` tokens
    alone, each of which has at least context_length - stride of context; a batch without the first row holds only
    those labels. The last row is filled up with the last token as inputs and -100 as labels. Raises UserError below 2
    tokens, and for a stride outside 1 to context_length.
    """

    def __init__(self, tokens: Tokens, context_length: int, stride: int | None = None):
        _check_context_length(context_length)
        self.stride = context_length if stride is None else stride
        if not 1 <= self.stride <= context_length:
            raise UserError(f"stride={stride}: must be between 1 and the sequence length, {context_length}")
        if len(tokens) < 2:
            raise UserError(
                f"validation: the split has {len(tokens)} tokens and at least 2 are needed; "
                "raise validation_fraction or add text"
            )
        beyond_first = max(0, len(tokens) - 1 - context_length)
        super().__init__(tokens, context_length, num_rows=1 - (-beyond_first // self.stride))

    def _inputs_and_labels(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [self._row(int(index)) for index in indices]
        inputs, labels = zip(*rows, strict=True)
        counted = self.stride if indices.min() > 0 else self.context_length
        return np.stack(inputs), np.stack(labels)[:, -counted:]

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start = index * self.stride
        sequence = self.tokens.sequence(start, min(self.context_length + 1, len(self.tokens) - start))
        missing = self.context_length + 1 - len(sequence)
        padded = np.pad(sequence, (0, missing), mode="edge")
        labels = padded[1:].copy()
        labels[self.context_length - missing :] = IGNORED
        if index:
            labels[: self.context_length - self.stride] = IGNORED
        return padded[:-1], labels


def _check_context_length(context_length: int) -> None:
    if context_length < 1:
        raise UserError(f"context_length={context_length}: must be at least 1 token; raise it (--block_size)")


# --- where a training row starts: (row indices, seed, tokens in the text, context length) -> starts ------------------


def random_starts(rows: np.ndarray, seed: int, length: int, context_length: int) -> np.ndarray:
    """Return an independent start a row, out of all length - context_length legal ones."""
    return (_mix(rows, seed) % np.uint64(length - context_length)).astype(np.int64)


def shuffled_starts(rows: np.ndarray, seed: int, length: int, context_length: int) -> np.ndarray:
    """Return starts that cover each epoch's blocks once, in an order that a small cipher permutes without memory.

    The offset differs between epochs by up to a block, so that tokens left over at the ends come in at other times.
    """
    blocks = max(1, (length - context_length) // context_length)
    offsets = min(context_length, length - blocks * context_length)
    epoch, place = rows // np.uint64(blocks), rows % np.uint64(blocks)
    keys = _mix(epoch, seed)
    block = permuted(place, keys, blocks)
    return (block * np.uint64(context_length) + _mix(keys, 1) % np.uint64(offsets)).astype(np.int64)


def permuted(places: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """Return the image of each place (< size) under the permutation of range(size) that its key selects.

    A four-round Feistel network permutes a square power of two, less than 4 * size; what falls outside walks on
    along its cycle until it is inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    images = _feistel(places, keys, half_bits)
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], keys[outside], half_bits)
    return images


def _feistel(places: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = places >> shift, places & mask
    for round_number in range(4):
        left, right = right, left ^ (_mix(keys ^ right, round_number) & mask)
    return left << shift | right


def unit_points(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return a number in [0, 1) for each uint64 number, which depends on it and the seed alone."""
    return (_mix(numbers, seed) >> np.uint64(11)) / 2**53


def _mix(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Hash uint64 numbers under a seed: SplitMix64's finaliser, twice (Steele, Lea and Flood, OOPSLA 2014)."""
    return _splitmix64(numbers ^ _splitmix64(np.full(1, seed % 2**64, dtype=np.uint64)))


def _splitmix64(numbers: np.ndarray) -> np.ndarray:
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)


SAMPLERS = {"random": random_starts, "shuffled": shuffled_starts}
LANES = "lanes"  # the name of rows that follow each other from step to step, see loop/lanes.py
