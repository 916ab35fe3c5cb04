"""Preparing at scale: any number of processes, any kill and any part size give the same bytes; bad files are named."""

import json
import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from training.data import encoding, preparation
from training.data.corpus import FORMAT_VERSION
from training.data.documents import Document, Position
from training.data.preparation import building_folder, describe, prepare, progress_line
from training.data.sources import open_source
from training.data.tokenizers import build_tokenizer
from training.system.errors import UserError, log
from training.system.files import digest
from training.system.lock import locked

from .small_corpora import (
    BY_DOCUMENTS,
    arguments,
    fineweb,
    in_a_process,
    killed_after,
    prepared,
    prose,
    small_folder,
    write_parquet,
)
from .tiny_runs import contents


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    small_folder(tmp_path, monkeypatch)


# --- any number of processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [{"text_files": ["long.txt"]}, {"data_files": ["rows.parquet"], **BY_DOCUMENTS}])
def test_the_result_does_not_depend_on_the_number_of_processes(source, monkeypatch):
    one = prepared("one", **source)
    assert len([name for name in one if name.startswith("train-")]) > 2
    assert prepared("two", num_proc=2, **source) == one
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 150)
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

    monkeypatch.setattr(encoding, "encode_batch", die)
    with pytest.raises(UserError, match="num_proc=2: one of the processes was ended from outside"):
        prepared("x", data_files=["rows.parquet"], num_proc=2)


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
    encoded, encode = [], encoding.encode_batch

    def noted(tokenizer, dtype, batch):
        encoded.extend(stretch.text for stretch in batch)
        return encode(tokenizer, dtype, batch)

    monkeypatch.setattr(encoding, "encode_batch", noted)
    prepared("unbroken", text_files=["long.txt"])
    whole, encoded[:] = list(encoded), []
    killed_after(3, data_dir="broken", text_files=["long.txt"])
    prepared("broken", text_files=["long.txt"])
    assert encoded and encoded == whole[-len(encoded) :] and len(whole) - len(encoded) >= 3 * 7  # of at most 100


def test_ctrl_c_keeps_what_is_done_and_says_so(monkeypatch, capsys):
    after, count = Position.after, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 25:
            raise KeyboardInterrupt
        return after(*args)

    monkeypatch.setattr(preparation, "SAVE_SECONDS", 0)
    monkeypatch.setattr(Position, "after", interrupted)
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
    return digest([FORMAT_VERSION, describe(data)])


def test_a_second_process_waits_and_takes_over_from_a_dead_one(monkeypatch, capsys):
    monkeypatch.setattr(preparation, "LOCK_SECONDS", 0.05)
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
    monkeypatch.setattr(preparation.time, "sleep", lambda seconds: (child.kill(), child.join()))  # it dies as we wait
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
        open_source = preparation.open_source

        def slow(*args):
            ready.set()
            done.wait()
            return open_source(*args)

        preparation.open_source = slow
        prepare(data)

    child = context.Process(target=first, daemon=True)
    child.start()
    ready.wait()
    monkeypatch.setattr(preparation.time, "sleep", lambda seconds: (done.set(), child.join()))
    stamps = prepare(data).directory.stat().st_mtime_ns
    assert child.exitcode == 0 and not folder.exists()
    assert prepare(data).directory.stat().st_mtime_ns == stamps
    assert "waiting until it ends" in capsys.readouterr().err


# --- disk, progress, ranks --------------------------------------------------------------------------------------------


def test_sizes_are_known_before_reading():
    texts = fineweb("fineweb")
    size = sum(len(text.encode()) for text in texts)
    for source in ({"dataset": "fineweb"}, {"data_files": ["fineweb/*.parquet"]}):
        known = open_source(arguments(**source)).size()
        assert known.documents == len(texts) and 0.9 * size < known.bytes < 1.5 * size
    long = Path("long.txt").stat().st_size
    assert open_source(arguments(text_files=["long.txt"])).size() == (1, long)
    mixture = [{"dataset": "fineweb", "weight": 3}, {"text_files": "long.txt", "weight": 1}]
    assert open_source(arguments(mixture=mixture)).size().documents == 160
    assert open_source(arguments(mixture=mixture)).size().bytes == pytest.approx(size + 40 * long, rel=0.2)


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
    log("one")
    monkeypatch.setenv("RANK", "1")
    log("two")
    prepared("x", text_files=["long.txt"], **BY_DOCUMENTS)
    prepared("x", text_files=["long.txt"], **BY_DOCUMENTS)
    assert capsys.readouterr() == ("", "one\n")


def test_workers_end_with_their_parent():
    """A parent that is killed leaves no worker behind, and so no lock."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def parent():
        documents = (Document("x", "word " * 200, [n]) for n in range(10**9))
        batches = encoding.encode_in_order(documents, build_tokenizer("byte"), "<u2", 2)
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
