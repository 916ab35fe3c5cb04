"""A run that goes on goes on with the inputs that it began with, or not at all."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from inference import evaluate
from training import pretrain, resume
from training.data.corpus import text_digest
from training.data.tokenizers import add_nothing, build_tokenizer, encoding_hash

from .tiny_runs import TEXT, contents, grow, refused, same_weights, tiny_argv, write_text


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A text, its tokens and a finished run with checkpoints at 4 and 8; tests copy it."""
    folder = tmp_path_factory.mktemp("inputs")
    grow(folder)
    return folder


def edit_recipe(home: Path, old: str, new: str) -> None:
    """Change the run's recipe as a person would, without the hash on top."""
    recipe = home / "run" / "recipe.yaml"
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("# sha256")]
    text = "\n".join(lines) + "\n"
    assert old in text
    recipe.write_text(text.replace(old, new))


@pytest.fixture
def copy(home, tmp_path, monkeypatch) -> Path:
    """The same, with its tokens gone; the current directory."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    edit_recipe(tmp_path / "home", str(home), str(tmp_path / "home"))
    shutil.rmtree("corpora")
    return tmp_path / "home"


def test_the_same_text_prepared_again_goes_on(copy, home) -> None:
    with contextlib.chdir(copy):
        resume.main(["run", "--checkpoint", "checkpoint-4"])
    assert same_weights(copy / "run" / "checkpoint-8", home / "run" / "checkpoint-8")


@pytest.mark.parametrize(
    ("text", "named"),
    [(TEXT[::-1], "the text"), (TEXT + "é", "the text"), (None, "text.txt")],
    ids=["another text", "another alphabet", "no text"],
)
def test_another_text_is_refused_and_nothing_is_written(copy, text: str | None, named: str) -> None:
    write_text(copy, text) if text else (copy / "text.txt").unlink()
    before = contents(copy)
    assert named in refused(resume.main, "run", "--max_steps", "9")
    assert contents(copy) == before


def test_other_tokens_in_the_place_of_its_own_are_refused(copy) -> None:
    write_text(copy, TEXT[::-1])
    pretrain.main(tiny_argv("--max_steps", "1", "--data_dir", "other", name="other-run"))
    (copy / "other").rename(copy / "corpora")
    held = re.search("data_dir: .*/(.*)", (copy / "run" / "recipe.yaml").read_text())[1]
    edit_recipe(copy, f"corpora/{held}", "corpora")
    assert "the text, the train tokens" in refused(resume.main, "run", "--max_steps", "9")
    assert "the text, the train tokens" in refused(evaluate.main, "run")


def test_another_rule_of_splitting_is_refused(copy) -> None:
    edit_recipe(copy, "validation_fraction: 0.1", "validation_fraction: 0.5")
    assert "the validation split" in refused(resume.main, "run", "--max_steps", "9")
    assert not Path("corpora").exists()


def test_a_damaged_record_is_refused(copy) -> None:
    (copy / "run" / "inputs.json").write_text('{"the text": "ab')
    assert "inputs.json is damaged" in refused(resume.main, "run", "--max_steps", "9")


def test_a_text_is_known_by_what_it_holds_and_not_by_where_it_lies() -> None:
    def known(path: str, digest: str) -> str | None:
        return text_digest({"kind": "text_files", "files": [{"path": path, "sha256": digest}]})

    assert known("a/x.txt", "1") == known("b/x.txt", "1") != known("a/x.txt", "2")
    assert text_digest({"kind": "dataset", "revision": None}) is None


def test_a_directory_that_holds_another_runs_recipe_is_not_overwritten(copy) -> None:
    young = copy / "young"
    young.mkdir()
    shutil.copy(copy / "run" / "recipe.yaml", young)
    before = contents(copy)
    assert "acorn resume young" in refused(pretrain.main, *tiny_argv(name="young"))
    assert contents(copy) == before


def test_what_travels_with_a_model_encodes_as_before() -> None:
    tokenizer = build_tokenizer("byte")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    before = encoding_hash(tokenizer)
    add_nothing(tokenizer)
    assert encoding_hash(tokenizer) == before != encoding_hash(build_tokenizer("char", lambda: iter(["ab"])))
