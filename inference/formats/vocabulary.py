"""The tokenizer of a nanoGPT checkpoint, which lies in its data folder as meta.pkl: there and back."""

import pickle
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from training.data.tokenizers import END_OF_TEXT, build_entries, characters_of, load_tokenizer, tokenizer_kind
from training.system.errors import UserError, one_line

from .base import Source, named_tokenizer, tokenizer_beside

META = "meta.pkl"
GPT2_SIZE = 50257
GPT2_PROBE = ("Hello world", [15496, 995])  # what GPT-2's tokenizer makes of a text
BYTES = 256


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text, lists and dicts, and nothing that would be looked up or called."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"its pickle holds code ({module}.{name})")

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("its pickle refers to something outside")


def checkpoint_tokenizer(source: Source, vocab_size: int, tokenizer: str | None, meta: str | None):
    """The tokenizer of a checkpoint with so many entries; UserError where there is none.

    What `tokenizer` or `meta` name, or else what lies beside the checkpoint, the meta.pkl of its data set, the bytes
    (of 256 or 257 entries), GPT-2's.
    """
    if tokenizer:
        return named_tokenizer(tokenizer)
    if meta is None and (found := tokenizer_beside(source)) is not None:
        return found
    path = Path(meta) if meta else next((path for path in meta_paths(source) if path.is_file()), None)
    return read_meta(path) if path else _by_size(source, vocab_size)


def meta_paths(source: Source) -> Iterator[Path]:
    """Where the meta.pkl of a checkpoint may lie: beside it, or in data/<its data set> of the checkout around it."""
    yield source.directory / META
    config = source.checkpoint.get("config")
    dataset = config.get("dataset") if isinstance(config, dict) else None
    if isinstance(dataset, str) and dataset:
        directory = source.directory.absolute()
        for folder in (directory, *directory.parents, Path.cwd()):
            yield folder / "data" / dataset / META  # as nanoGPT, an absolute `dataset` stands for itself


def _by_size(source: Source, vocab_size: int) -> PreTrainedTokenizerFast:
    """Bytes or GPT-2's entries, where the vocabulary's size says so."""
    if vocab_size in (BYTES, BYTES + 1):
        return build_entries(None, has_end=vocab_size > BYTES)
    if vocab_size >= GPT2_SIZE:
        try:
            return load_tokenizer("gpt2")
        except UserError as error:
            why = "has GPT-2's vocabulary, and the tokenizer is out of reach"
            raise UserError(f"{source.name}: {why}; name its directory with --tokenizer") from error
    mend = "name it with --meta FILE, or a tokenizer with --tokenizer"
    raise UserError(f"{source.name}: a vocabulary of {vocab_size} needs its {META}, and it was not found; {mend}")


def read_meta(path: Path) -> PreTrainedTokenizerFast:
    """nanoGPT's meta.pkl as a character tokenizer with the same ids and no entry more; no code in it is run."""
    try:
        with path.open("rb") as file:
            meta = PlainUnpickler(file).load()
        entries = [meta["itos"][index] for index in range(len(meta["itos"]))]
    except OSError as error:
        raise UserError(f"--meta {path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: {one_line(error)}, and is refused; make it again with plain dicts") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        what = "is not a meta.pkl of nanoGPT, with 'itos' from 0 on"
        raise UserError(f"{path}: {what} ({one_line(error)}); name a --tokenizer instead") from error
    has_end = bool(entries) and entries[-1] == END_OF_TEXT
    characters = entries[:-1] if has_end else entries
    for index, character in enumerate(characters):
        if not isinstance(character, str) or len(character) != 1:
            raise UserError(f"{path}: entry {index} is {character!r}, not one character; name a --tokenizer instead")
    if not characters or len(set(characters)) < len(characters):
        raise UserError(f"{path}: its entries must be different characters, and at least one")
    return build_entries(characters, has_end)


def write_meta(tokenizer, path: Path) -> bool:
    """Write a meta.pkl that nanoGPT reads the tokenizer from; False where nanoGPT needs none or could read none.

    Bytes become the characters of their numbers, so that ASCII text, and only that, reads as it should.
    """
    kind = tokenizer_kind(tokenizer)
    if kind == "other":
        return False
    entries = characters_of(tokenizer) if kind == "char" else [chr(byte) for byte in range(BYTES)]
    entries += [END_OF_TEXT] * (len(tokenizer) - len(entries))
    stoi = {entry: index for index, entry in enumerate(entries)}
    meta = {"vocab_size": len(entries), "itos": dict(enumerate(entries)), "stoi": stoi}
    path.write_bytes(pickle.dumps(meta))
    return True


def is_gpt2s(tokenizer) -> bool:
    """Whether this is GPT-2's tokenizer, which nanoGPT takes where there is no meta.pkl."""
    text, ids = GPT2_PROBE
    return len(tokenizer) == GPT2_SIZE and tokenizer(text)["input_ids"] == ids
