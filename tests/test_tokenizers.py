"""Tokenizers: exact round trips, the same after saving, fast paths equal to `tokenizers` itself, clear refusals."""

import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from training import tokenizers, train_tokenizer
from training.errors import UserError
from training.tokenizers import (
    END_OF_TEXT,
    build_tokenizer,
    encode_documents,
    load_tokenizer,
    tokenizer_hash,
    tokenizer_kind,
)

GPT2 = Path(__file__).parents[2] / "shared/data/gpt2-tokenizer"
KINDS = {"byte": None, "char": None, "bpe": 300}


def fuzz(seed: int, count: int = 60) -> list[str]:
    """Return texts of characters from all of Unicode, with line breaks and a special token's spelling among them."""
    draw = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x110000)]
    texts = [
        "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(40))) for _ in range(count)
    ]
    return [*texts, "", "\r\n\n\r", f"a{END_OF_TEXT}b", " two  spaces , and a comma .", "e\u0301 \ufeff \u200d"]


def build(name: str):
    return build_tokenizer(name, lambda: iter(fuzz(1)), KINDS[name])


@pytest.mark.parametrize("name", KINDS)
def test_round_trip_and_equal_after_saving(name, tmp_path):
    tokenizer = build(name)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert tokenizer_kind(loaded) == tokenizer_kind(tokenizer) == (name if name != "bpe" else "other")
    for text, ids in zip(fuzz(1), encode_documents(loaded, fuzz(1)), strict=True):
        assert loaded.decode(ids.tolist()) == text
        assert loaded.eos_token_id not in ids


@pytest.mark.parametrize("name", ["byte", "char"])
def test_fast_path_equals_the_backend(name):
    tokenizer, texts = build(name), fuzz(1)
    slow = tokenizers._encode_others(tokenizer, texts, texts)
    for one, other in zip(encode_documents(tokenizer, texts), slow, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_text_never_seen_before_comes_back(name):
    tokenizer = build(name)
    for text, ids in zip(fuzz(2), encode_documents(tokenizer, fuzz(2)), strict=True):
        assert tokenizer.decode(ids.tolist()) == text


def test_byte_ids_are_byte_values():
    tokenizer = build("byte")
    every_byte = "".join(map(chr, range(128))) + "é€𝄞"
    assert encode_documents(tokenizer, [every_byte])[0].tolist() == list(every_byte.encode())
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.unk_token) == (257, 256, None)


def test_char_ids_are_sorted_characters():
    tokenizer = build_tokenizer("char", lambda: iter(["hello\n", "you"]))
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [*sorted(set("hello\nyou")), END_OF_TEXT]
    assert tokenizer.decode(tokenizer("yell\nyou").input_ids) == "yell\nyou"


def test_bpe_has_the_size_and_is_the_same_twice():
    tokenizer = build("bpe")
    assert (len(tokenizer), tokenizer.eos_token_id) == (300, 299)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(build("bpe"))


def test_special_tokens_work_again_after_encoding():
    tokenizer = build("bpe")
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    assert len(encode_documents(tokenizer, [END_OF_TEXT * 3])[0]) > 3
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3
    assert tokenizer(END_OF_TEXT).input_ids == [tokenizer.eos_token_id]


def test_a_char_tokenizer_that_does_more_takes_no_fast_path():
    from tokenizers import normalizers

    tokenizer = build_tokenizer("char", lambda: iter(["ab"]))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_kind(tokenizer) == "other"
    assert encode_documents(tokenizer, ["AB"])[0].tolist() == [0, 1]


def test_unknown_character_is_named():
    tokenizer = build_tokenizer("char", lambda: iter(["ab"]))
    with pytest.raises(UserError, match=r"'€' \(U\+20AC\) at offset 2 of notes.txt; build it on this text too"):
        encode_documents(tokenizer, ["ab", "ba€"], ["first.txt", "notes.txt"])
    with pytest.raises(UserError, match=r"'A' \(U\+0041\) at offset 0 of text 0"):
        encode_documents(tokenizer, ["A"])


@pytest.mark.parametrize(
    ("name", "texts", "size", "message"),
    [
        ("bpe", ["ab"], 100, r"tokenizer_vocab_size=100: must be at least 257"),
        ("bpe", ["ab"], 4096, r"tokenizer_vocab_size=4096: the text has pairs for 258 tokens only; lower the size"),
        ("byte", None, 300, r"tokenizer_vocab_size=300: only tokenizer=bpe takes it, not 'byte'"),
        ("char", None, None, r"tokenizer='char': it is made from a text and there is none"),
        ("char", [""], None, r"tokenizer='char': the text is empty"),
        ("./no-such-dir/x", None, None, r"tokenizer='./no-such-dir/x': can not be loaded \(.*\); name byte"),
    ],
)
def test_refusals(name, texts, size, message):
    with pytest.raises(UserError, match=message) as refusal:
        build_tokenizer(name, texts and (lambda: iter(texts)), size)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path):
    tokenizer = build("byte")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no eos_token to end documents with"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(not GPT2.exists(), reason="../shared is absent")
def test_gpt2s_own_tokenizer(tmp_path):
    tokenizer = load_tokenizer(str(GPT2))
    ids = encode_documents(tokenizer, [f"Hello world{END_OF_TEXT}"])[0].tolist()
    assert ids[:2] == [15496, 995] and tokenizer.eos_token_id not in ids
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(tokenizer)


def test_main_trains_and_saves(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question " * 9)
    flags = ["--tokenizer", "bpe", "--tokenizer_vocab_size", "264", "--text_files", str(tmp_path / "a.txt")]
    train_tokenizer.main([*flags, "--output_dir", str(tmp_path / "made")])
    assert len(load_tokenizer(str(tmp_path / "made"))) == 264
    assert "made: a bpe tokenizer, vocabulary 264." in capsys.readouterr().out
    with pytest.raises(UserError, match="made': is not empty; name another --output_dir"):
        train_tokenizer.main([*flags, "--output_dir", str(tmp_path / "made")])
