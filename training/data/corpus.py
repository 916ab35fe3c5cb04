"""What is trained on: tokens of two splits, their tokenizer and a manifest, prepared in a directory or streamed."""

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
from .dataset import Tokens, TokenShards
from .sources import fingerprint_sources
from .tokenizers import BUILDERS, load_tokenizer, tokenizer_hash

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
        return f"{self.directory}: {counts} tokens, {vocabulary}.{f' Left out: {skipped[:300]}.' if skipped else ''}"


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
