"""A finetuning run belongs to its base: what is gone, damaged or another is refused, and nothing is lost."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.model.loading import load_model_and_tokenizer
from training.system.errors import UserError

from .tiny_bases import save, stock_model
from .tiny_finetunes import CHAT, PAIRS, TEXT, facts, go_on, make_place, tune
from .tiny_runs import contents, write_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs lie, side by side."""
    return make_place(tmp_path_factory.mktemp("finetune"))


@pytest.fixture(scope="module")
def tuned(folder):
    """A finished LoRA run on a chat; tests copy it."""
    return tune(folder, "gpt2", *CHAT, name="tuned")


@pytest.fixture
def with_own_base(folder, tuned, tmp_path):
    """A finished run (a copy of `tuned`) beside a base of its own, in a place of its own."""
    for name in ("gpt2", "tuned"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "chat.txt", tmp_path)
    return tmp_path / "tuned"


def test_a_run_goes_on_on_its_own_base_or_not_at_all(with_own_base) -> None:
    other = stock_model()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 1
    save(other, with_own_base.parent / "gpt2")
    before = contents(with_own_base)
    with pytest.raises(UserError, match="the base model changed since the run began"):
        go_on(with_own_base, "--max_steps", "9")
    assert contents(with_own_base) == before
    for path in with_own_base.glob("checkpoint-*"):  # nor does it begin again
        shutil.rmtree(path)
    (with_own_base / "README.md").unlink()  # as if it had been killed before its first
    with pytest.raises(UserError, match="the base model changed since the run began"):
        go_on(with_own_base)


@pytest.mark.parametrize("name", ["finetune.json", "inputs.json", "recipe.yaml", "checkpoint-6/base_model.json"])
def test_damaged_small_files_are_one_line_before_any_step(with_own_base, name: str) -> None:
    path = with_own_base / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\xff")
    before = contents(with_own_base)
    with pytest.raises(UserError) as caught:
        go_on(with_own_base, "--max_steps", "9", *(["--checkpoint", "checkpoint-6"] if "/" in name else []))
    assert Path(name).name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(with_own_base) == before


def test_a_damaged_record_of_the_base_is_one_line(with_own_base) -> None:
    for name in ("base_model.json", "adapter_config.json"):
        whole = (with_own_base / name).read_bytes()
        for damaged in (whole[:-9], b"[]", b"\xff"):
            (with_own_base / name).write_bytes(damaged)
            with pytest.raises(UserError, match=rf"{name} is damaged|{name} names no base"):
                load_model_and_tokenizer(str(with_own_base))
        (with_own_base / name).write_bytes(whole)


def test_without_any_evaluation_there_is_no_report(with_own_base) -> None:
    for name in ("metrics.jsonl", "README.md"):
        (with_own_base / name).unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no evaluation"):
        go_on(with_own_base)


def test_without_its_facts_a_run_goes_on_all_the_same(with_own_base) -> None:
    (with_own_base / "finetune.json").unlink()
    go_on(with_own_base, "--max_steps", "7")
    assert facts(with_own_base)["adapter"] == "lora"


def test_a_base_that_is_gone_or_another_is_refused(folder, tmp_path) -> None:
    shutil.copytree(folder / "gpt2", tmp_path / "base")
    write_text(tmp_path)
    run = tune(tmp_path, "base", *TEXT, name="run")
    save(stock_model(n_layer=2).apply(lambda module: None), tmp_path / "same")
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(UserError, match=r"its base .*base is gone"):
        load_model_and_tokenizer(str(run))
    other = stock_model()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 1
    save(other, tmp_path / "base")
    with pytest.raises(UserError, match="is not the base it was trained on"):
        load_model_and_tokenizer(str(run))
    shutil.rmtree(tmp_path / "base")
    shutil.move(tmp_path / "moved", tmp_path / "base")
    load_model_and_tokenizer(str(run), dtype="bfloat16")  # the same base in half precision is the same base


def test_a_full_run_is_a_plain_model(folder) -> None:
    run = tune(folder, "gpt2", *PAIRS, "--adapter", "full", "--max_steps", "1", name="plain")
    assert type(AutoModelForCausalLM.from_pretrained(run)).__name__ == "GPT2LMHeadModel"
    assert not (run / "adapter_config.json").exists()
