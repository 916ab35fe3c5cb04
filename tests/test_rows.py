"""Rows of every format, plain and compressed; what a line, an empty row and a bad row is, the same for every verb."""

import bz2
import gzip
import io
import json
import lzma
import signal
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.arguments import FinetuneDataArguments
from finetune.chat_files import find_format, read_conversations, read_pairs
from finetune.data import render, with_template
from training.data import encoding
from training.data.documents import Position
from training.data.preparation import prepare
from training.data.rows import format_of
from training.data.sources import read_documents, read_stretches
from training.data.tokenizers import build_tokenizer
from training.system.errors import UserError

from .small_corpora import arguments, killed_after, prepared

CASES = Path(__file__).parents[2] / "shared/cases"
TEXTS = ['a, "b"', "two\nlines", "x\u2028y\u0085z\x0b\x0c", "é\r\nü", "3"]


def csv_of(texts: list[str], delimiter: str = ",") -> bytes:
    lines = [f"{n}{delimiter}" + '"' + text.replace('"', '""') + '"\n' for n, text in enumerate(texts)]
    return "".join([f"\ufeffn{delimiter}text\n", *lines]).encode()


def arrow_of(table: pa.Table, kind) -> bytes:
    sink = io.BytesIO()
    with kind(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet_of(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


BYTES = {"tokenizer": "byte", "tokenizer_vocab_size": None}
ROWS = [{"n": n, "text": text} for n, text in enumerate(TEXTS)]
TABLE = pa.table({"n": range(len(TEXTS)), "text": TEXTS})
FORMATS = {
    "csv": csv_of(TEXTS),
    "tsv": csv_of(TEXTS, "\t"),
    "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "ndjson": "\r\n\n".join(json.dumps(row) for row in ROWS).encode("utf-8-sig"),
    "json": json.dumps(ROWS, indent=1).encode(),
    "parquet": parquet_of(TABLE),
    "arrow": arrow_of(TABLE, pa.ipc.new_stream),
    "feather": arrow_of(TABLE, pa.ipc.new_file),
}


def zipped(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("folder/", "")
        archive.writestr("folder/inside", content)
    return sink.getvalue()


COMPRESSIONS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    ".zip": zipped,
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def texts(**source) -> list[str]:
    return [document.text for document in read_documents(arguments(**source))]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_table_is_read_whatever_it_is_compressed_by(kind):
    for ending, compress in COMPRESSIONS.items():
        name = f"table.{kind}{ending}"
        Path(name).write_bytes(compress(FORMATS[kind]))
        assert texts(data_files=[name]) == TEXTS, name
        parts = list(read_stretches(arguments(data_files=[name])))
        rest = read_stretches(arguments(data_files=[name]), Position(3, parts[2].place))
        assert [part.text for part in rest] == TEXTS[3:], name


def test_a_table_without_a_known_ending_is_known_by_what_it_holds():
    for kind in ("json", "jsonl", "parquet", "arrow", "feather"):
        Path("part-00000").write_bytes(FORMATS[kind])
        assert texts(data_files=["part-00000"]) == TEXTS, kind
    Path("text").write_text("plain")
    assert format_of(Path("text"), "text") is None


@pytest.mark.parametrize("ending", [ending for ending in COMPRESSIONS if ending])
def test_text_files_may_be_compressed(ending):
    content = "one\r\ntwo\u2028é\n" * 50
    Path("plain.txt").write_bytes(content.encode("utf-8-sig"))
    Path(f"packed.txt{ending}").write_bytes(COMPRESSIONS[ending](content.encode("utf-8-sig")))
    assert texts(text_files=["plain.txt", f"packed.txt{ending}"]) == [content, content]
    whole = Path(f"packed.txt{ending}").read_bytes()
    Path("half").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"^text_files='half': (cannot be read \(|is binary|is not UTF-8)") as refusal:
        texts(text_files=["half"])
    assert "\n" not in str(refusal.value)


def test_a_zip_of_several_files_is_refused():
    with zipfile.ZipFile("two.zip", "w") as archive:
        archive.writestr("a", "a")
        archive.writestr("b", "b")
    with pytest.raises(UserError, match=r"two.zip': cannot be read \(a zip archive of 2 files.*unpack it"):
        texts(text_files=["two.zip"])


# --- empty and bad rows, and one policy -------------------------------------------------------------------------------

DEEP = '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}"
BAD = {
    "deep.jsonl": (f'{{"text": "a"}}\n{DEEP}\n{{"text": "b"}}\n', "line 2: is nested too deeply"),
    "broken.jsonl": ('{"text": "a"}\n\n{oh\n{"text": "b"}', "line 3: is not JSON"),
    "other.jsonl": ('{"text": "a"}\n[1]\n{"text": "b"}', "line 2: holds list, not an object"),
    "without.jsonl": ('{"text": "a"}\n{"txt": "c"}\n{"text": "b"}', "line 2: has no column 'text'"),
    "number.json": ('[{"text": "a"}, {"text": 5}, {"text": "b"}]', "entry 2: holds int in 'text'"),
    "nested.json": ('[{"text": "a"}, {"text": {"x": 1}}, {"text": "b"}]', "entry 2: holds dict in 'text'"),
    "latin.csv": (b"text\na\ncaf\xe9\nb\n", "line 3: is not UTF-8 (byte 0xE9 at character 3)"),
    "ragged.csv": ("text,n\na,1\nx\nb,2\n", "line 3: has 1 cells, and the header has 2"),
    "quote.csv": ('text,n\na,1\n"x"y,2\nb,2\n', "line 3: is not CSV"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_left_out_and_the_others_are_kept(name, capsys):
    content, words = BAD[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refusal:
        texts(data_files=[name])
    assert str(refusal.value).startswith(f"data_files={name!r}: {words}") and "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("--on_bad_file skip")
    options = {"on_bad_file": "skip", "validation_by": "documents", **BYTES}
    corpus = prepare(arguments(data_files=[name], data_dir="x", **options))
    assert sum(split["documents"] for split in corpus.manifest["splits"].values()) == 2
    assert corpus.manifest["left_out"][f"rows of {name}"].startswith(f"1, the first: {words}")
    assert capsys.readouterr().err.count("skipped: ") == 1


def test_rows_without_text_are_none_and_leave_no_split_empty():
    rows = [{"text": ""}, {"text": None}] * 50 + [{"text": "one"}, {"text": "two"}]
    for name in ("some.jsonl", "some.parquet"):
        if name.endswith("jsonl"):
            Path(name).write_text("\n".join(map(json.dumps, rows)))
        else:
            pq.write_table(pa.Table.from_pylist(rows), name)
        for seed in range(3):
            split = {"validation_by": "documents", "validation_fraction": 0.02, "validation_seed": seed}
            corpus = prepare(arguments(data_files=[name], data_dir=f"{name}-{seed}", **split, **BYTES))
            assert [part["documents"] for part in corpus.manifest["splits"].values()] == [1, 1]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), "none.parquet")
    with pytest.raises(UserError, match="data_files: the source holds no text at all"):
        prepare(arguments(data_files=["none.parquet"], data_dir="none", **BYTES))


def test_a_text_of_parquet_that_is_not_utf8_is_one_bad_row(capsys):
    texts_and_one = pa.array([b"a", b"caf\xe9", b"b"]).view(pa.string())
    pq.write_table(pa.table({"text": texts_and_one}), "latin.parquet")
    with pytest.raises(UserError, match=r"latin.parquet': row 2: cannot be read \(.*0xe9"):
        texts(data_files=["latin.parquet"])
    assert texts(data_files=["latin.parquet"], on_bad_file="skip") == ["a", "b"]
    assert capsys.readouterr().err.count("skipped") == 1


def test_half_a_compressed_chat_is_one_line():
    chat = gzip.compress(b"".join(b"User: %d\nAssistant: %d\n\n" % (n, n * 7919) for n in range(999)))
    Path("whole.gz").write_bytes(chat)
    Path("half.gz").write_bytes(chat[:20])
    with pytest.raises(UserError, match=r"text_files='half.gz': cannot be read \(Compressed file ended"):
        find_format(FinetuneDataArguments(text_files=["half.gz"]))
    data = FinetuneDataArguments(text_files=["whole.gz", "half.gz"], on_bad_file="skip")
    assert find_format(data) == "chat"
    assert len(list(read_conversations(data, {}))) == 999


def test_bad_rows_of_a_killed_preparation_are_counted_once():
    lines = [json.dumps({"text": f"row {number} " * 9}) if number % 7 else "{oh" for number in range(300)]
    Path("some.jsonl").write_text("\n".join(lines))
    options = {"data_files": ["some.jsonl"], "on_bad_file": "skip", "validation_by": "documents", **BYTES}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoding, "BATCH_CHARACTERS", 700)
        unbroken = prepared("unbroken", **options)
        assert killed_after(3, data_dir="killed", **options) == -signal.SIGKILL
        assert prepared("killed", **options) == unbroken
    left_out = json.loads(Path("killed/manifest.json").read_text())["left_out"]["rows of some.jsonl"]
    assert left_out.startswith("43, the first: line 1: is not JSON")


def test_a_folder_of_tables_and_a_data_set_of_them():
    Path("set").mkdir()
    for number, kind in enumerate(("csv", "jsonl")):
        Path(f"set/{kind}").mkdir()
        Path(f"set/{kind}/train-{number}.{kind}.gz").write_bytes(gzip.compress(FORMATS[kind]))
        Path(f"set/{kind}/README").write_text("no table")
        assert texts(data_files=[f"set/{kind}"]) == texts(dataset=f"set/{kind}") == TEXTS
    assert texts(data_files=["set"]) == TEXTS * 2
    Path("none").mkdir()
    with pytest.raises(UserError, match="data_files='none': the folder holds no table"):
        texts(data_files=["none"])


CHATS = {
    "good": {"messages": [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c\x0bd"}]},
    "bad": {"messages": [{"role": "robot", "content": "a"}]},
}
PAIRS = {"good": {"prompt": "a\u2028b", "completion": "c\x0bd"}, "bad": {"prompt": "a", "completion": " "}}


@pytest.mark.parametrize("kind", ["chat", "pairs"])
def test_chats_and_pairs_heed_the_same_policy(kind, capsys):
    kinds, read = (CHATS, read_conversations) if kind == "chat" else (PAIRS, read_pairs)
    lines = [json.dumps(kinds[name], ensure_ascii=False) for name in ("good", "bad", "good", "bad")]
    Path("rows.jsonl").write_text("\ufeff" + "\n".join([*lines, "{oh"]), encoding="utf-8")
    data = FinetuneDataArguments(data_files=["rows.jsonl"])
    assert find_format(data) == kind
    with pytest.raises(UserError, match=r"rows.jsonl': line 2: .*--on_bad_file skip$"):
        list(read(data, {}))
    left_out: dict = {}
    found = list(read(FinetuneDataArguments(data_files=["rows.jsonl"], on_bad_file="skip"), left_out))
    assert [document.where for document in found] == ["rows.jsonl, line 1", "rows.jsonl, line 3"]
    assert left_out["rows of rows.jsonl"]["rows"] == [1, 3, 4]
    said = [message["content"] for message in found[0].messages] if kind == "chat" else list(found[0][1:])
    assert said == ["a\u2028b", "c\x0bd"]


def test_lines_of_a_chat_text_are_those_of_a_table():
    Path("chat.txt").write_bytes("\ufeffUser: a\u2028b\x0b\r\nmore\u0085\r\nAssistant: c\x0c.\n".encode())
    (found,) = read_conversations(FinetuneDataArguments(text_files=["chat.txt"]), {})
    assert [message["content"] for message in found.messages] == ["a\u2028b\x0b\r\nmore", "c\x0c."]


def test_a_bad_conversation_of_a_text_is_left_out():
    Path("chat.txt").write_text("User: a\nAssistant: b\n\nUser: c\nUser: d\n\nUser: e\nAssistant: f\n")
    left_out: dict = {}
    data = FinetuneDataArguments(text_files=["chat.txt"], on_bad_file="skip")
    assert [found.where for found in read_conversations(data, left_out)] == ["chat.txt, line 1", "chat.txt, line 7"]
    assert left_out["rows of chat.txt"]["rows"] == [1]


@pytest.mark.parametrize(
    ("tools", "read"),
    [
        ([{"name": "add"}], [{"name": "add"}]),
        ('[{"name": "add"}]', [{"name": "add"}]),
        ("", None),
        (None, None),
        ("x", ""),
    ],
)
def test_a_row_says_which_tools_there_are(tmp_path, tools, read) -> None:
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns, "tools": tools}), encoding="utf-8")
    found = read_conversations(FinetuneDataArguments(data_files=[str(tmp_path / "chat.jsonl")]), {})
    if read == "":
        with pytest.raises(UserError, match="'tools': 'x' is not a list of JSON schemas"):
            list(found)
        return
    (conversation,) = found
    assert conversation.tools == read
    shown = render(with_template(build_tokenizer("byte")), conversation)
    assert ('"name": "add"' in shown) == bool(read)


# --- the cases that were handed over ----------------------------------------------------------------------------------


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared is absent")
@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "rows.jsonl.gz", "plain.txt.gz"])
def test_handed_tables_are_read(name):
    source = {"text_files" if name.startswith("plain") else "data_files": [str(CASES / name)]}
    found = texts(**source)
    assert len(found) == 1 if name.startswith("plain") else len(found) > 50
    assert all(" words" in text or text.startswith("plain text") for text in found)


@pytest.mark.skipif(not CASES.is_dir(), reason="../shared is absent")
def test_handed_chats_and_pairs_are_read():
    chats = FinetuneDataArguments(data_files=[str(CASES / "sharegpt_tool.jsonl")])
    assert find_format(chats) == "chat"
    assert [message["role"] for message in next(iter(read_conversations(chats, {}))).messages] == [
        "system", "user", "assistant", "tool", "assistant",
    ]  # fmt: skip
    pairs = FinetuneDataArguments(data_files=[str(CASES / "alpaca.jsonl")])
    assert find_format(pairs) == "pairs"
    assert [pair.prompt for pair in read_pairs(pairs, {})][:2] == ["add 0\n\n1 and 2\n\n", "add 1\n\n"]
