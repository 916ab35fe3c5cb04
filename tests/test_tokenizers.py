"""Tokenizers: exact round trips, the same after saving, fast paths equal to `tokenizers` itself, clear refusals."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training import train_tokenizer
from training.data import encoding
from training.data.encoding import encode_documents, fast_bpe, kinds_agree, ranks_of
from training.data.tokenizers import (
    BYTE_VOCABULARY,
    END_OF_TEXT,
    build_tokenizer,
    load_tokenizer,
    tokenizer_hash,
    tokenizer_kind,
)
from training.system.errors import UserError

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
    slow = encoding._encode_others(tokenizer, texts, texts)
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
        ("bpe", ["ab"], 4096, r"tokenizer_vocab_size=4096: the text yields only 258 tokens; lower the size"),
        ("byte", None, 300, r"tokenizer_vocab_size=300: only tokenizer=bpe takes it, not 'byte'"),
        ("char", None, None, r"tokenizer='char': it is made from a text and there is none"),
        ("char", [""], None, r"tokenizer='char': the text is empty"),
        ("./no-such-dir/x", None, None, r"tokenizer='./no-such-dir/x': cannot be loaded \(.*\); name byte"),
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
    for taken in ("made", "a.txt"):
        with pytest.raises(UserError, match=f"{taken}: already exists and is not empty; choose another"):
            train_tokenizer.main([*flags, "--output_dir", str(tmp_path / taken)])


def test_a_byte_tokenizer_needs_no_text_but_what_is_named_must_be_there(tmp_path):
    flags = ["--tokenizer", "byte", "--output_dir", str(tmp_path / "made")]
    for nothing in ("", "nowhere.txt"):
        with pytest.raises(UserError, match=f"text_files='{nothing}'"):
            train_tokenizer.main([*flags, "--text_files", nothing])
    train_tokenizer.main(flags)


def test_a_place_that_can_not_be_made_is_named_as_it_was_given(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/made: Not a directory; choose another"):
        train_tokenizer.main(["--tokenizer", "byte", "--output_dir", str(tmp_path / "file" / "made")])


def test_a_tokenizer_that_was_half_written_does_not_bar_the_way(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("to be or not to be")
    flags = ["--tokenizer", "byte", "--text_files", str(tmp_path / "a.txt"), "--output_dir", str(tmp_path / "made")]
    save = PreTrainedTokenizerFast.save_pretrained

    def half(self, folder):
        save(self, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", half)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer.main(flags)
    assert not (tmp_path / "made").exists()
    monkeypatch.undo()
    train_tokenizer.main(flags)
    assert len(load_tokenizer(str(tmp_path / "made"))) == 257


# tiktoken, where its ids are provably the same


WORDS = (
    "the quick brown fox isn't here; we're 12 or 3456, they'll jump\n\n  over \t lazy dogs' 'heads' and I'd've said so "
)


def trained(size: int = 320):
    """A BPE tokenizer with merges of letters, digits, spaces and line breaks."""
    return build_tokenizer("bpe", lambda: iter([WORDS * 9, "    x\n\n\n1234 é è", "日本語 日本"]), size)


def unicode_texts(seed: int) -> list[str]:
    """Return texts where characters of all kinds and scripts meet contractions, spaces and line breaks."""
    draw = random.Random(seed)
    odd = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u2028",
        "'s",
        "'ll",
        "'",
        "\u0301",
        "½",
        "²",
        "Ⅷ",
        "٣",
        "ß",
    ]
    scripts = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x700), (0x900, 0xE00), (0x2000, 0x2C00), (0x3040, 0xD7A0)]
    scripts += [(0x10000, 0x10200), (0x1D400, 0x1D800), (0x1F300, 0x1FA00), (0xE000, 0xE010), (0x10FF00, 0x110000)]
    parts = [*odd, *WORDS.split(" "), *("\n" * 3, " " * 5)]
    texts = []
    for _ in range(150):
        pieces = [
            draw.choice(parts) if draw.random() < 0.6 else chr(draw.randrange(*draw.choice(scripts))) for _ in range(60)
        ]
        texts.append("".join(pieces))
    return [*texts, *fuzz(seed), "a" * 3000, " " * 3000, "\n" * 999, "日" * 500]


@pytest.mark.parametrize("which", ["trained", "gpt2"])
def test_the_fast_encoder_gives_the_ids_of_tokenizers(which: str):
    pytest.importorskip("tiktoken")
    if which == "gpt2" and not GPT2.exists():
        pytest.skip("../shared is absent")
    tokenizer, texts = load_tokenizer(str(GPT2)) if which == "gpt2" else trained(), unicode_texts(3)
    fast = fast_bpe(tokenizer)
    for text, ids, slow in zip(
        texts, fast.encode(texts), encoding._encode_by_itself(tokenizer, texts, texts), strict=True
    ):
        assert ids.dtype == slow.dtype == np.uint32
        np.testing.assert_array_equal(ids, slow, err_msg=repr(text))
    for text, ids in zip(texts, encode_documents(tokenizer, texts), strict=True):
        np.testing.assert_array_equal(ids, encoding._encode_by_itself(tokenizer, [text], [""])[0])


def test_it_is_built_when_there_is_enough_to_encode(monkeypatch):
    pytest.importorskip("tiktoken")
    monkeypatch.setattr("training.data.encoding.WORTH_IT", 1000)
    tokenizer = trained()
    assert fast_bpe(tokenizer, 600) is None
    fast = fast_bpe(tokenizer, 400)
    assert fast is not None and fast_bpe(tokenizer, 1) is fast
    tokenizer.add_tokens(["<new>"])  # not a special one: text that spells it is that token
    assert fast_bpe(tokenizer, 1000) is None


def test_without_tiktoken_the_ids_are_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = trained()
    assert fast_bpe(tokenizer) is None
    ids = encode_documents(tokenizer, [WORDS])[0]
    assert tokenizer.decode(ids.tolist()) == WORDS


def test_characters_of_another_kind_are_left_to_tokenizers(monkeypatch):
    """As where one library knows a newer Unicode than the other."""
    pytest.importorskip("tiktoken")
    tokenizer = trained()
    monkeypatch.setattr("training.data.encoding.kinds_agree", lambda points: points.start == 0)
    fast = fast_bpe(tokenizer)
    assert [ids is None for ids in fast.encode(["plain é", "日本", "half \ud800 a pair"])] == [False, True, True]
    assert encode_documents(tokenizer, ["日本 x"])[0].tolist() == tokenizer.backend_tokenizer.encode("日本 x").ids


def altered(**changes) -> dict:
    """The JSON of the trained tokenizer with parts of it changed."""
    state = json.loads(trained().backend_tokenizer.to_str())
    model = state["model"] | changes.pop("model", {})
    return state | changes | {"model": model}


def test_the_state_as_it_is_has_a_table():
    assert len(ranks_of(altered())) == 319


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"model": {"dropout": 0.1}},
        {"model": {"ignore_merges": True}},
        {"model": {"unk_token": "a"}},
        {"model": {"continuing_subword_prefix": "##"}},
    ],
    ids=str,
)
def test_what_could_differ_has_no_table(changes: dict):
    assert ranks_of(altered(**changes)) is None


def merging(merges: list[list[str]]) -> dict:
    """The JSON of a byte-level BPE with just these merges, numbered in order."""
    state, vocabulary = altered(), dict(BYTE_VOCABULARY)
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return state | {"model": state["model"] | {"vocab": vocabulary, "merges": merges}}


def test_a_token_that_is_not_itself_has_no_table():
    """`tokenizers` never reaches "abc" here, for "ab" is merged first; tiktoken would join "ab" and "c" to it."""
    assert ranks_of(merging([["a", "b"], ["ab", "c"]])) is not None
    assert ranks_of(merging([["a", "b"], ["b", "c"], ["a", "bc"]])) is None


def test_merges_out_of_order_have_no_table():
    state = merging([["a", "b"], ["c", "d"]])
    state["model"]["merges"] = state["model"]["merges"][::-1]
    assert ranks_of(state) is None
    assert ranks_of(merging([["ab", "c"], ["a", "b"]])) is None


@pytest.mark.slow
def test_all_of_unicode_is_of_one_kind_in_both():
    """A report on the two versions at hand: nothing depends on it, for what differs is left to `tokenizers`."""
    pytest.importorskip("tiktoken")
    assert [start for start in range(0, 0x110000, 256) if not kinds_agree(range(start, start + 256))] == []


def test_bpe_without_a_size_is_as_large_as_the_text_has_pairs_for():
    tokenizer = build_tokenizer("bpe", lambda: iter(["the cat, the dog"] * 2))
    assert 257 < len(tokenizer) < 300
    assert tokenizer.decode(encode_documents(tokenizer, ["the dog"])[0]) == "the dog"
