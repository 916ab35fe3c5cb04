"""Tokens that datatrove's DocumentTokenizer wrote, `.ds` files with their `.index` and `.metadata`, as a corpus.

A `.ds` file is token ids and nothing else, little-endian and 2 or 4 bytes each; its index holds the end of every
document, in tokens, as 8-byte integers; the first line of its metadata is `tokenizer|bytes a token`, the second one the
number of tokens. Source: huggingface/datatrove, `pipeline/tokens/tokenizer.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..system.errors import UserError
from ..system.files import digest
from .corpus import MANIFEST, SPLITS, Corpus, tokenizer_facts
from .dataset import Tokens, TokenShards, TokenSpans, unit_points
from .encoding import encode_documents
from .splitting import check_split_options
from .tokenizers import build_tokenizer, encoding_hash, tokenizer_hash, tokenizer_kind

DTYPES = {2: "<u2", 4: "<u4"}
CHECKED_DOCUMENTS, CHECKED_TOKENS = 20, 2000  # of the first documents, that many tokens are encoded again
HOW = "tokenise the text again (training/launch/prepare_datatrove.py)"


@dataclass(frozen=True)
class TokenFile:
    """One `.ds` file: where documents end in it, and what made it."""

    path: Path
    ends: np.ndarray
    tokenizer: str
    token_size: int


def holds_datatrove(directory: str | Path | None) -> bool:
    """Say whether a directory holds datatrove's tokens, and not those of `acorn prepare`."""
    folder = Path(directory or "")
    return bool(directory) and not (folder / MANIFEST).exists() and any(folder.glob("*.ds"))


def load_datatrove(data) -> Corpus:
    """Open the tokens in `data_dir`; raise UserError where files are not whole or the tokenizer is another one."""
    check_split_options(data)
    files = read_token_files(Path(data.data_dir))
    tokenizer = build_tokenizer(data.tokenizer, None, data.tokenizer_vocab_size)
    check_tokenizer(data.tokenizer, tokenizer, files[0])
    lengths, dtype = np.concatenate([np.diff(file.ends, prepend=0) for file in files]), DTYPES[files[0].token_size]
    if len(lengths) < 2:
        raise UserError(f"{files[0].path}: one document cannot be split; tokenise two at least")
    validates = choose_validation(data, lengths)
    shards = TokenShards([file.path for file in files], dtype)
    chosen = {"train": ~validates, "validation": validates}
    tokens = {split: TokenSpans(shards, *spans(documents, lengths)) for split, documents in chosen.items()}
    splits = {split: {"documents": int(chosen[split].sum()), "tokens": len(tokens[split])} for split in SPLITS}
    splits["validation"]["bytes"] = count_bytes(tokenizer, tokens["validation"])
    manifest = tokenizer_facts(data.tokenizer, tokenizer) | {"dtype": np.dtype(dtype).name, "licence": None}
    inputs = {
        "the tokens": digest(*(part for file in files for part in (file.ends.tobytes(), both_ends(file.path)))),
        "the validation split": digest(validates.tobytes()),
        "the tokenizer": encoding_hash(tokenizer),
    }
    return Corpus(Path(data.data_dir), manifest | {"splits": splits}, tokenizer, tokens, lambda: inputs)


# --- files ------------------------------------------------------------------------------------------------------------


def read_token_files(directory: Path) -> list[TokenFile]:
    """Read what lies beside the `.ds` files of a directory, and refuse tokens that do not belong together."""
    files = [read_token_file(path) for path in sorted(directory.glob("*.ds"))]
    files = [file for file in files if len(file.ends) and file.ends[-1]]  # a task without documents leaves nothing
    if not files:
        raise UserError(f"data_dir={str(directory)!r}: its .ds files hold no token; {HOW}")
    for file in files:
        if (file.tokenizer, file.token_size) != (files[0].tokenizer, files[0].token_size):
            raise UserError(f"{file.path}: was made with {file.tokenizer!r} and {files[0].path.name} with "
                            f"{files[0].tokenizer!r}: keep one of them in {directory}")  # fmt: skip
    return files


def read_token_file(path: Path) -> TokenFile:
    """Read the index and the metadata of a `.ds` file and refuse what does not agree."""
    index, metadata, loss = (path.with_name(f"{path.name}.{ending}") for ending in ("index", "metadata", "loss"))
    for beside, option in ((index, "save_index"), (metadata, "save_final_metadata")):
        if not beside.is_file():
            raise UserError(f"{path}: there is no {beside.name} beside it; {HOW} with {option}=True, and let it end")
    if loss.is_file():
        raise UserError(f"{loss}: masks of the loss play no part in pretraining; {HOW} with save_loss_metadata=False")
    tokenizer, token_size, count = read_metadata(metadata)
    if index.stat().st_size % 8:
        raise UserError(f"{index}: is cut off ({index.stat().st_size} bytes, no multiple of 8); {HOW}")
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    held, size = int(ends[-1]) if len(ends) else 0, path.stat().st_size
    if size != held * token_size or held != count or (np.diff(ends, prepend=0) < 0).any():
        raise UserError(
            f"{path}: is {size:,} bytes long; its index ends at {held:,} tokens and its metadata count {count:,}, of "
            f"{token_size} bytes each: it is damaged; {HOW}"
        )
    return TokenFile(path, ends, tokenizer, token_size)


def read_metadata(path: Path) -> tuple[str, int, int]:
    """Return (name or path of the tokenizer, bytes a token, tokens); before version 0.3 two bytes went unsaid."""
    try:
        first, count, *_ = path.read_text(encoding="utf-8").splitlines()
        name, _, size = first.rpartition("|") if "|" in first else (first, "|", "2")
        facts = name, int(size), int(count)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: is not datatrove's metadata ({error}); {HOW}") from error
    if facts[1] not in DTYPES:
        raise UserError(f"{path}: tokens of {facts[1]} bytes are not known, only of {' and '.join(map(str, DTYPES))}")
    return facts


def both_ends(path: Path, size: int = 1 << 20) -> bytes:
    """The first and the last so many bytes of a file that is too long to be hashed whole."""
    with path.open("rb") as file:
        begin = file.read(size)
        file.seek(max(0, path.stat().st_size - size))
        return begin + file.read()


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def check_tokenizer(name: str, tokenizer, file: TokenFile) -> None:
    """Refuse a tokenizer that did not make the tokens, by its name or file, and by what is in the first documents.

    Where the tokenizer that made them is called otherwise and is not here, its tokens alone decide.
    """
    made_by = file.tokenizer.removesuffix("/tokenizer.json")
    other = UserError(f"tokenizer={name!r}: {file.path} was made with {made_by!r}; give --tokenizer {made_by}")
    if made_by != name and Path(file.tokenizer).is_file():
        if tokenizer_hash(PreTrainedTokenizerFast(tokenizer_file=file.tokenizer)) != tokenizer_hash(tokenizer):
            raise other
    elif made_by != name and tokenizer_kind(tokenizer) != "other":
        raise other
    tokens = TokenShards([file.path], DTYPES[file.token_size])
    lengths = np.diff(file.ends, prepend=0)[:CHECKED_DOCUMENTS].tolist()
    ends = file.ends[:CHECKED_DOCUMENTS].tolist()
    documents = [tokens.window(end - length, length) for end, length in zip(ends, lengths, strict=True) if length]
    if any(ids.max() >= len(tokenizer) for ids in documents):
        raise other
    if not all(ids[-1] == tokenizer.eos_token_id for ids in documents):
        why = f"its documents do not end with {tokenizer.eos_token} (id {tokenizer.eos_token_id})"
        raise UserError(f"{file.path}: {why}; {HOW} with that eos_token, or name the --tokenizer that has theirs")
    if sum(_encodes_again(tokenizer, ids[:-1]) for ids in documents) < len(documents) / 2:
        raise other


def _encodes_again(tokenizer, ids: np.ndarray) -> bool:
    """Say whether the text of these ids has just these ids; where it is cut off, the last few may differ."""
    begin = ids[:CHECKED_TOKENS]
    sure = len(begin) if len(begin) == len(ids) else len(begin) - 16
    text = tokenizer.backend_tokenizer.decode(begin.tolist(), skip_special_tokens=False)
    return bool(np.array_equal(encode_documents(tokenizer, [text])[0][:sure], begin[:sure]))


# --- splitting --------------------------------------------------------------------------------------------------------


def choose_validation(data, lengths: np.ndarray) -> np.ndarray:
    """Return which documents validate: the last ones (position), or those that a hash of seed and number picks."""
    if data.validation_by == "documents":
        points = unit_points(np.arange(len(lengths), dtype=np.uint64), data.validation_seed)
    else:  # the share of all tokens that comes after a document begins
        points = 1 - (np.cumsum(lengths) - lengths) / lengths.sum()
    validates = points <= data.validation_fraction
    order = np.argsort(points)
    validates[order[0]], validates[order[-1]] = True, False
    return validates


def spans(chosen: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where each run of chosen documents starts and where it ends, in tokens."""
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    places = np.concatenate([[0], np.cumsum(lengths)])[edges]
    return places[::2], places[1::2]


def count_bytes(tokenizer, tokens: Tokens) -> int:
    """Return the UTF-8 bytes of the text that the tokens spell, end-of-text tokens left out."""
    ids = tokens.window(0, len(tokens))
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id) + 1)
    total, decode_batch = 0, tokenizer.backend_tokenizer.decode_batch
    for first in range(0, len(documents), 1000):
        chosen = [document[document != tokenizer.eos_token_id].tolist() for document in documents[first : first + 1000]]
        total += sum(len(text.encode()) for text in decode_batch(chosen, skip_special_tokens=False))
    return total
