"""Preparing at scale: any number of processes, any kill and any part size give the same bytes; bad files are named."""

import json
import multiprocessing
import os
import random
import signal
import string
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training import building, preparation, splitting, text_files, workers
from training.arguments import DataArguments
from training.building import building_folder
from training.corpus import describe, prepare
from training.errors import UserError
from training.lock import locked
from training.preparation import progress_line
from training.reading import say
from training.sources import Bookmark, documents, numbered_parts, size_of_sources, unit_hash
from training.splitting import after_words, anywhere, cutting_rule, encodable
from training.tokenizers import build_tokenizer, encode_documents, load_tokenizer

from .tiny_runs import contents

GPT2 = Path(__file__).parents[2] / "shared/data/gpt2-tokenizer"
BY_DOCUMENTS = {"validation_by": "documents", "validation_fraction": 0.2}


def prose(seed: int, words: int = 60) -> str:
    """Words, numbers, contractions and line breaks of several scripts, in an order that the seed decides."""
    draw = random.Random(seed)
    known = ["it's", "I'll", "été", "日本語", "🙂", "x" * 30, "1234", "--", "...", "\n\n", "\t", "  ", "Zürich", "ß"]
    return " ".join(draw.choice([*known, "".join(draw.choices(string.ascii_lowercase, k=5))]) for _ in range(words))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Work in an empty folder with a table of 30 documents and one long text, in batches and parts that are small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / f"{tmp_path.name}-cache")
    monkeypatch.setattr(workers, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(splitting, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(text_files, "PART_BYTES", 333)
    write_parquet("rows.parquet", [prose(seed) for seed in range(30)])
    Path("long.txt").write_text(prose(99, words=1500), encoding="utf-8")


def write_parquet(path: str, texts: list, row_group_size: int = 7, **columns) -> None:
    table = pa.table({"text": pa.array(texts), **columns})
    pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True)


def arguments(**changes) -> DataArguments:
    return DataArguments(**{"tokenizer": "bpe", "tokenizer_vocab_size": 280, "shard_size": 500} | changes)


def prepared(folder: str, **changes) -> dict[str, str]:
    """Prepare and return the hash of every file."""
    return contents(prepare(arguments(data_dir=folder, **changes)).directory)


def every_text(directory: str | Path) -> str:
    """Decode both splits, one after the other."""
    corpus = prepare(arguments(data_dir=str(directory), tokenizer="byte", tokenizer_vocab_size=None))
    splits = [corpus.tokens(split) for split in ("train", "validation")]
    return "".join(corpus.tokenizer.decode(tokens.window(0, len(tokens)).tolist()) for tokens in splits)


# --- any number of processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [{"text_files": ["long.txt"]}, {"data_files": ["rows.parquet"], **BY_DOCUMENTS}])
def test_the_result_does_not_depend_on_the_number_of_processes(source, monkeypatch):
    one = prepared("one", **source)
    assert len([name for name in one if name.startswith("train-")]) > 2
    assert prepared("two", num_proc=2, **source) == one
    monkeypatch.setattr(workers, "BATCH_CHARACTERS", 150)
    assert prepared("three", num_proc=3, **source) == one


def test_an_error_in_a_process_is_the_persons_to_mend():
    Path("known.txt").write_text("abc " * 10)
    build_tokenizer("char", lambda: iter(["abc "])).save_pretrained("abc")
    Path("many").mkdir()
    for number in range(30):
        Path(f"many/{number:02}.txt").write_text("abc " * 40 + ("é" if number == 20 else ""))
    with pytest.raises(
        UserError,
        match=r"tokenizer='char': it does not know 'é' \(U\+00E9\) at offset 60 of .*20.txt \(from character 100 on\)",
    ):
        prepared("x", text_files=["many"], tokenizer="abc", tokenizer_vocab_size=None, num_proc=2)
    assert not Path("x").exists() and multiprocessing.active_children() == []


def test_a_process_that_was_ended_from_outside_is_told(monkeypatch):
    parent = os.getpid()

    def die(*_):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "encode", die)
    with pytest.raises(UserError, match="num_proc=2: one of the processes was ended from outside"):
        prepared("x", data_files=["rows.parquet"], num_proc=2)


def in_a_process(work) -> int:
    """Do `work` in a fork and return its exit code: minus the signal that ended it."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def killed_after(saves: int, **changes) -> int:
    """Prepare in a process that kills itself with signal 9 after it saved its state so many times, and wrote on."""

    def work():
        count, save = 0, preparation.State.save

        def saving(*args):
            nonlocal count
            count += 1
            if count > saves:
                os.kill(os.getpid(), signal.SIGKILL)
            save(*args)

        preparation.State.save, preparation.SAVE_SECONDS = saving, 0
        prepare(arguments(**changes))

    return in_a_process(work)


SOURCES = {
    "one long text": {"text_files": ["long.txt"]},
    "parquet": {"data_files": ["rows.parquet"], **BY_DOCUMENTS},
    "parquet by position": {"data_files": ["rows.parquet"]},
    "two processes": {"data_files": ["rows.parquet"], "num_proc": 2, **BY_DOCUMENTS},
    "jsonl": {"data_files": ["rows.jsonl"], **BY_DOCUMENTS},
    "local folder": {"dataset": "parquets", **BY_DOCUMENTS},
    "mixture": {
        "mixture": [{"data_files": "rows.parquet", "weight": 2}, {"text_files": "long.txt", "weight": 1}],
        **BY_DOCUMENTS,
    },
    "bytes": {"text_files": ["long.txt", "rows.jsonl"], "tokenizer": "byte", "tokenizer_vocab_size": None},
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_preparation_that_was_killed_ends_like_one_that_was_not(name, capsys):
    lines = [json.dumps({"text": prose(seed)}) + "\n" for seed in range(20)]
    Path("rows.jsonl").write_text("".join(lines))
    Path("parquets").mkdir()
    write_parquet("parquets/train-0.parquet", [prose(seed) for seed in range(10)])
    write_parquet("parquets/train-1.parquet", [prose(seed) for seed in range(10, 20)])
    unbroken = prepared("unbroken", **SOURCES[name])
    for saves in (1, 2):  # each goes on from where the last one was killed
        assert killed_after(saves, data_dir="broken", **SOURCES[name]) == -signal.SIGKILL
        assert not Path("broken").exists()
    assert prepared("broken", **SOURCES[name]) == unbroken
    assert "going on where a preparation was stopped" in capsys.readouterr().err
    assert [path for path in Path().iterdir() if path.name.startswith(".")] == []


def test_what_is_done_is_not_tokenised_again(monkeypatch):
    encoded, encode = [], workers.encode

    def noted(tokenizer, dtype, texts, names):
        encoded.extend(texts)
        return encode(tokenizer, dtype, texts, names)

    monkeypatch.setattr(workers, "encode", noted)
    prepared("unbroken", text_files=["long.txt"])
    whole, encoded[:] = list(encoded), []
    killed_after(3, data_dir="broken", text_files=["long.txt"])
    prepared("broken", text_files=["long.txt"])
    assert encoded and encoded == whole[-len(encoded) :] and len(whole) - len(encoded) >= 3 * 7  # of at most 100


def test_ctrl_c_keeps_what_is_done_and_says_so(monkeypatch, capsys):
    advance, count = preparation.State.advance, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 25:
            raise KeyboardInterrupt
        advance(*args)

    monkeypatch.setattr(preparation, "SAVE_SECONDS", 0)
    monkeypatch.setattr(preparation.State, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared("broken", text_files=["long.txt"])
    folder = next(Path().glob(".broken-*.building"))
    assert f"what is done is kept: the same command goes on from there (if you will not, remove {folder})" in (
        capsys.readouterr().err
    )
    assert prepared("broken", text_files=["long.txt"]) == prepared("unbroken", text_files=["long.txt"])
    assert not folder.exists()


def test_another_shard_size_starts_over(capsys):
    source = {"data_files": ["rows.parquet"], **BY_DOCUMENTS}
    killed_after(2, data_dir="x", **source)
    other = prepared("x", shard_size=600, **source)
    assert "starting over" in capsys.readouterr().err
    assert other == prepared("y", shard_size=600, **source)


def test_what_a_killed_preparation_left_may_be_damaged():
    killed_after(3, data_dir="x", text_files=["long.txt"])
    shard = next(Path().glob(".x-*.building/corpus/train-00000.bin"))
    shard.write_bytes(shard.read_bytes()[:10])
    with pytest.raises(UserError, match=r"train-00000.bin does not hold the \d+ tokens that were written to it, so a"):
        prepared("x", text_files=["long.txt"])
    assert prepared("x", text_files=["long.txt"]) == prepared("y", text_files=["long.txt"])


# --- one process at a time --------------------------------------------------------------------------------------------


def fingerprint_of(data) -> str:
    from training.corpus import _digest

    return _digest(describe(data))


def test_a_second_process_waits_and_takes_over_from_a_dead_one(monkeypatch, capsys):
    monkeypatch.setattr(building, "LOCK_SECONDS", 0.05)
    data = arguments(text_files=["long.txt"], data_dir="x")
    folder = building_folder(Path("x"), fingerprint_of(data))
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold():
        with locked(folder):
            ready.set()
            signal.pause()

    child = context.Process(target=hold, daemon=True)
    child.start()
    ready.wait()
    monkeypatch.setattr(building.time, "sleep", lambda seconds: (child.kill(), child.join()))  # it dies as we wait
    prepare(data)
    host = os.uname().nodename
    assert f"process {child.pid} on {host} prepares the same text, in {folder}: waiting" in capsys.readouterr().err
    assert contents(Path("x")) == prepared("y", text_files=["long.txt"]) and not folder.exists()


def test_a_second_process_takes_what_the_first_one_made(monkeypatch, capsys):
    data = arguments(text_files=["long.txt"], data_dir="x")
    folder = building_folder(Path("x"), fingerprint_of(data))
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def first():
        find_rule = preparation.find_rule

        def slow(*args):
            ready.set()
            done.wait()
            return find_rule(*args)

        preparation.find_rule = slow
        prepare(data)

    child = context.Process(target=first, daemon=True)
    child.start()
    ready.wait()
    monkeypatch.setattr(building.time, "sleep", lambda seconds: (done.set(), child.join()))
    stamps = prepare(data).directory.stat().st_mtime_ns
    assert child.exitcode == 0 and not folder.exists()
    assert prepare(data).directory.stat().st_mtime_ns == stamps
    assert "waiting until it ends" in capsys.readouterr().err


# --- long documents ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [1, 2, 3, 50, 10**6])
def test_parts_are_the_file(monkeypatch, part_bytes):
    monkeypatch.setattr(text_files, "PART_BYTES", part_bytes)
    parts = list(numbered_parts(arguments(text_files=["long.txt"])))
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
        whole = splitting.Piece("train", "x", text, True, True, [0])
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
    first = splitting.Piece("train", "x", "a b c " * 9, True, False, [0])
    rest = first._replace(text="d e f", starts=False, ends=True)
    whole = first._replace(text="a b c " * 9 + "d e f", ends=True)
    assert list(encodable(iter([first, rest]), None, limit=5)) == [whole]


def test_sizes_of_parts_and_pieces_change_no_token(monkeypatch):
    Path("texts").mkdir()
    for number in range(5):
        Path(f"texts/{number}.txt").write_text(prose(number, words=200), encoding="utf-8")
    sources = ({"text_files": ["texts"]}, {"text_files": ["texts"], **BY_DOCUMENTS}, {"text_files": ["long.txt"]})
    for name, source in enumerate(sources):
        monkeypatch.setattr(text_files, "PART_BYTES", 10**6)
        monkeypatch.setattr(splitting, "PIECE_CHARACTERS", 10**6)
        whole = prepared(f"whole-{name}", **source)
        for part_bytes, piece_characters in ((7, 100), (100, 7), (1000, 1000)):
            monkeypatch.setattr(text_files, "PART_BYTES", part_bytes)
            monkeypatch.setattr(splitting, "PIECE_CHARACTERS", piece_characters)
            assert prepared(f"{part_bytes}-{name}", **source) == whole
        whole_texts = [text for _, text in documents(arguments(**source))]
        assert every_text(f"whole-{name}").count("<|endoftext|>") == len(whole_texts)


# --- parquet, as the Hub's data sets are ------------------------------------------------------------------------------


def fineweb(folder: str, files: int = 3, rows: int = 40) -> list[str]:
    """Write a folder of shards with the columns of FineWeb-Edu, and return the texts."""
    Path(folder).mkdir()
    texts = [f"{prose(number, words=8)} {number}" for number in range(files * rows)]
    for index in range(files):
        part = texts[index * rows : (index + 1) * rows]
        columns = {
            "id": [f"<urn:uuid:{index}-{row}>" for row in range(rows)],
            "dump": ["CC-MAIN-2024-10"] * rows,
            "url": [f"https://example.org/{index}/{row}" for row in range(rows)],
            "language_score": [0.9] * rows,
            "token_count": list(range(rows)),
        }
        write_parquet(f"{folder}/train-{index:05d}-of-{files:05d}.parquet", part, row_group_size=16, **columns)
    return texts


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
        text = corpus.tokenizer.decode(tokens.window(0, len(tokens)).tolist())
        assert text.split("<|endoftext|>")[:-1] == [text for text, held in zip(texts, held_out, strict=True) if held]
    assert by_folder.manifest["splits"] == by_files.manifest["splits"]
    assert not any(Path().rglob("*.arrow"))  # no second copy


def places(data) -> list[tuple]:
    return [(part.number, part.text, tuple(part.place)) for part in numbered_parts(data) if part.ends]


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
        bookmark = Bookmark(count, list(whole[count - 1][2]))
        rest = [(part.number, part.text, tuple(part.place)) for part in numbered_parts(data, bookmark) if part.ends]
        assert rest[: len(whole) - count] == whole[count:]


def test_row_groups_before_the_bookmark_are_not_read(monkeypatch):
    read, iter_batches = [], pq.ParquetFile.iter_batches

    def noted(self, *args, row_groups, **kwargs):
        read.extend(row_groups)
        return iter_batches(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    list(numbered_parts(arguments(data_files=["rows.parquet"]), Bookmark(20, [0, 19])))  # of 7 rows each
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
    with pytest.raises(UserError, match=r"=.*p1\.parquet': can not be read \(.*--on_bad_file skip$") as refusal:
        prepared("x", **source)
    assert "\n" not in str(refusal.value) and not Path("x").exists()
    corpus = prepare(arguments(data_dir="x", on_bad_file="skip", **source))
    text = every_text("x")
    assert [text.count(f"file {index} row") for index in range(3)] == [20, kept, 20]
    ((name, why),) = corpus.manifest["left_out"].items()
    assert name.endswith("p1.parquet") and f"from row {kept} on" in why
    assert capsys.readouterr().err.count("left out: ") == 1


def test_a_bad_file_that_stopped_the_run_may_be_left_out_as_it_goes_on(monkeypatch, capsys):
    damaged("flipped byte")
    source = BY_DOCUMENTS | {"data_files": ["p*.parquet"], "tokenizer": "byte", "tokenizer_vocab_size": None}
    unbroken = prepared("unbroken", on_bad_file="skip", **source)
    monkeypatch.setattr(preparation, "SAVE_SECONDS", 0)
    with pytest.raises(UserError, match=r"p1\.parquet': can not be read"):
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
    with pytest.raises(UserError, match=r"rows.parquet': row 0 holds int in 'n', not text; name another column"):
        prepared("x", data_files=["rows.parquet"], text_column="n")


def test_a_split_that_a_folder_lacks():
    fineweb("fineweb", files=1)
    with pytest.raises(UserError, match=r"dataset_split 'dev': choose from train\. It is of dataset='fineweb'\.$"):
        prepared("x", dataset="fineweb", dataset_split="dev")


def test_a_hub_id_without_a_network_points_to_data_files():
    with pytest.raises(UserError) as refusal:
        prepared("x", dataset="Skylion007/openwebtext", tokenizer="byte", tokenizer_vocab_size=None)
    message = str(refusal.value)
    assert message.startswith("dataset='Skylion007/openwebtext': can not be loaded (") and "\n" not in message
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
        list(documents(arguments(dataset="someone/x")))
    assert calls == [None, "refs/convert/parquet"]


# --- disk, progress, ranks --------------------------------------------------------------------------------------------


def test_sizes_are_known_before_reading():
    texts = fineweb("fineweb")
    size = sum(len(text.encode()) for text in texts)
    for source in ({"dataset": "fineweb"}, {"data_files": ["fineweb/*.parquet"]}):
        known = size_of_sources(arguments(**source))
        assert known.documents == len(texts) and 0.9 * size < known.bytes < 1.5 * size
    long = Path("long.txt").stat().st_size
    assert size_of_sources(arguments(text_files=["long.txt"])) == (1, long)
    mixture = [{"dataset": "fineweb", "weight": 3}, {"text_files": "long.txt", "weight": 1}]
    assert size_of_sources(arguments(mixture=mixture)).documents == 160
    assert size_of_sources(arguments(mixture=mixture)).bytes == pytest.approx(size + 40 * long, rel=0.2)


@pytest.mark.parametrize("source", [{"text_files": ["long.txt"]}, {"data_files": ["rows.parquet"], **BY_DOCUMENTS}])
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(source, monkeypatch):
    import shutil

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"data_dir: the disk of \. is full: at least 0\.0 MB are needed and"):
        prepared("x", **source)
    assert [path for path in Path().iterdir() if path.name.lstrip(".").startswith("x")] == []


def test_a_line_a_minute_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(preparation, "REPORT_SECONDS", 0)
    prepared("x", data_files=["rows.parquet"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3 and all(line.startswith("prepare: ") and line.endswith("a minute left") for line in lines)
    line = progress_line(12_345, 2_000_000_000, 5_000_000_000, "900 documents/s", 5e6)
    assert line == "prepare: 12,345 documents, 2,000 of about 5,000 MB; 900 documents/s, 5.0 MB/s, about 10 min left"
    assert progress_line(1, 1, None, "1 documents/s", 1.0).endswith("1 documents/s, 0.0 MB/s")


def test_other_ranks_are_silent(monkeypatch, capsys):
    say("one")
    monkeypatch.setenv("RANK", "1")
    say("two")
    prepared("x", text_files=["long.txt"], **BY_DOCUMENTS)
    prepared("x", text_files=["long.txt"], **BY_DOCUMENTS)
    assert capsys.readouterr() == ("", "one\n")


def test_workers_end_with_their_parent():
    """A parent that is killed leaves no worker behind, and so no lock."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def parent():
        pieces = (splitting.Piece("train", "x", "word " * 200, True, True, [n]) for n in range(10**9))
        batches = workers.encode_in_order(pieces, build_tokenizer("byte"), "<u2", 2)
        next(batches)
        writer.send([child.pid for child in multiprocessing.active_children()])
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(parent) == -signal.SIGKILL
    pids = reader.recv()
    assert len(pids) == 2
    for _ in range(200):  # they look for their parent twice a second
        if not any(map(is_alive, pids)):
            break
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


def is_alive(pid: int) -> bool:
    with suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False
