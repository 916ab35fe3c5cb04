"""Tokenizers of every kind that meets a model, each built in the process: what text becomes ids, and back."""

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training.data.tokenizers import END_OF_TEXT, build_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog\n\n  and how vexingly quick daft zebras jump, The END.\n"


def _byte_level(**post) -> PreTrainedTokenizerFast:
    """GPT-2's kind, small."""
    return wrap(build_tokenizer("bpe", lambda: iter([TEXT * 5]), 300).backend_tokenizer, **post)


def _sentence_piece(has_bytes: bool = True, **post) -> PreTrainedTokenizerFast:
    """Llama's kind: spaces are ▁, one is put before the text, and unknown characters are bytes or <unk>."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    if has_bytes:
        vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for character in sorted({*TEXT.replace(" ", "▁").replace("\n", ""), "▁"}):
        vocabulary[character] = len(vocabulary)
    merges = [("▁", "t"), ("▁", "q"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=has_bytes),
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(backend, **post)


def _metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece as T5 and the newer Llamas write it: a pre-tokenizer and a decoder of one name."""
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *((c, -3.0) for c in sorted({*TEXT, "▁"} - {" "}))], 0, False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return wrap(backend, ends=True)


def _words(**post) -> PreTrainedTokenizerFast:
    """BERT's kind: lower case, split at punctuation, <unk> for what is in no list."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>"]))
    return wrap(backend, **post)


def wrap(backend: Tokenizer, begins: bool = False, ends: bool = False) -> PreTrainedTokenizerFast:
    """The Hugging Face face of a backend, which puts <s> before and </s> after every text where it is told so."""
    specials = ["<s>", "</s>"]
    backend.add_special_tokens(specials)
    if begins or ends:
        parts = ["<s>"] * begins + ["$A"] + ["</s>"] * ends
        ids = [(token, backend.token_to_id(token)) for token in specials]
        template = processors.TemplateProcessing(single=" ".join(parts), special_tokens=ids)
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


# name: how it is made
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte": lambda: build_tokenizer("byte"),
    "char": lambda: build_tokenizer("char", lambda: iter([TEXT])),
    "byte_level": _byte_level,
    "adds_bos": lambda: _byte_level(begins=True),
    "adds_eos": lambda: _byte_level(ends=True),
    "adds_both": lambda: _byte_level(begins=True, ends=True),
    "sentence_piece": lambda: _sentence_piece(begins=True),
    "sentence_piece_both": lambda: _sentence_piece(begins=True, ends=True),
    "sentence_piece_unk": lambda: _sentence_piece(has_bytes=False),
    "metaspace": _metaspace,
    "lower_case": _words,
    "lower_case_both": lambda: _words(begins=True, ends=True),
}
BEGINNING = {"adds_bos", "adds_both", "sentence_piece", "sentence_piece_both", "lower_case_both"}
LOSSY = {"sentence_piece_unk", "metaspace", "lower_case", "lower_case_both"}  # of TEXT not every character is kept

__all__ = ["BEGINNING", "END_OF_TEXT", "LOSSY", "TEXT", "TOKENIZERS", "wrap"]
