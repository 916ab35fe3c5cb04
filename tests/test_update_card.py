"""`acorn evaluate --update_card`: results reach the card's metadata, and all else in it stays."""

import json
import math
import shutil
from argparse import Namespace

import pytest
from huggingface_hub import ModelCard

import acorn
from inference.measuring.card import text_results
from inference.measuring.texts import Measured, name_of
from training.share.model_card import CardFacts, add_results, model_card
from training.system.errors import UserError
from training.system.run_files import MANIFEST, verify

from .hub_server import card_errors
from .tiny_bases import save, stock_model
from .tiny_runs import checkpoints, contents, grow, refused, write_text

TEXT = "the quick brown fox jumps over a lazy dog, and how vexingly quick daft zebras jump"


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run, and a stock model."""
    place = tmp_path_factory.mktemp("card")
    grow(place)
    save(stock_model(), place / "gpt2")
    write_text(place, TEXT, "words.txt")
    return place


@pytest.fixture
def folder(grown, tmp_path, monkeypatch):
    """A copy of it, to write to."""
    shutil.copytree(grown, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(capsys, *argv: str) -> dict:
    capsys.readouterr()
    acorn.call_verb(["evaluate", *argv])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def read_card(directory) -> tuple[ModelCard, str]:
    text = (directory / "README.md").read_text(encoding="utf-8")
    assert card_errors(text) == []
    return ModelCard(text), text


def test_results_are_added_once_and_the_rest_stays(folder, capsys) -> None:
    before, _ = read_card(folder / "run")
    found = evaluate(capsys, "run", "--text_files", "words.txt", "--update_card")
    after, _ = read_card(folder / "run")
    assert after.text == before.text and after.data.license == before.data.license
    assert after.data.model_name == before.data.model_name
    assert after.data.eval_results[: len(before.data.eval_results)] == before.data.eval_results
    new = {result.metric_type: result for result in after.data.eval_results[len(before.data.eval_results) :]}
    assert {kind: result.metric_value for kind, result in new.items()} == pytest.approx(
        {"loss": found["loss"], "perplexity": found["perplexity"], "bits_per_byte": found["bits_per_byte"],
         "accuracy": found["token_accuracy"]}, abs=1e-6,
    )  # fmt: skip
    assert {result.dataset_name for result in new.values()} == {"words.txt"}
    evaluate(capsys, "run", "--text_files", "words.txt", "--update_card")
    assert read_card(folder / "run")[0].data.to_dict() == after.data.to_dict()
    acorn.call_verb(["evaluate", "run", "--text_files", "words.txt", "--stride", "4", "--update_card"])
    again = read_card(folder / "run")[0].data.eval_results
    assert len(again) == len(after.data.eval_results) + 4
    assert again[-1].metric_args == {"stride": 4}
    assert "acorn push run YOU/NAME --dry_run" in capsys.readouterr().err
    verify(folder / "run")
    assert capsys.readouterr().err == ""


def test_a_model_without_a_card_gets_one(folder, capsys) -> None:
    evaluate(capsys, "gpt2", "--text_files", "words.txt", "--update_card")
    card, text = read_card(folder / "gpt2")
    assert card.data.model_name == "gpt2" and len(card.data.eval_results) == 4
    assert "causal language model" in text


def test_a_card_that_a_manifest_lists_is_not_called_damaged(folder, capsys) -> None:
    manifest = json.loads((folder / "run" / MANIFEST).read_text())
    manifest["files"]["README.md"] = {"bytes": 1, "sha256": "0" * 64}
    (folder / "run" / MANIFEST).write_text(json.dumps(manifest))
    evaluate(capsys, "run", "--text_files", "words.txt", "--update_card")
    capsys.readouterr()
    verify(folder / "run")
    assert capsys.readouterr().err == ""


def test_what_somebody_wrote_is_kept() -> None:
    text = "---\ncustom: 3\nlicense: mit\ntags:\n- a\n---\n# Mine\n\nMy wörds.\n"
    card = ModelCard(
        add_results(text, "mine", ModelCard(model_card(CardFacts("m", "x.", metrics={"loss": 1.5}))).data.eval_results)
    )
    assert (card.data["custom"], card.data.license, card.data.tags, card.data.model_name) == (3, "mit", ["a"], "mine")
    assert card.text.strip() == "# Mine\n\nMy wörds."
    with pytest.raises(UserError, match=r"README\.md: the metadata on top"):
        add_results("---\na: [\n---\n", "mine", [])


@pytest.mark.parametrize(
    ("named", "kind", "name"),
    [
        ({"text_files": ["https://me:secret@x.org/a.txt?token=secret"]}, "text", "a.txt"),
        ({"text_files": ["/home/me/a.txt", "b.txt"]}, "text", "a.txt, b.txt"),
        ({"dataset": "roneneldan/TinyStories"}, "roneneldan/TinyStories", "roneneldan/TinyStories"),
        ({"dataset": "/home/me/stories"}, "text", "stories"),
        ({"dataset": "python-stdlib"}, "text", "python-stdlib"),
    ],
)
def test_a_card_tells_neither_secrets_nor_places(named: dict, kind: str, name: str) -> None:
    flags = {"text_files": [], "data_files": [], "dataset": None, "dataset_config": None, "dataset_split": "test"}
    flags = Namespace(**flags | {"block_size": None, "stride": 8, "bf16": False} | named)
    figures = {"loss": 1.0, "perplexity": math.inf, "bits_per_byte": 0.5, "token_accuracy": 0.25}
    results = text_results(flags, Measured([], 1, 1, name_of(flags)), figures)
    assert [result.metric_type for result in results] == ["loss", "bits_per_byte", "accuracy"]
    assert {(result.dataset_type, result.dataset_name) for result in results} == {(kind, name)}
    card = add_results(model_card(CardFacts("m", "A test.")), "m", results)
    assert card_errors(card) == [] and "secret" not in card and "/home" not in card


def test_what_is_refused_leaves_everything_as_it_was(folder, capsys) -> None:
    first = f"run/checkpoint-{checkpoints(folder / 'run')[0]}"
    before = contents(folder)
    words = ("--text_files", "words.txt", "--update_card")
    assert "is a checkpoint" in refused(acorn.call_verb, "evaluate", first, *words)
    assert "is no directory here" in refused(acorn.call_verb, "evaluate", "me/gpt", *words)
    assert "corpora" in refused(acorn.call_verb, "evaluate", "corpora", *words)
    assert contents(folder) == before
    (folder / "run" / "README.md").unlink()
    assert "is not finished" in refused(acorn.call_verb, "evaluate", "run", *words)
    assert not (folder / "run" / "README.md").exists()
    (folder / "gpt2" / "README.md").write_text("---\na: [\n---\n")
    assert "the metadata on top cannot be read" in refused(acorn.call_verb, "evaluate", "gpt2", *words)
