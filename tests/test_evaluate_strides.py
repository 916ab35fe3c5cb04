"""`acorn evaluate --stride`, `--by_position` and `--data_dir`, against a few lines of transformers alone."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import acorn
from finetune.data import Example
from finetune.packing import ExampleRows
from inference.measuring.by_position import position_rows
from training.data.dataset import EvaluationRows, TokenArray
from training.loop.evaluation import PositionSums, evaluate_rows

from .test_finetune import TEXT, tune
from .tiny_bases import CONTEXT, our_model, save, stock_model
from .tiny_runs import grow, refused, write_text

WORDS = "the quick brown fox jumps over a lazy dog, and how vexingly quick daft zebras jump " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two bases, a run of pretraining, an adapter, and a text."""
    place = tmp_path_factory.mktemp("strides")
    grow(place)
    save(stock_model(), place / "gpt2")
    save(our_model(), place / "gpt")
    write_text(place, WORDS, "words.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tune(place, "gpt2", "--max_new_tokens", "0", *TEXT, name="adapter")
    return place


@pytest.fixture
def figures(folder, monkeypatch, capsys):
    """`figures(*argv) -> dict`: the last line of `acorn evaluate …`."""
    monkeypatch.chdir(folder)

    def call(*argv: str) -> dict:
        capsys.readouterr()
        acorn.call_verb(["evaluate", *argv])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@torch.no_grad()
def by_windows(model, ids: torch.Tensor, context: int, stride: int) -> tuple[list[float], list[int]]:
    """Nats of each predicted token and the context it had, by the sliding window of transformers' guide."""
    nats, seen, done = [], [], 1
    for start in range(0, len(ids) - 1, stride):
        window = ids[start : start + context + 1]
        losses = torch.nn.functional.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="none")
        fresh = start + len(window) - done
        nats += losses[len(losses) - fresh :].tolist()
        seen += range(len(losses) - fresh + 1, len(losses) + 1)
        done += fresh
        if done == len(ids):
            return nats, seen
    raise AssertionError("the windows did not reach the end")


@pytest.mark.parametrize("name", ["gpt2", "gpt"])
@pytest.mark.parametrize("stride", [1, 7, 40, 63, CONTEXT])
def test_each_token_counts_once_and_has_its_context(figures, name: str, stride: int) -> None:
    found = figures(name, "--text_files", "words.txt", "--stride", str(stride), "--per_device_eval_batch_size", "3")
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = torch.tensor([*tokenizer(WORDS)["input_ids"], tokenizer.eos_token_id])
    nats, seen = by_windows(AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True), ids, CONTEXT, stride)
    assert (found["tokens"], found["bytes"]) == (len(nats), len(WORDS)) == (len(ids) - 1, len(WORDS))
    assert min(seen[CONTEXT:]) == CONTEXT - stride + 1
    assert found["loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-6)


def test_a_stride_of_the_whole_sequence_changes_nothing(figures, folder) -> None:
    for name, size in (("run", 16), ("adapter", CONTEXT)):
        plain = figures(name, "--text_files", "words.txt", "--block_size", str(size))
        assert figures(name, "--text_files", "words.txt", "--block_size", str(size), "--stride", str(size)) == plain
        assert figures(name, "--text_files", "words.txt", "--block_size", str(size), "--stride", "5") != plain
    assert figures("run", "--stride", "16") == figures("run")
    assert figures("run", "--stride", "4")["tokens"] == figures("run")["tokens"]


@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 24, 25, 33, 60])
def test_rows_of_a_text_of_any_length(tiny_model, length: int) -> None:
    model, ids = tiny_model(), torch.randint(61, (length,), generator=torch.Generator().manual_seed(length))
    for stride in (1, 8, 16):
        rows, sums = EvaluationRows(TokenArray(ids.numpy()), 16, stride), PositionSums(16)
        found = evaluate_rows(model, rows, 1, 3, by_position=sums)
        nats, seen = by_windows(model, ids, 16, stride)
        assert found["loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-6)
        assert sums.sums[2].tolist() == [seen.count(context) for context in range(1, 17)]
        expected = [sum(n for n, s in zip(nats, seen, strict=True) if s == context) for context in range(1, 17)]
        assert sums.sums[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_loss_by_position_is_a_table_and_a_picture(figures, folder, capsys) -> None:
    found = figures("gpt", "--text_files", "words.txt", "--by_position", "positions.png", "--stride", "32")
    rows = found["by_position"]
    assert [(row["from_context"], row["to_context"]) for row in rows] == [
        (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64)
    ]  # fmt: skip
    assert sum(row["tokens"] for row in rows) == found["tokens"]
    mean = sum(row["loss"] * row["tokens"] for row in rows) / found["tokens"]
    assert mean == pytest.approx(found["loss"], rel=1e-6)
    with Image.open(folder / "positions.png") as picture:
        assert picture.size[0] > 600 and len(picture.convert("RGB").getcolors(2**24)) > 20
    acorn.call_verb(["evaluate", "gpt", "--text_files", "words.txt", "--by_position", "positions.png"])
    assert "33–64" in capsys.readouterr().err


def test_packed_documents_are_counted_from_their_own_beginning(tiny_model) -> None:
    examples = [Example(np.arange(length), np.ones(length, dtype=bool), "drawn") for length in (5, 5, 9)]
    rows, sums = ExampleRows(examples, 16, 0, packing=True), PositionSums(16)
    evaluate_rows(tiny_model(), rows, 1, 2, by_position=sums)
    assert sums.sums[2].tolist() == [3] * 4 + [1] * 4 + [0] * 8
    assert [row["tokens"] for row in position_rows(sums.sums)] == [3, 3, 6, 4]


def test_prepared_tokens_by_their_directory(figures, folder) -> None:
    corpus = str(next((folder / "corpora").iterdir()))
    assert figures("run", "--data_dir", corpus) == figures("run")
    train = figures("run", "--data_dir", corpus, "--split", "train")
    assert train["tokens"] > figures("run")["tokens"] and train["bytes"] > train["tokens"] / 2
    assert figures("run", "--data_dir", corpus, "--stride", "9") == figures("run", "--stride", "9")
    assert "the tokenizer is not the one" in refused(acorn.call_verb, "evaluate", "gpt", "--data_dir", corpus)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["run", "--stride", "0"], "stride=0: must be a whole number from 1"),
        (["run", "--stride", "-3"], "stride=-3"),
        (["run", "--stride", "17"], "stride=17: must be between 1 and the sequence length, 16"),
        (["run", "--stride", "9", "--block_size", "8"], "the sequence length, 8"),
        (["run", "--stride", "x"], "--stride: invalid int value"),
        (["adapter", "--stride", "8"], "stride=8: what this run held out are documents"),
        (["gpt"], "give --text_files, --dataset or --data_dir"),
        (["gpt", "--text_files", "empty.txt"], "empty.txt"),
        (["gpt", "--data_dir", "nowhere"], "nowhere"),
        (["gpt", "--data_dir", "run"], "manifest.json"),
        (["run", "--split", "train"], "--split: has no effect without --data_dir"),
        (["run", "--data_dir", "x", "--split", "test"], "choose from 'train', 'validation'"),
        (["run", "--data_dir", "x", "--text_files", "words.txt"], "--data_dir: cannot be combined with --text_files"),
        (["run", "--by_position", "positions.txt"], "--by_position=positions.txt: must end in .png"),
        (["run", "--by_position", "there/positions.png"], "there is no directory"),
        (["run", "--by_position", "folder.png"], "is a directory"),
        (["run", "--by_position", "words.txt/positions.png"], "there is no directory"),
        (["run", "--save", "words.txt/results.json"], "--save=words.txt/results.json"),
    ],
)
def test_what_is_refused(folder, monkeypatch, argv: list[str], named: str) -> None:
    monkeypatch.chdir(folder)
    write_text(folder, "", "empty.txt")
    (folder / "folder.png").mkdir(exist_ok=True)
    assert named in refused(acorn.call_verb, "evaluate", *argv)
