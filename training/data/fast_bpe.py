"""Byte-level BPE as GPT-2's, by tiktoken: several times faster, and used only where its ids are provably the same.

Two things could differ, and both are checked before a token is trusted. How text is split: the pattern depends on a
character only by its being a letter, a number, whitespace or none of them, so each 256 code points that a text uses are
asked for in both libraries. How a piece is merged: tiktoken joins neighbours that together spell a token, `tokenizers`
only those that a merge names. Where merges are numbered in order and every token, encoded alone, is itself, both are
the same: a span between two boundaries that survive is merged as if it were alone, so when its turn comes it is the two
parts that the merge names, or it never becomes that token.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# GPT-2's rule, written so that it never goes back: after a possessive run nothing follows that could fail.
SPLITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PLAIN_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "byte_fallback": False,
    "ignore_merges": False,
}
WORTH_IT = 500_000  # characters: fewer are encoded sooner than the fast encoder is built
BLOCK_BITS = 8  # code points whose kind is checked together
SURROGATES = range(0xD800, 0xE000)


class FastBPE:
    """A tiktoken encoding and the blocks of code points in which it is known to split as `tokenizers` does."""

    def __init__(self, ranks: dict[bytes, int]):
        self.encoding, self.blocks = _encoding(ranks), np.zeros((0x110000 >> BLOCK_BITS) + 1, dtype=np.int8)

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
        """Say whether every character of the text is of one kind in both libraries."""
        if text.isascii():
            used = [0]
        else:
            try:
                points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            except UnicodeEncodeError:  # half a surrogate pair: `tokenizers` says what is wrong
                return False
            used = np.flatnonzero(np.bincount(points >> BLOCK_BITS))
        return all(self._block_agrees(int(block)) for block in used)

    def _block_agrees(self, block: int) -> bool:
        """Ask both libraries once for the kinds of a block; 1 stands for yes and -1 for no."""
        if not self.blocks[block]:
            self.blocks[block] = 1 if kinds_agree(range(block << BLOCK_BITS, (block + 1) << BLOCK_BITS)) else -1
        return self.blocks[block] > 0


@dataclass
class Known:
    """What is known of a tokenizer of so many tokens: the characters it has met, and then its fast encoder or None."""

    size: int
    characters: int = 0
    is_built: bool = False
    fast: FastBPE | None = None


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerFast, Known] = WeakKeyDictionary()


def fast_bpe(tokenizer, alphabet: dict[str, int], characters: int = WORTH_IT) -> FastBPE | None:
    """Return the fast encoder of a tokenizer, or None where tiktoken is not installed or could give other ids.

    alphabet: the characters of byte-level vocabularies, and the bytes that they stand for. characters: how many are to
    be encoded now; to build the encoder takes about a second, so it is None until there have been enough.
    """
    known = _KNOWN.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _KNOWN[tokenizer] = Known(len(tokenizer))
    known.characters += characters
    if not known.is_built and known.characters >= WORTH_IT:
        ranks = ranks_of(json.loads(tokenizer.backend_tokenizer.to_str()), alphabet) if _is_installed() else None
        known.fast, known.is_built = None if ranks is None else FastBPE(ranks), True
    return known.fast


def ranks_of(state: dict, alphabet: dict[str, int]) -> dict[bytes, int] | None:
    """Return tiktoken's table, bytes of a token to its id, of a tokenizer's JSON; None where its ids could differ."""
    model, splitter = state["model"], state["pre_tokenizer"] or {}
    is_plain = all(model.get(key) == value for key, value in PLAIN_MODEL.items())
    is_plain &= not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    splits_alike = (splitter.get("type"), splitter.get("add_prefix_space"), splitter.get("use_regex", True))
    is_plain &= state["normalizer"] is None and splits_alike == ("ByteLevel", False, True)
    is_plain &= all(token["special"] for token in state["added_tokens"])
    if not is_plain or not alphabet.keys() <= model["vocab"].keys():
        return None
    tokens = dict.fromkeys(alphabet)  # in the order of their merges
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left not in tokens or right not in tokens or left + right in tokens:
            return None  # parts are merged before the whole, and a token has one merge
        tokens[left + right] = None
    tokens = list(tokens)
    ids = [model["vocab"][token] for token in tokens]
    if sorted(ids[len(alphabet) :]) != ids[len(alphabet) :] or not _spell_themselves(state, tokens, ids):
        return None
    return {bytes(alphabet[character] for character in token): id for token, id in zip(tokens, ids, strict=True)}


def _spell_themselves(state: dict, tokens: list[str], ids: list[int]) -> bool:
    """Say whether each token, merged alone, becomes itself."""
    bare = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    merger = Tokenizer.from_str(json.dumps(state | bare | {"truncation": None, "padding": None}))
    encoded = merger.encode_batch_fast(tokens, add_special_tokens=False)
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

    return tiktoken.Encoding("acorn", pat_str=SPLITS, mergeable_ranks=ranks, special_tokens={})


def _is_installed() -> bool:
    try:
        import tiktoken  # noqa: F401
    except ImportError:
        return False
    return True


def _threads() -> int:
    """As many as `tokenizers` would use: its own two variables count for both."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "off", "no", "f", "n", "0"):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return int(os.environ.get("RAYON_NUM_THREADS", 0)) or cores or 1
