"""Small texts and tables for the tests of preparing, and preparations that are killed in a process of their own."""

import multiprocessing
import os
import random
import signal
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from training.config.arguments import DataArguments
from training.data import encoding, files, preparation
from training.data.corpus import load_corpus
from training.data.preparation import prepare

from .tiny_runs import contents

BY_DOCUMENTS = {"validation_by": "documents", "validation_fraction": 0.2}


def prose(seed: int, words: int = 60) -> str:
    """Words, numbers, contractions and line breaks of several scripts, in an order that the seed decides."""
    draw = random.Random(seed)
    known = ["it's", "I'll", "été", "日本語", "🙂", "x" * 30, "1234", "--", "...", "\n\n", "\t", "  ", "Zürich", "ß"]
    return " ".join(draw.choice([*known, "".join(draw.choices(string.ascii_lowercase, k=5))]) for _ in range(words))


def small_folder(tmp_path, monkeypatch):
    """Work in an empty folder with a table of 30 documents and one long text, in batches and parts that are small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / f"{tmp_path.name}-cache")
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(files, "STRETCH_BYTES", 333)
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
    corpus = load_corpus(directory)
    splits = [corpus.tokens(split) for split in ("train", "validation")]
    return "".join(corpus.tokenizer.decode(tokens.sequence(0, len(tokens)).tolist()) for tokens in splits)


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
