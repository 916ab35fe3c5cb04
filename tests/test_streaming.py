"""A streamed text: rows that depend on their index alone, an exact resume, what validates, and clear refusals."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from shlex import split as words

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from training import pretrain, resume
from training.config.arguments import DataArguments
from training.data import streaming
from training.data.dataset import EvaluationRows
from training.data.sources import read_documents
from training.data.streaming import Mark, is_streamed, stream_corpus
from training.system.errors import UserError

from .tiny_runs import TEXT, checkpoints, go_on, latest, metrics, refused, same_weights, tiny_argv

CONTEXT, HELD = 16, 130
DOCUMENTS = [TEXT[place : place + 40 + place % 37] for place in range(0, 1500, 60)]
STREAMED = words(f"--text_files docs --streaming --validation_characters {HELD} --tokenizer byte")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where there are 25 short documents as text files, read in batches of about three."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming, "BATCH_CHARACTERS", 150)
    Path("docs").mkdir()
    for number, text in enumerate(DOCUMENTS):
        Path(f"docs/{number:03d}.txt").write_text(text)
    return tmp_path


def arguments(**changes) -> DataArguments:
    """What names the documents as a stream."""
    return replace(DataArguments(text_files=["docs"], streaming=True, validation_characters=HELD), **changes)


def expected_tokens(passes: int) -> np.ndarray:
    """The bytes of all documents, each followed by 256, less the first HELD; pass after pass."""
    ids = [[*text.encode(), 256] for text in DOCUMENTS]
    whole, ends = np.concatenate(ids), [held for held in (len(text) for text in DOCUMENTS)]
    before = int(np.searchsorted(np.cumsum(ends), HELD, side="right"))  # documents that are held out whole
    return np.tile(whole[HELD + before :], passes)


def windows(tokens: np.ndarray, rows) -> np.ndarray:
    return np.stack([tokens[row * CONTEXT : row * CONTEXT + CONTEXT + 1] for row in rows])


def read_rows(rows, indices) -> np.ndarray:
    """Inputs and the last label of rows, as [len(indices), CONTEXT + 1]; labels are the inputs shifted."""
    batch = rows.__getitems__(list(indices))
    for row in batch:
        assert row["input_ids"][1:].equal(row["shift_labels"][:-1])
    return np.stack([np.append(row["input_ids"].numpy(), row["shift_labels"][-1]) for row in batch])


# rows


def test_rows_are_the_text_in_order_pass_after_pass(folder) -> None:
    rows = stream_corpus(arguments()).tokens("train").training_rows(CONTEXT, 1, 250, "random")
    tokens = expected_tokens(3)
    assert len(tokens) > 250 * CONTEXT > 2 * len(expected_tokens(1))
    for start in range(0, 250, 10):
        np.testing.assert_array_equal(
            read_rows(rows, range(start, start + 10)), windows(tokens, range(start, start + 10))
        )


def test_a_row_depends_on_its_index_alone(folder) -> None:
    """Whatever was read before: backwards, far ahead, one twice, and a share of each batch as two processes have."""
    rows = stream_corpus(arguments()).tokens("train").training_rows(CONTEXT, 1, 250, "random")
    tokens = expected_tokens(3)
    for indices in ([140], [3, 4], [3], [90, 91, 20], *([4 * step + 2, 4 * step + 3] for step in range(20))):
        np.testing.assert_array_equal(read_rows(rows, indices), windows(tokens, indices))


def test_a_document_in_pieces_is_one_document(folder, monkeypatch) -> None:
    """A long text file comes in pieces; only the last one ends with the end-of-text token, and marks lie between."""
    monkeypatch.setattr("training.data.files.STRETCH_BYTES", 16)
    stream = stream_corpus(arguments()).tokens("train")
    rows = stream.training_rows(CONTEXT, 1, 250, "random")
    np.testing.assert_array_equal(read_rows(rows, range(100)), windows(expected_tokens(3), range(100)))
    inside = next(mark for mark in stream.marks if mark.position.stretches)
    again = stream_corpus(arguments()).tokens("train")
    again.know(inside)
    first = -(-inside.token // CONTEXT)
    read = read_rows(again.training_rows(CONTEXT, 1, 250, "random"), range(first, 100))
    np.testing.assert_array_equal(read, windows(expected_tokens(3), range(first, 100)))


def test_what_is_read_after_a_mark_is_read_from_there(folder, monkeypatch) -> None:
    """Documents before the mark are not encoded again."""
    stream = stream_corpus(arguments()).tokens("train")
    stream.training_rows(CONTEXT, 1, 250, "random").__getitems__(range(140))
    mark = Mark.from_json(json.loads(json.dumps(stream.mark_at(130 * CONTEXT).to_json())))
    assert mark.position.documents > 0 and 120 * CONTEXT < mark.token <= 130 * CONTEXT
    stream._pool.shutdown(cancel_futures=True)  # what it read ahead is not to be counted
    corpus, seen = stream_corpus(arguments()), []
    encode = streaming.encode_documents
    monkeypatch.setattr(
        streaming, "encode_documents", lambda t, texts, names: seen.extend(names) or encode(t, texts, names)
    )
    corpus.tokens("train").know(mark)
    rows = corpus.tokens("train").training_rows(CONTEXT, 1, 250, "random")
    np.testing.assert_array_equal(read_rows(rows, range(130, 134)), windows(expected_tokens(3), range(130, 134)))
    assert Path(seen[0]).name == f"{mark.position.documents:03d}.txt"


@pytest.mark.parametrize("held", [2, len(DOCUMENTS[0]), len(DOCUMENTS[0]) + len(DOCUMENTS[1]), 300])
def test_what_validates_is_the_beginning_and_never_trains(folder, held: int) -> None:
    corpus = stream_corpus(arguments(validation_characters=held))
    validation = corpus.tokens("validation")
    ids = validation.sequence(0, len(validation))
    assert bytes(ids[ids < 256].tolist()).decode() == "".join(DOCUMENTS)[:held]
    assert corpus.manifest["splits"]["validation"]["bytes"] == held
    assert len(EvaluationRows(validation, CONTEXT)) == -(-(len(ids) - 1) // CONTEXT)
    length = sum(map(len, DOCUMENTS)) + len(DOCUMENTS) - len(ids)
    once = corpus.tokens("train").read(0, 2 * length)
    assert once[:length].tolist() == once[length:].tolist()
    assert bytes(once[:length][once[:length] < 256].tolist()).decode() == "".join(DOCUMENTS)[held:]


def test_a_mixture_does_not_train_on_what_validates(folder) -> None:
    """A small source is drawn again and again; its documents that validate are left out each time."""
    Path("small").mkdir()
    for number in range(3):
        Path(f"small/{number}.txt").write_text(f"<small document {number}>")
    mixture = [{"text_files": ["docs"], "weight": 1}, {"text_files": ["small"], "weight": 1}]
    data = DataArguments(mixture=mixture, streaming=True, validation_characters=130, validation_by="documents")
    drawn = [document.text for document in read_documents(data)]
    corpus = stream_corpus(data)
    begin = corpus.tokens("train").held.position.documents
    held = [text for text in drawn[:begin] if text.startswith("<small")]
    assert held and not drawn[begin].startswith("<small"), "another seed or size is needed"
    assert drawn.count(held[0]) > 1
    trained = bytes(i for i in corpus.tokens("train").read(0, 5000).tolist() if i < 256).decode()
    assert held[0] not in trained
    others = {text for text in drawn if text.startswith("<small")} - set(held)
    assert all(text in trained for text in others)


# runs


def grow(name: str, *flags: str) -> Path:
    """Pretrain on the stream and return the run directory."""
    argv = [word for word in tiny_argv(name=name) if word not in ("--text_files", "text.txt")]
    pretrain.main(latest(*argv, *STREAMED, *words("--lr_scheduler_type constant_with_warmup"), *flags))
    return Path(name)


def test_a_resumed_run_equals_the_unbroken_one(folder, capsys) -> None:
    """In the third pass over the text, with dropout and accumulation, from two checkpoints one after the other."""
    flags = words("--max_steps 24 --eval_steps 6 --dropout 0.1 --gradient_accumulation_steps 2 --save_total_limit 9")
    unbroken = grow("unbroken", *flags)
    assert 2 * len(expected_tokens(1)) < 24 * 2 * 4 * CONTEXT
    assert "streaming text_files: the first 132 tokens (3 documents) validate" in capsys.readouterr().out
    assert not Path("corpora").exists()
    for step in (6, 18):
        run = folder / f"from-{step}"
        shutil.copytree(unbroken, run)
        for later in (kept for kept in checkpoints(run) if kept > step):
            shutil.rmtree(run / f"checkpoint-{later}")
        (run / "README.md").unlink()
        go_on(run)
        assert same_weights(run / "checkpoint-24", unbroken / "checkpoint-24")
        losses = [[row["train_loss"] for row in metrics(path) if row["step"] > step][-1] for path in (run, unbroken)]
        assert losses[0] == losses[1]


def test_a_run_goes_on_by_its_mark_and_refuses_another_text(folder) -> None:
    run = grow("run", "--max_steps", "8", "--save_total_limit", "9")
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["StreamPosition"]["args"]["mark"]
    assert saved["documents"] > 3 and saved["token"] <= 4 * 4 * CONTEXT
    changed = Path(f"docs/{saved['documents']:03d}.txt")
    changed.write_text("something else")
    message = refused(resume.main, "run", "--checkpoint", "checkpoint-4", "--max_steps", "9")
    assert "the text changed since the run began" in message
    (run / "inputs.json").unlink()  # of an Acorn that recorded none
    message = refused(resume.main, "run", "--checkpoint", "checkpoint-4", "--max_steps", "9")
    assert f"document {saved['documents']} of the text is not the one that it was" in message
    for path in sorted(Path("docs").iterdir())[saved["documents"] :]:
        path.unlink()
    assert "is not the one that it was" in refused(
        resume.main, "run", "--max_steps", "9", "--checkpoint", "checkpoint-4"
    )


def test_parquet_shards_go_on_without_reading_those_before(folder, monkeypatch) -> None:
    from training.data import rows as readers

    for shard in range(3):
        rows = {"text": [f"shard {shard} row {row} " + TEXT[row : row + 30] for row in range(10)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), f"{shard}.parquet")
    data = arguments(text_files=[], data_files=["*.parquet"])
    tokens = stream_corpus(data).tokens("train")
    whole = tokens.read(0, 1100).tolist()
    mark = tokens.mark_at(1000)
    assert mark.position.place[0] == 2, "the mark should lie in the last shard"
    tokens._pool.shutdown(cancel_futures=True)  # what it reads ahead is not to be counted
    opened, read = [], readers._parquet_rows
    again = stream_corpus(data).tokens("train")
    monkeypatch.setitem(readers.READERS, "parquet", lambda path, *rest: opened.append(str(path)) or read(path, *rest))
    again.know(mark)
    assert again.read(1000, 1100).tolist() == whole[1000:]
    assert opened[0] == "2.parquet"


# what is refused


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--tokenizer bpe", "tokenizer='bpe': is made from the whole text"),
        ("--tokenizer char", "acorn tokenizer"),
        ("--max_steps -1", "max_steps=-1: a stream does not know its length"),
        ("--validation_characters 1", "validation_characters=1: must be at least 2"),
        ("--validation_characters 100000", "the text has no more than"),
        ("--dataloader_num_workers 2", "dataloader_num_workers=2: a stream is read ahead by a thread"),
        ("--streaming false", f"validation_characters={HELD}: is for --streaming"),
        ("--text_files nowhere", "nowhere"),
    ],
)
def test_refusals(folder, flags: str, named: str) -> None:
    argv = [word for word in tiny_argv() if word not in ("--text_files", "text.txt")]
    assert named in refused(pretrain.main, *latest(*argv, *STREAMED, *words(flags)))
    assert not Path("run").exists() and not Path("corpora").exists()


def test_an_error_in_the_thread_is_the_same_error(folder) -> None:
    Path("docs/010.txt").write_bytes(b"\xff\xfe no text")
    tokens = stream_corpus(arguments()).tokens("train")
    with pytest.raises(UserError, match=r"010.txt.*is not UTF-8"):
        tokens.read(0, 2000)


def test_a_directory_for_the_tokens_means_preparation(folder) -> None:
    assert is_streamed(arguments())
    assert not is_streamed(arguments(data_dir="tokens"))
    argv = [word for word in tiny_argv() if word not in ("--text_files", "text.txt")]
    more = words("--text_files docs --streaming --tokenizer byte --data_dir tokens --max_steps 2")
    pretrain.main(latest(*argv, *more))
    assert Path("tokens/manifest.json").is_file()
