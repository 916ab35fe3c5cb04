"""`acorn evaluate` of finetuning runs: what they held out, as it was measured while they trained; and any text."""

import json

import pytest

import acorn

from .chat_fixture import chat_text
from .test_finetune import CHAT, PAIRS, TEXT, tune
from .tiny_bases import CONTEXT, our_model, save, stock_model
from .tiny_runs import metrics, refused, write_text

RUNS = {
    "chat": ("gpt2", "lora", CHAT),
    "text": ("gpt", "lora", TEXT),
    "pairs": ("gpt", "prompt", [*PAIRS, "--num_virtual_tokens", "20"]),
    "prefix": ("gpt", "prefix", [*TEXT, "--num_virtual_tokens", "20"]),
    "full": ("gpt2", "full", CHAT),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place with two bases and something of each kind to finetune them on."""
    place = tmp_path_factory.mktemp("evaluate")
    save(stock_model(), place / "gpt2")
    save(our_model(), place / "gpt")
    write_text(place)
    write_text(place, chat_text(), "chat.txt")
    pairs = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    (place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return place


SLOW = ("prefix", "full")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in RUNS])
def test_the_figures_are_those_of_the_run(folder, capsys, monkeypatch, name: str) -> None:
    monkeypatch.chdir(folder)
    base, adapter, data = RUNS[name]
    tune(folder, base, "--adapter", adapter, "--max_new_tokens", "0", *data, name=name)
    rows = {row["step"]: row for row in metrics(folder / name)}
    best = min((row for row in rows.values() if row["step"]), key=lambda row: row["eval_loss"])
    for where, row in ((name, best), (f"{name}/checkpoint-6", rows[6])):
        found = figures(capsys, where)
        assert found["loss"] == pytest.approx(row["eval_loss"], rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=1e-5)
    window = CONTEXT - 20 if adapter in ("prompt", "prefix") else CONTEXT
    assert figures(capsys, name, "--text_files", "text.txt", "--block_size", str(window))["tokens"] > 1000
    assert f"context, {window}" in refused(acorn.call_verb, "evaluate", name, "--block_size", str(window + 1))


def figures(capsys, *argv: str) -> dict:
    """The last line of `acorn evaluate …`."""
    capsys.readouterr()
    acorn.call_verb(["evaluate", *argv])
    return json.loads(capsys.readouterr().out.splitlines()[-1])
