"""Any text → token shards, a tokenizer and `manifest.json` in one directory, written whole or not at all."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from ..system.errors import UserError
from ..system.files import digest, hash_file, publish, write_whole
from .building import CORPUS, STATE, building_folder, built_aside
from .dataset import TokenShards
from .inputs import text_digest
from .preparation import dtype_of, read_state, saved_tokenizer, write_tokens
from .sources import fingerprint_sources, licence_of, named_sources, read_documents
from .splitting import SPLITS, check_split_options
from .tokenizers import BUILDERS, build_tokenizer, load_tokenizer, tokenizer_hash

FORMAT = "acorn-corpus"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
HASHED_BYTES = 256 << 20  # of shards, which are hashed in the time that a person does not notice
# What preparing decides: with tokens that are prepared it can only be said again.
DECIDED = """
validation_fraction validation_by validation_seed validation_characters shard_size num_proc streaming on_bad_file
tokenizer_vocab_size text_column dataset_config dataset_split
""".split()


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
        return TokenShards([path for path, _ in self.shards(split)], np.dtype(self.manifest["dtype"]).str)

    @cached_property
    def inputs(self) -> dict[str, str | None]:
        """What is fingerprinted of it in a run directory (see inputs.py)."""
        tokens = {f"the {split} tokens": [shard["sha256"] for _, shard in self.shards(split)] for split in SPLITS}
        return {
            "the text": text_digest(self.manifest["sources"]),
            "the validation split": digest(self.manifest["validation"]),
            "the tokenizer": self.manifest["tokenizer"]["hash"],
        } | {what: digest(hashes) for what, hashes in tokens.items()}

    def shards(self, *splits: str) -> list[tuple[Path, dict]]:
        """Return the path of each shard of the splits, and what the manifest says of it."""
        listed = [shard for split in splits for shard in self.manifest["splits"][split]["shards"]]
        return [(self.directory / shard["file"], shard) for shard in listed]


def prepare(data, tokenizer=None, name: str = "corpus", check_shards: bool = False) -> Corpus:
    """Tokenise the text that the data arguments name into `data_dir`, or use what already lies there.

    `data_dir` defaults to corpora/<name>-<first 8 hex digits of the fingerprint>. The fingerprint covers sources,
    tokenizer and split options, so preparing the same thing again does nothing, and a preparation that was killed goes
    on where it was. `check_shards` compares what is there already with its hashes. Raises UserError for arguments that
    cannot be met, for a directory that holds something else, for shards that are damaged and for a full disk.
    """
    if data.data_dir and not named_sources(data):
        return _prepared_with(data)
    check_options(data)
    description = describe(data, tokenizer)
    fingerprint = _digest(description)
    directory = Path(data.data_dir or f"corpora/{name}-{fingerprint[:8]}")
    if _is_prepared(directory, fingerprint):
        shutil.rmtree(building_folder(directory, fingerprint), ignore_errors=True)  # if it was killed at the very end
        corpus = load_corpus(directory)
        whole = f", and its {verify(corpus)} shards are whole" if check_shards else ""
        if os.environ.get("RANK", "0") == "0":  # torchrun's number of this process: one line, not one a process
            print(f"{directory} is prepared already{whole}: nothing to do.")
        return corpus
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "name": name, "fingerprint": fingerprint}
    with built_aside(directory, fingerprint) as folder:
        if not _is_prepared(directory, fingerprint):  # the process that this one waited for may have done it
            _build(folder, directory, data, tokenizer, header | description)
    return load_corpus(directory)


def load_corpus(directory: str | os.PathLike) -> Corpus:
    """Open a prepared directory; raise UserError where shards or tokenizer are not what the manifest says.

    Of shards beyond HASHED_BYTES together the sizes alone are compared.
    """
    directory = Path(directory)
    corpus = Corpus(directory, read_manifest(directory))
    sizes = _expected_sizes(corpus)
    for path, expected in sizes:
        _check_shard(path, expected)
    if sum(size for _, size in sizes) <= HASHED_BYTES:
        verify(corpus)
    if (found := tokenizer_hash(corpus.tokenizer)) != (expected := corpus.manifest["tokenizer"]["hash"]):
        where = f"{directory / 'tokenizer'}: its hash is {found[:8]} and the tokens were made with {expected[:8]}"
        raise UserError(f"{where}; prepare the text again into another --data_dir")
    return corpus


def whereabouts(prepared: object) -> tuple[str, str] | None:
    """Directory and fingerprint of a prepared corpus, for another process; None for what lies nowhere prepared."""
    return (str(prepared.directory), prepared.manifest["fingerprint"]) if isinstance(prepared, Corpus) else None


def corpus_at(whereabouts: tuple[str, str]) -> Corpus | None:
    """The corpus that another process has prepared; None where this machine does not see it."""
    directory, fingerprint = Path(whereabouts[0]), whereabouts[1]
    is_here = (directory / MANIFEST).is_file() and read_manifest(directory).get("fingerprint") == fingerprint
    return load_corpus(directory) if is_here else None


def read_manifest(directory: Path) -> dict:
    """Read the manifest of a prepared directory and refuse what is none."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"data_dir={str(directory)!r}: holds no {MANIFEST}; make it with acorn prepare") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); prepare the text again into another --data_dir") from error
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("format_version")) != (FORMAT, 1):
        raise UserError(f"{path}: is not of format {FORMAT} {FORMAT_VERSION}; prepare the text again")
    return manifest


def _expected_sizes(corpus: Corpus) -> list[tuple[Path, int]]:
    """Return each shard's path and size in bytes; raise UserError for a manifest that contradicts itself."""
    path, manifest = corpus.directory / MANIFEST, corpus.manifest
    try:
        itemsize = np.dtype(manifest["dtype"]).itemsize
        for split in SPLITS:
            listed = sum(shard["tokens"] for _, shard in corpus.shards(split))
            total = manifest["splits"][split]["tokens"]
            if listed != total:
                why = f"its {split} shards hold {listed:,} tokens together, and it says {total:,}"
                raise UserError(f"{path}: {why}; prepare the text again into another --data_dir")
        manifest["tokenizer"]["hash"]
        return [(shard_path, shard["tokens"] * itemsize) for shard_path, shard in corpus.shards(*SPLITS)]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: lacks {error}; prepare the text again into another --data_dir") from error


def _check_shard(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.exists() else "missing"
    if size != expected:
        have = size if size == "missing" else f"{size} bytes long, not {expected}"
        raise UserError(f"{path}: is {have}; prepare the text again into another --data_dir")


def verify(corpus: Corpus) -> int:
    """Compare each shard with its hash in the manifest and return how many there are; UserError names one that differs.

    Loading a large corpus compares sizes only, because this reads every byte.
    """
    shards = corpus.shards(*SPLITS)
    for path, shard in shards:
        if hash_file(path) != shard["sha256"]:
            raise UserError(f"{path}: its bytes are not those that were written; prepare the text again elsewhere")
    return len(shards)


def summary(corpus: Corpus) -> str:
    """Return one line that says what a corpus holds."""
    splits = corpus.manifest["splits"]
    counts = " and ".join(f"{splits[split]['tokens']:,} {split}" for split in SPLITS)
    left_out = corpus.manifest.get("left_out", {})
    note = f" Left out: {'; '.join(f'{name}: {why}' for name, why in left_out.items())[:300]}." if left_out else ""
    return f"{corpus.directory}: {counts} tokens, vocabulary {corpus.manifest['vocab_size']:,}.{note}"


# --- what is to be prepared -------------------------------------------------------------------------------------------


def check_options(data) -> None:
    """Refuse options that cannot be met, before any text is read."""
    check_split_options(data)


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
    return digest([FORMAT_VERSION, description])


def _texts(data) -> Iterator[str]:
    return (document.text for document in read_documents(data))


def _is_prepared(directory: Path, fingerprint: str) -> bool:
    """Say whether the directory holds just this; raise UserError where it holds anything else."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    held = read_manifest(directory).get("fingerprint", "unknown")
    if held != fingerprint:
        what = f"holds another corpus ({held[:8]}, and this one is {fingerprint[:8]})"
        raise UserError(f"data_dir={str(directory)!r}: {what}; name another --data_dir, or remove it yourself")
    return True


def _prepared_with(data) -> Corpus:
    """Open `data_dir`, and refuse tokens that were made with another tokenizer than the one that is named.

    "byte" is what stands there when nobody named one. Names are compared first: a machine without a network, to which
    tokens were carried, cannot load "gpt2".
    """
    corpus = load_corpus(data.data_dir)
    _refuse_decided(data, corpus.manifest)
    held = corpus.manifest["tokenizer"]
    if data.tokenizer in ("byte", held["name"]):
        return corpus
    if data.tokenizer in BUILDERS or tokenizer_hash(load_tokenizer(data.tokenizer)) != held["hash"]:
        what = f"its tokens were made with {held['name']!r}"
        mend = "name that one, or prepare the text again into another --data_dir"
        raise UserError(f"tokenizer={data.tokenizer!r}: data_dir={data.data_dir!r} is not its: {what}; {mend}")
    return corpus


def _refuse_decided(data, manifest: dict) -> None:
    """Refuse what was decided when the tokens were prepared, where it is named and was decided otherwise."""
    held = {f"validation_{key}": value for key, value in (manifest.get("validation") or {}).items()}
    for field in fields(data):
        value = getattr(data, field.name)
        if field.name in DECIDED and value not in (field.default, held.get(field.name, field.default)):
            was = f"prepared with {held[field.name]!r}" if field.name in held else "prepared already"
            mend = "leave it out, or prepare the text again into another --data_dir"
            raise UserError(f"{field.name}={value!r}: the tokens in data_dir={data.data_dir!r} were {was}; {mend}")


# --- building ---------------------------------------------------------------------------------------------------------


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


def _build(folder: Path, directory: Path, data, tokenizer, header: dict) -> None:
    """Prepare the text below `folder`, going on with what is there, and put it in the place of `directory`."""
    begun = time.monotonic()
    state = read_state(folder, header["fingerprint"], data.shard_size)
    if not state.rule:
        tokenizer = tokenizer or build_tokenizer(data.tokenizer, lambda: _texts(data), data.tokenizer_vocab_size)
        tokenizer.save_pretrained(folder / CORPUS / "tokenizer")
    saved = saved_tokenizer(folder)
    manifest = header | {
        "tokenizer": {"name": data.tokenizer, "hash": tokenizer_hash(saved)},
        "vocab_size": len(saved),
        "eos_token_id": saved.eos_token_id,
        "dtype": dtype_of(saved).name,
        "licence": licence_of(data),
    }
    manifest |= write_tokens(folder, state, data, saved, begun)
    _refuse_changed_files(folder, data, header["sources"])
    write_whole(folder / CORPUS / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    if not publish(folder / CORPUS, directory):
        _is_prepared(directory, header["fingerprint"])  # by a process that does not see this one's lock
