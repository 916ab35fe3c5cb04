"""Byte, character and BPE tokenizers, built with `tokenizers` and saved as Hugging Face tokenizers."""

import json
import re
import sys
from collections.abc import Callable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..system.errors import UserError
from ..system.files import digest

END_OF_TEXT = "<|endoftext|>"
DEFAULT_BPE_VOCAB_SIZE = 4096
Texts = Callable[[], Iterator[str]]


def build_tokenizer(name: str, texts: Texts | None = None, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Build the tokenizer called `name`: "byte", "char", "bpe", or any Hugging Face id or path.

    `texts` returns a fresh iterator over the training texts ("char" and "bpe" read it once); `vocab_size` counts
    `<|endoftext|>` and is for "bpe" alone. Raises UserError when the tokenizer cannot be built or loaded.
    """
    if vocab_size is not None and name != "bpe":
        why = f"only tokenizer=bpe takes it, not {name!r}"
        raise UserError(f"tokenizer_vocab_size={vocab_size}: {why}; leave it out, or give --tokenizer_vocab_size none")
    if name not in BUILDERS:
        return load_tokenizer(name)
    if texts is None and name != "byte":
        raise UserError(f"tokenizer={name!r}: it is made from a text and there is none; name a source of text")
    return BUILDERS[name](texts, vocab_size)


def load_tokenizer(name: str, needs_end_of_text: bool = True) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a directory or the Hub; only text that is prepared needs an end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more for one cause: not there
        why = str(error).strip().split("\n")[0] or type(error).__name__
        mend = "name byte, char, bpe or a directory that holds a tokenizer"
        raise UserError(f"tokenizer={name!r}: cannot be loaded ({why}); {mend}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(f"tokenizer={name!r}: is not a fast tokenizer (no tokenizer.json); choose one that is")
    if needs_end_of_text and tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer={name!r}: has no eos_token to end documents with; set one and save it again")
    return tokenizer


def begin_ids(tokenizer) -> list[int]:
    """The special tokens that the tokenizer by itself puts before every text."""
    mask, ids = _added_around(tokenizer)
    return ids[: mask.index(0)] if 0 in mask else []


def add_nothing(tokenizer):
    """Let the tokenizer put nothing around a text, as pretraining puts nothing there; saved, it stays so."""
    if 1 in _added_around(tokenizer)[0]:
        tokenizer.backend_tokenizer.post_processor = None
    return tokenizer


def _added_around(tokenizer) -> tuple[list[int], list[int]]:
    """(1 for each special token that the tokenizer adds and 0 for others, ids) of an arbitrary short text."""
    special = set(tokenizer.all_special_tokens)
    text = next((entry for entry in characters_of(tokenizer) if entry not in special), "")
    if tokenizer.backend_tokenizer.post_processor is None or not text:
        return [], []
    encoded = tokenizer.backend_tokenizer.encode(text)
    return encoded.special_tokens_mask, encoded.ids


# --- building ---------------------------------------------------------------------------------------------------------


def _byte_vocabulary() -> dict[str, int]:
    """Map each character of the byte-level alphabet to the byte that it stands for.

    Printable bytes stand for themselves; the others are moved, in order, to code points from 256 on.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    themselves = {character: ord(character) for character in alphabet if ord(character) < 256}
    moved_bytes = sorted(set(range(256)) - set(themselves.values()))
    moved = dict(zip(alphabet[len(themselves) :], moved_bytes, strict=True))
    return themselves | moved


BYTE_VOCABULARY = _byte_vocabulary()


def _byte_backend(has_end: bool = True) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab=BYTE_VOCABULARY, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT] if has_end else [])
    return backend


def _char_backend(characters: list[str], has_end: bool = True) -> Tokenizer:
    backend = Tokenizer(models.WordLevel({character: index for index, character in enumerate(characters)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT] if has_end else [])
    return backend


def build_byte(texts: Texts | None = None, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Build the tokenizer whose ids are the UTF-8 byte values 0..255, with `<|endoftext|>` = 256."""
    return _wrap(_byte_backend())


def build_char(texts: Texts, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Build the tokenizer that numbers the text's distinct characters in sorted order, `<|endoftext|>` last."""
    characters = set()
    for text in texts():
        characters.update(text)
    if not characters:
        raise UserError("tokenizer='char': the text is empty, so there are no characters; name a text that has some")
    return _wrap(_char_backend(sorted(characters)))


def build_bpe(texts: Texts, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (GPT-2's splitting rule) to exactly `vocab_size` tokens, `<|endoftext|>` last.

    Without a size it has 4,096, or as many as the text has pairs for that it holds twice.
    """
    is_exact = vocab_size is not None
    size = vocab_size if is_exact else DEFAULT_BPE_VOCAB_SIZE
    least = len(BYTE_VOCABULARY) + 1
    if size < least:
        raise UserError(f"tokenizer_vocab_size={size}: must be at least {least} (256 bytes and {END_OF_TEXT})")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        min_frequency=0 if is_exact else 2,
        initial_alphabet=sorted(BYTE_VOCABULARY),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts(), trainer)
    backend.add_special_tokens([END_OF_TEXT])
    if (reached := backend.get_vocab_size()) != size and is_exact:
        raise UserError(f"tokenizer_vocab_size={size}: the text yields only {reached} tokens; lower the size")
    return _wrap(backend)


def build_entries(characters: list[str] | None, has_end: bool) -> PreTrainedTokenizerFast:
    """Build the character tokenizer of just these entries in this order, or of the 256 bytes (None).

    For models made elsewhere, whose vocabulary may have no end-of-text token.
    """
    backend = _byte_backend(has_end) if characters is None else _char_backend(characters, has_end)
    return _wrap(backend, has_end)


def _wrap(backend: Tokenizer, has_end: bool = True) -> PreTrainedTokenizerFast:
    """Give the backend its Hugging Face face: one special token for begin, end and padding, and no unknown token."""
    names = ("bos_token", "eos_token", "pad_token") if has_end else ()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **dict.fromkeys(names, END_OF_TEXT)
    )


BUILDERS = {"byte": build_byte, "char": build_char, "bpe": build_bpe}


# --- what a tokenizer does --------------------------------------------------------------------------------------------


def tokenizer_hash(tokenizer) -> str:
    """Return the sha256 (hex) of what the tokenizer does, whatever order its file happens to be written in."""
    return digest(backend_state(tokenizer.backend_tokenizer))


def encoding_hash(tokenizer) -> str:
    """The same of what `encode_documents` depends on alone, which `add_nothing` does not change."""
    return digest(_encoding_state(tokenizer.backend_tokenizer))


def backend_state(backend: Tokenizer) -> dict:
    """Return the backend's JSON, less truncation and padding, which belong to a call and not to the tokenizer."""
    return json.loads(backend.to_str()) | {"truncation": None, "padding": None}


def _encoding_state(backend: Tokenizer) -> dict:
    return backend_state(backend) | {"post_processor": None}  # it only adds special tokens


def characters_of(tokenizer) -> list[str]:
    """Return the entries of the model's own vocabulary in the order of their ids."""
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return sorted(vocabulary, key=vocabulary.get)


def tokenizer_kind(tokenizer) -> str:
    """Return "byte" or "char" when the tokenizer encodes as a freshly built one of that kind does, else "other"."""
    backend, size, rebuilt = tokenizer.backend_tokenizer, len(tokenizer), None
    model = type(backend.model).__name__
    if model == "BPE" and size - len(BYTE_VOCABULARY) in (0, 1):
        kind, rebuilt = "byte", _byte_backend(size > len(BYTE_VOCABULARY))
    elif model == "WordLevel":
        kind, rebuilt = "char", _char_backend(characters_of(tokenizer), size > len(characters_of(tokenizer)))
    return kind if rebuilt is not None and _encoding_state(rebuilt) == _encoding_state(backend) else "other"


def splits_as_gpt2(state: dict) -> bool:
    """Say whether a backend's JSON takes ordinary text apart by GPT-2's rule and nothing else."""
    splitter = state["pre_tokenizer"] or {}
    rule = (splitter.get("type"), splitter.get("add_prefix_space"), splitter.get("use_regex", True))
    has_only_special = all(token["special"] for token in state["added_tokens"])  # others may hold white space
    return rule == ("ByteLevel", False, True) and state["normalizer"] is None and has_only_special


# --- where a text may be taken apart without changing its tokens ------------------------------------------------------

# finds, in text[start:], the place at or before `stop` (else the first after it) to cut at; None: nowhere
FindPlace = Callable[[str, int, int], int | None]
AFTER_WORD = re.compile(r"(?<=[^\W_])[ \n]")


def anywhere(text: str, start: int, stop: int) -> int | None:
    """Cut at `stop`: for tokenizers of single bytes or characters."""
    return stop if stop < len(text) else None


def after_words(text: str, start: int, stop: int) -> int | None:
    """Cut between a letter or digit and the space or line break after it, where GPT-2's splitting rule always cuts.

    No alternative of its pattern goes from what is not white space to white space, and none looks back. So the tokens
    on either side do not depend on the other. (Radford et al., "Language Models are Unsupervised Multitask Learners".)
    """
    for begin in (max(start + 1, stop - 1000), start + 1):  # the last one is mostly near
        if found := [match.start() for match in AFTER_WORD.finditer(text, begin, stop + 1)]:
            return found[-1]
    after = AFTER_WORD.search(text, stop + 1)
    return after.start() if after else None


def cutting_rule(tokenizer) -> FindPlace | None:
    """Return where texts may be taken apart with this tokenizer, or None where only whole documents are exact."""
    if tokenizer_kind(tokenizer) in ("byte", "char"):
        return anywhere
    state = backend_state(tokenizer.backend_tokenizer)
    is_exact = state["model"]["type"] == "BPE" and not state["model"].get("dropout")
    return after_words if is_exact and splits_as_gpt2(state) else None
