"""What is trained on: tokens of two splits, their tokenizer and a manifest; prepared, datatrove's, or streamed."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..system.errors import UserError
from ..system.files import digest, hash_file, read_json, write_json
from .dataset import Tokens, TokenShards, TokenSpans, unit_points
from .encoding import encode_documents
from .sources import check_split_options, fingerprint_sources
from .tokenizers import BUILDERS, build_tokenizer, encoding_hash, load_tokenizer, tokenizer_hash, tokenizer_kind

SPLITS = ("train", "validation")
FORMAT, FORMAT_VERSION = "acorn-corpus", 1
MANIFEST = "manifest.json"
HASHED_BYTES = 256 << 20  # of shards, which are hashed in the time that a person does not notice
ELSEWHERE = "prepare the text again into another --data_dir"
INPUTS = "inputs.json"
Inputs = dict[str, str | None]  # what, in words: its fingerprint; None where it cannot be taken


@dataclass(frozen=True)
class Corpus:
    """The tokens to train and to validate on, with their tokenizer and the manifest that describes them.

    It is made by `prepare` or `load_corpus` from a prepared directory, by `load_datatrove`, and by `stream_corpus`:
    then it has no directory, its training tokens have no end, and its manifest says nothing of them. find_inputs takes
    the fingerprints that a run directory keeps, which may mean to read all of the text.
    """

    directory: Path | None
    manifest: dict
    tokenizer: PreTrainedTokenizerFast = field(compare=False)
    splits: dict[str, Tokens] = field(compare=False)
    find_inputs: Callable[[], Inputs] = field(compare=False)

    def tokens(self, split: str) -> Tokens:
        """Return the tokens of "train" or "validation"."""
        return self.splits[split]

    @cached_property
    def inputs(self) -> Inputs:
        """What a run is grown from, by fingerprints."""
        return self.find_inputs()

    def summary(self) -> str:
        """Return one line that says what it holds."""
        splits, vocabulary = self.manifest["splits"], f"vocabulary {self.manifest['vocab_size']:,}"
        if self.directory is None:
            held = splits["validation"]
            validates = f"the first {held['tokens']:,} tokens ({held['documents']:,} documents) validate"
            source = f"streaming {self.manifest['source']}"
            return f"{source}: {validates}, the rest trains in order; {vocabulary}, nothing is prepared."
        counts = " and ".join(f"{splits[split]['tokens']:,} {split}" for split in SPLITS)
        skipped = "; ".join(f"{name}: {why}" for name, why in self.manifest.get("left_out", {}).items())
        return f"{self.directory}: {counts} tokens, {vocabulary}.{f' Skipped: {skipped[:300]}.' if skipped else ''}"


def tokenizer_facts(name: str, tokenizer) -> dict:
    """Return what a manifest says of a tokenizer."""
    facts = {"tokenizer": {"name": name, "hash": tokenizer_hash(tokenizer)}}
    return facts | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}


# --- prepared directories ---------------------------------------------------------------------------------------------


def load_corpus(directory: str | os.PathLike) -> Corpus:
    """Open a prepared directory; raise UserError where shards or tokenizer are not what the manifest says.

    Of shards beyond HASHED_BYTES together the sizes alone are compared.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    dtype = _check_sizes(directory, manifest)
    if sum(path.stat().st_size for path, _ in _shards(directory, manifest, *SPLITS)) <= HASHED_BYTES:
        check_shards(directory, manifest)
    tokenizer = load_tokenizer(str(directory / "tokenizer"))
    if (found := tokenizer_hash(tokenizer)) != (expected := manifest["tokenizer"]["hash"]):
        why = f"its hash is {found[:8]} and the tokens were made with {expected[:8]}"
        raise UserError(f"{directory / 'tokenizer'}: {why}; {ELSEWHERE}")
    shards = {split: _shards(directory, manifest, split) for split in SPLITS}
    return Corpus(
        directory,
        manifest,
        tokenizer,
        {split: TokenShards([path for path, _ in listed], dtype.str) for split, listed in shards.items()},
        lambda: (
            {
                "the text": text_digest(manifest["sources"]),
                "the validation split": digest(manifest["validation"]),
                "the tokenizer": manifest["tokenizer"]["hash"],
            }
            | {f"the {split} tokens": digest([facts["sha256"] for _, facts in shards[split]]) for split in SPLITS}
        ),
    )


def read_manifest(directory: Path) -> dict:
    """Read the manifest of a prepared directory and refuse what is none."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"data_dir={str(directory)!r}: holds no {MANIFEST}; make it with acorn prepare") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {ELSEWHERE}") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("format_version")) != (FORMAT, 1):
        raise UserError(f"{path}: is not of format {FORMAT} {FORMAT_VERSION}; prepare the text again")
    return manifest


def find_manifest(directory: str | None) -> dict:
    """The manifest of prepared tokens, empty where none lie there."""
    return read_manifest(Path(directory)) if directory and Path(directory, MANIFEST).is_file() else {}


def _shards(directory: Path, manifest: dict, *splits: str) -> list[tuple[Path, dict]]:
    """Return the path of each shard of the splits, and what the manifest says of it."""
    listed = [shard for split in splits for shard in manifest["splits"][split]["shards"]]
    return [(directory / shard["file"], shard) for shard in listed]


def _check_sizes(directory: Path, manifest: dict) -> np.dtype:
    """Refuse a manifest that contradicts itself and shards of another size; return the type of the tokens."""
    path = directory / MANIFEST
    try:
        manifest["tokenizer"]["hash"]
        dtype = np.dtype(manifest["dtype"])
        for split in SPLITS:
            listed = sum(shard["tokens"] for _, shard in _shards(directory, manifest, split))
            if listed != (total := manifest["splits"][split]["tokens"]):
                why = f"its {split} shards hold {listed:,} tokens together, and it says {total:,}"
                raise UserError(f"{path}: {why}; {ELSEWHERE}")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: lacks {error}; {ELSEWHERE}") from error
    for path, shard in _shards(directory, manifest, *SPLITS):
        expected = shard["tokens"] * dtype.itemsize
        if not path.exists():
            raise UserError(f"{path}: is missing; {ELSEWHERE}")
        if (size := path.stat().st_size) != expected:
            raise UserError(f"{path}: is {size} bytes long, not {expected}; {ELSEWHERE}")
    return dtype


def check_shards(directory: Path, manifest: dict) -> int:
    """Compare each shard with its hash in the manifest and return how many there are; UserError names one that differs.

    Loading a large corpus compares sizes only, because this reads every byte.
    """
    shards = _shards(directory, manifest, *SPLITS)
    for path, shard in shards:
        if hash_file(path) != shard["sha256"]:
            raise UserError(f"{path}: its bytes are not those that were written; prepare the text again elsewhere")
    return len(shards)


def whereabouts(prepared: object) -> tuple[str, str] | None:
    """Directory and fingerprint of a prepared corpus, for another process; None for what lies nowhere prepared."""
    fingerprint = prepared.manifest.get("fingerprint") if isinstance(prepared, Corpus) else None
    return (str(prepared.directory), fingerprint) if fingerprint else None


def corpus_at(whereabouts: tuple[str, str]) -> Corpus | None:
    """The corpus that another process has prepared; None where this machine does not see it."""
    directory, fingerprint = Path(whereabouts[0]), whereabouts[1]
    is_here = (directory / MANIFEST).is_file() and read_manifest(directory).get("fingerprint") == fingerprint
    return load_corpus(directory) if is_here else None


# --- datatrove's tokens -----------------------------------------------------------------------------------------------
#
# A `.ds` file of its DocumentTokenizer is token ids and nothing else, little-endian and 2 or 4 bytes each; its index
# holds the end of every document, in tokens, as 8-byte integers; its metadata begin with `tokenizer|bytes a token` and
# the number of tokens, a line each. (huggingface/datatrove, `pipeline/tokens/tokenizer.py`)

DTYPES = {2: "<u2", 4: "<u4"}
CHECKED_DOCUMENTS, CHECKED_TOKENS = 20, 2000  # of the first documents, that many tokens are encoded again
AGAIN = "tokenise the text again (training/launch/prepare_datatrove.py)"


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


def read_token_files(directory: Path) -> list[TokenFile]:
    """Read what lies beside the `.ds` files of a directory, and refuse tokens that do not belong together."""
    files = [read_token_file(path) for path in sorted(directory.glob("*.ds"))]
    files = [file for file in files if len(file.ends) and file.ends[-1]]  # a task without documents leaves nothing
    if not files:
        raise UserError(f"data_dir={str(directory)!r}: its .ds files hold no token; {AGAIN}")
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
            raise UserError(f"{path}: there is no {beside.name} beside it; {AGAIN} with {option}=True, and let it end")
    if loss.is_file():
        raise UserError(f"{loss}: masks of the loss play no part in pretraining; {AGAIN} with save_loss_metadata=False")
    tokenizer, token_size, count = read_metadata(metadata)
    if index.stat().st_size % 8:
        raise UserError(f"{index}: is cut off ({index.stat().st_size} bytes, no multiple of 8); {AGAIN}")
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    held, size = int(ends[-1]) if len(ends) else 0, path.stat().st_size
    if size != held * token_size or held != count or (np.diff(ends, prepend=0) < 0).any():
        raise UserError(
            f"{path}: is {size:,} bytes long; its index ends at {held:,} tokens and its metadata count {count:,}, of "
            f"{token_size} bytes each: it is damaged; {AGAIN}"
        )
    return TokenFile(path, ends, tokenizer, token_size)


def read_metadata(path: Path) -> tuple[str, int, int]:
    """Return (name or path of the tokenizer, bytes a token, tokens); before version 0.3 two bytes went unsaid."""
    try:
        first, count, *_ = path.read_text(encoding="utf-8").splitlines()
        name, _, size = first.rpartition("|") if "|" in first else (first, "|", "2")
        facts = name, int(size), int(count)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: is not datatrove's metadata ({error}); {AGAIN}") from error
    if facts[1] not in DTYPES:
        raise UserError(f"{path}: tokens of {facts[1]} bytes are not known, only of {' and '.join(map(str, DTYPES))}")
    return facts


def both_ends(path: Path, size: int = 1 << 20) -> bytes:
    """The first and the last so many bytes of a file that is too long to be hashed whole."""
    with path.open("rb") as file:
        begin = file.read(size)
        file.seek(max(0, path.stat().st_size - size))
        return begin + file.read()


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
    documents = [tokens.sequence(end - length, length) for end, length in zip(ends, lengths, strict=True) if length]
    if any(ids.max() >= len(tokenizer) for ids in documents):
        raise other
    if not all(ids[-1] == tokenizer.eos_token_id for ids in documents):
        why = f"its documents do not end with {tokenizer.eos_token} (id {tokenizer.eos_token_id})"
        raise UserError(f"{file.path}: {why}; {AGAIN} with that eos_token, or name the --tokenizer that has theirs")
    if sum(_encodes_again(tokenizer, ids[:-1]) for ids in documents) < len(documents) / 2:
        raise other


def _encodes_again(tokenizer, ids: np.ndarray) -> bool:
    """Say whether the text of these ids has just these ids; where it is cut off, the last few may differ."""
    begin = ids[:CHECKED_TOKENS]
    sure = len(begin) if len(begin) == len(ids) else len(begin) - 16
    text = tokenizer.backend_tokenizer.decode(begin.tolist(), skip_special_tokens=False)
    return bool(np.array_equal(encode_documents(tokenizer, [text])[0][:sure], begin[:sure]))


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
    ids = tokens.sequence(0, len(tokens))
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id) + 1)
    total, decode_batch = 0, tokenizer.backend_tokenizer.decode_batch
    for first in range(0, len(documents), 1000):
        chosen = [document[document != tokenizer.eos_token_id].tolist() for document in documents[first : first + 1000]]
        total += sum(len(text.encode()) for text in decode_batch(chosen, skip_special_tokens=False))
    return total


# --- the inputs of a run: recorded as it begins, and the same again whenever it goes on -------------------------------


def text_digest(sources: dict) -> str | None:
    """The fingerprint of sources by what they hold, wherever their files lie; None where the Hub gave no revision."""

    def contents(part):
        if isinstance(part, dict):
            return {key: contents(value) for key, value in part.items() if key not in ("path", "python")}
        return [contents(entry) for entry in part] if isinstance(part, list) else part

    text = json.dumps(contents(sources), sort_keys=True)
    return None if '"revision": null' in text else digest(text.encode())


def split_rule(data) -> dict:
    """The rule that says which text validates, as a manifest holds it."""
    return {"by": data.validation_by, "fraction": data.validation_fraction, "seed": data.validation_seed}


def inputs_named_by(data) -> Inputs:
    """What can be known of the inputs before the text is prepared (again)."""
    inputs = {
        "the text": text_digest(fingerprint_sources(data)),
        "the validation split": digest(split_rule(data)),
    }
    if data.tokenizer not in BUILDERS:
        inputs["the tokenizer"] = tokenizer_hash(load_tokenizer(data.tokenizer))
    return inputs


def record_inputs(run_dir: Path, inputs: Inputs) -> None:
    """Write what the run is grown from, whole."""
    write_json(run_dir / INPUTS, inputs)


def refuse_other_inputs(run_dir: Path, inputs: Inputs) -> None:
    """Refuse to go on with anything else than the run began with; runs of an Acorn that recorded nothing are taken."""
    recorded = read_json(run_dir / INPUTS, "copy it from a backup")
    changed = [what for what, now in inputs.items() if now and recorded.get(what) and now != recorded[what]]
    if changed:
        raise UserError(
            f"{run_dir}: {', '.join(changed)} changed since the run began: restore what it was, or start a new "
            "run with another --output_dir"
        )
