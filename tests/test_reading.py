"""What is read of long texts and of tables, where reading goes on, and what is said of files that are bad."""

import json
import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from training.data import encoding, files, preparation
from training.data.documents import Document, Position
from training.data.encoding import encodable, encode_documents
from training.data.preparation import prepare
from training.data.sources import read_documents, read_stretches, unit_hash
from training.data.tokenizers import after_words, anywhere, build_tokenizer, cutting_rule, load_tokenizer
from training.system.errors import UserError

from .small_corpora import (
    BY_DOCUMENTS,
    arguments,
    every_text,
    fineweb,
    killed_after,
    prepared,
    prose,
    small_folder,
    write_parquet,
)

GPT2 = Path(__file__).parents[2] / "shared/data/gpt2-tokenizer"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    small_folder(tmp_path, monkeypatch)


# --- long documents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 50, 10**6])
def test_parts_are_the_file(monkeypatch, part_bytes):
    monkeypatch.setattr(files, "STRETCH_BYTES", part_bytes)
    parts = list(read_stretches(arguments(text_files=["long.txt"])))
    assert "".join(part.text for part in parts) == Path("long.txt").read_text(encoding="utf-8")
    assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert {part.number for part in parts} == {0}


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "gpt2"])
def test_texts_taken_apart_have_the_same_tokens(kind):
    texts = [prose(seed, words=200) for seed in range(40)]
    texts += ["", " ", "x" * 500, "a b" * 99, " \n \n" * 50, "é 1's " * 80]
    if kind == "gpt2" and not GPT2.exists():
        pytest.skip("../shared is absent")
    size = 400 if kind == "bpe" else None
    tokenizer = load_tokenizer(str(GPT2)) if kind == "gpt2" else build_tokenizer(kind, lambda: iter(texts), size)
    rule = cutting_rule(tokenizer)
    assert rule is (anywhere if kind in ("byte", "char") else after_words)
    for text in texts:
        whole = Document("x", text, [0])
        pieces = list(encodable(iter([whole]), rule, limit=17))
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        ids = [token for piece in encode_documents(tokenizer, [piece.text for piece in pieces]) for token in piece]
        assert ids == encode_documents(tokenizer, [text])[0].tolist()
    assert len(list(encodable(iter([whole]), rule, limit=17))) > 10


def test_other_tokenizers_get_whole_documents():
    tokenizer = build_tokenizer("bpe", lambda: iter([prose(1)]), 280)
    assert cutting_rule(tokenizer) is after_words
    tokenizer.add_tokens(["two words"])
    assert cutting_rule(tokenizer) is None
    first = Document("x", "a b c " * 9, [0], ends=False)
    rest = first._replace(text="d e f", starts=False, ends=True)
    whole = first._replace(text="a b c " * 9 + "d e f", ends=True)
    assert list(encodable(iter([first, rest]), None, limit=5)) == [whole]


def test_sizes_of_parts_and_pieces_change_no_token(monkeypatch):
    Path("texts").mkdir()
    for number in range(5):
        Path(f"texts/{number}.txt").write_text(prose(number, words=200), encoding="utf-8")
    sources = ({"text_files": ["texts"]}, {"text_files": ["texts"], **BY_DOCUMENTS}, {"text_files": ["long.txt"]})
    for name, source in enumerate(sources):
        monkeypatch.setattr(files, "STRETCH_BYTES", 10**6)
        monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 10**6)
        whole = prepared(f"whole-{name}", **source)
        for part_bytes, piece_characters in ((7, 100), (100, 7), (1000, 1000)):
            monkeypatch.setattr(files, "STRETCH_BYTES", part_bytes)
            monkeypatch.setattr(encoding, "PIECE_CHARACTERS", piece_characters)
            assert prepared(f"{part_bytes}-{name}", **source) == whole
        whole_texts = [document.text for document in read_documents(arguments(**source))]
        assert every_text(f"whole-{name}").count("<|endoftext|>") == len(whole_texts)


# --- parquet, as the Hub's data sets are ------------------------------------------------------------------------------


def test_a_folder_of_parquet_shards_is_read_like_the_same_files():
    texts = fineweb("fineweb")
    options = {"validation_by": "documents", "validation_fraction": 0.05, "validation_seed": 2357}
    by_folder = prepare(arguments(dataset="fineweb", data_dir="a", **options))
    by_files = prepare(arguments(data_files=["fineweb/*.parquet"], data_dir="b", **options))
    held_out = [unit_hash("validation", 2357, number) < 0.05 for number in range(len(texts))]
    expected = {"train": held_out.count(False), "validation": held_out.count(True)}
    for corpus in (by_folder, by_files):
        assert {split: part["documents"] for split, part in corpus.manifest["splits"].items()} == expected
        tokens = corpus.tokens("validation")
        text = corpus.tokenizer.decode(tokens.sequence(0, len(tokens)).tolist())
        assert text.split("<|endoftext|>")[:-1] == [text for text, held in zip(texts, held_out, strict=True) if held]
    assert by_folder.manifest["splits"] == by_files.manifest["splits"]
    assert not any(Path().rglob("*.arrow"))  # no second copy


def places(data) -> list[tuple]:
    return [(part.number, part.text, tuple(part.place)) for part in read_stretches(data) if part.ends]


@pytest.mark.parametrize(
    "source",
    [
        {"data_files": ["fineweb/*.parquet", "rows.jsonl"]},
        {"dataset": "fineweb"},
        {"dataset": "jsonl"},
        {"dataset": "jsonl", "streaming": True},
        {"text_files": ["long.txt", "rows.jsonl"]},
        {"dataset": "python-stdlib"},
        {"mixture": [{"dataset": "fineweb", "weight": 1}, {"data_files": "rows.jsonl", "weight": 3}]},
    ],
    ids=str,
)
def test_reading_goes_on_after_any_bookmark(source):
    fineweb("fineweb")
    Path("rows.jsonl").write_text("".join(json.dumps({"text": prose(seed, 5)}) + "\n" for seed in range(12)))
    Path("jsonl").mkdir()
    Path("jsonl/train.jsonl").write_bytes(Path("rows.jsonl").read_bytes())
    data = arguments(**source)
    whole = places(data)
    if "dataset" in source and source["dataset"] == "python-stdlib":
        whole = whole[:40]
    for count in {1, len(whole) // 3, len(whole) // 2, len(whole) - 1} - {0}:
        bookmark = Position(count, list(whole[count - 1][2]))
        rest = [(part.number, part.text, tuple(part.place)) for part in read_stretches(data, bookmark) if part.ends]
        assert rest[: len(whole) - count] == whole[count:]


def test_row_groups_before_the_bookmark_are_not_read(monkeypatch):
    read, iter_batches = [], pq.ParquetFile.iter_batches

    def noted(self, *args, row_groups, **kwargs):
        read.extend(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    list(read_stretches(arguments(data_files=["rows.parquet"]), Position(20, [0, 19])))  # of 7 rows each
    assert read == [2, 3, 4]


# --- bad input --------------------------------------------------------------------------------------------------------


def flip(path: str, offset: int) -> None:
    raw = bytearray(Path(path).read_bytes())
    raw[offset] ^= 0xFF
    Path(path).write_bytes(raw)


def damaged(kind: str) -> None:
    """Make three parquet files with 20 documents each, and damage the second one."""
    for index in range(3):
        write_parquet(f"p{index}.parquet", [f"file {index} row {row} {prose(row)}" for row in range(20)])
    raw = Path("p1.parquet").read_bytes()
    if kind == "truncated":
        Path("p1.parquet").write_bytes(raw[:-100])
    elif kind == "no parquet":
        Path("p1.parquet").write_bytes(b"<html>404</html>")
    else:
        metadata = pq.read_metadata("p1.parquet")
        flip("p1.parquet", metadata.row_group(1).column(0).dictionary_page_offset + 60)


@pytest.mark.parametrize("source", [{"data_files": ["p*.parquet"]}, {"dataset": "set"}], ids=["files", "folder"])
@pytest.mark.parametrize(("kind", "kept"), [("truncated", 0), ("no parquet", 0), ("flipped byte", 7)])
def test_a_corrupt_parquet_file_is_named_and_the_rest_kept_or_the_run_stopped(source, kind, kept, capsys):
    damaged(kind)
    Path("set").mkdir()
    for index in range(3):
        os.link(f"p{index}.parquet", f"set/p{index}.parquet")
    source = source | BY_DOCUMENTS | {"tokenizer": "byte", "tokenizer_vocab_size": None}
    with pytest.raises(UserError, match=r"=.*p1\.parquet': cannot be read \(.*--on_bad_file skip$") as refusal:
        prepared("x", **source)
    assert "\n" not in str(refusal.value) and not Path("x").exists()
    corpus = prepare(arguments(data_dir="x", on_bad_file="skip", **source))
    text = every_text("x")
    assert [text.count(f"file {index} row") for index in range(3)] == [20, kept, 20]
    ((name, why),) = corpus.manifest["left_out"].items()
    assert name.endswith("p1.parquet") and f"from row {kept} on" in why
    assert capsys.readouterr().err.count("skipped: ") == 1


def test_a_bad_file_that_stopped_the_run_may_be_left_out_as_it_goes_on(monkeypatch, capsys):
    damaged("flipped byte")
    source = BY_DOCUMENTS | {"data_files": ["p*.parquet"], "tokenizer": "byte", "tokenizer_vocab_size": None}
    unbroken = prepared("unbroken", on_bad_file="skip", **source)
    monkeypatch.setattr(preparation, "SAVE_SECONDS", 0)
    with pytest.raises(UserError, match=r"p1\.parquet': cannot be read"):
        prepared("x", **source)
    assert killed_after(2, data_dir="x", on_bad_file="skip", **source) == -signal.SIGKILL
    assert prepared("x", on_bad_file="skip", **source) == unbroken
    assert "going on" in capsys.readouterr().err


def test_bad_text_files_are_left_out_too():
    Path("bad.txt").write_bytes("é".encode() * 400 + b"\xff")
    Path("null.txt").write_bytes(b"a" * 9000 + b"\0")
    options = {"text_files": ["long.txt", "bad.txt", "null.txt"], "tokenizer": "byte", "tokenizer_vocab_size": None}
    with pytest.raises(UserError, match=r"text_files='bad.txt': is not UTF-8 \(byte 0xFF at offset 800\); convert it"):
        prepared("x", **options)
    corpus = prepare(arguments(data_dir="x", on_bad_file="skip", **options))
    assert list(corpus.manifest["left_out"]) == ["bad.txt", "null.txt"]
    assert every_text("x").replace("<|endoftext|>", "") == Path("long.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", [{"data_files": ["rows.parquet"]}, {"dataset": "set"}])
def test_a_missing_column_names_those_there_are(source):
    Path("set").mkdir()
    write_parquet("rows.parquet", ["a", "b"], url=["c", "d"])
    os.link("rows.parquet", "set/rows.parquet")
    for policy in ("stop", "skip"):
        with pytest.raises(UserError, match=r"^text_column='content': .*parquet has no such column; it has text, url$"):
            prepared("x", text_column="content", on_bad_file=policy, **source)


def test_a_column_that_is_no_text():
    write_parquet("rows.parquet", ["a", "b"], n=[1, 2])
    with pytest.raises(UserError, match=r"rows.parquet': row 1: holds int in 'n', not text; fix it"):
        prepared("x", data_files=["rows.parquet"], text_column="n")


def test_a_split_that_a_folder_lacks():
    fineweb("fineweb", files=1)
    with pytest.raises(UserError, match=r"dataset_split 'dev': choose from train\. It is of dataset='fineweb'\.$"):
        prepared("x", dataset="fineweb", dataset_split="dev")


def test_a_hub_id_without_a_network_points_to_data_files():
    with pytest.raises(UserError) as refusal:
        prepared("x", dataset="Skylion007/openwebtext", tokenizer="byte", tokenizer_vocab_size=None)
    message = str(refusal.value)
    assert message.startswith("dataset='Skylion007/openwebtext': cannot be loaded (") and "\n" not in message
    assert message.endswith(
        "without a network, fetch its parquet files elsewhere and name them with --data_files 'FOLDER/*.parquet'"
    )


def test_a_hub_set_that_needs_a_script(monkeypatch):
    import datasets

    calls = []

    def load(path, name=None, revision=None, **options):
        calls.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        raise FileNotFoundError("no such revision")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(UserError, match=r"it needs a script, which `datasets` no longer .* revision: no such"):
        list(read_documents(arguments(dataset="someone/x")))
    assert calls == [None, "refs/convert/parquet"]
