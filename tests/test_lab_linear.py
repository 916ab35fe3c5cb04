"""`acorn lab linear`: it grows what it compares, and its figures are those of the models."""

import json
from pathlib import Path

import pytest

from inference import lab
from inference.experiments import linear
from modeling import GPTConfig, GPTForCausalLM

from .tiny_runs import refused

MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32}
TINY = {
    "model": MODEL,
    "data": {"tokenizer": "byte", "validation_fraction": 0.2, "validation_by": "position"},
    "training": {"max_steps": 2, "eval_steps": 2, "tokens_per_step": 64, "bf16": False},
}


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    """A short text to train on, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(linear, "SMOKE", TINY)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{number} times {number} is {number**2}.\n" for number in range(300)))
    return path


def test_three_models_are_grown_and_compared(text: Path, capsys) -> None:
    lab.main(["linear", "--smoke", "--text_files", str(text), "--timed_tokens", "16", "--output_dir", "out"])
    _, *rows = map(json.loads, Path("out/results.jsonl").read_text().splitlines())
    assert [row["model"] for row in rows] == ["softmax", "plain", "gated"]
    heads, size, layers, context = 2, 8, 2, 32
    state, convolution = heads * size * size, 3 * 3 * heads * size
    bits = [layers * heads * 2 * size * context * 16, layers * (state + heads * size) * 32]
    assert [row["state_bits"] for row in rows] == [*bits, layers * (state + convolution) * 32]
    assert [row["smaller"] for row in rows] == [bits[0] / row["state_bits"] for row in rows]
    assert rows[0]["lost_percent"] == 0
    for row in rows:
        model = GPTForCausalLM.from_pretrained(Path("out/runs", row["model"]))
        assert row["parameters"] == model.num_parameters()
        assert row["low"] <= row["lost_percent"] <= row["high"]
        assert len(row["ms"]) == linear.PARTS and min(row["ms"]) > 0
    assert Path("out/linear.png").stat().st_size > 10_000
    assert "Type next: acorn generate out/runs/gated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--models", "gatd"], "gated"),
        (["--timed_tokens", "3"], "timed_tokens=3: must be at least 16"),
        (["--max_steps", "0"], "max_steps=0"),
        (["--text_files", "gone.txt"], "gone.txt"),
    ],
)
def test_refusals(text: Path, flags: list[str], why: str) -> None:
    assert why in refused(lab.main, "linear", "--smoke", *flags, "--output_dir", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize("name", linear.MODELS)
def test_every_model_is_one(name: str) -> None:
    for layers, width in ((4, 128), (2, 64)):
        shape = {"n_layer": layers, "n_embd": width, "n_head": 4, "vocab_size": 64, "linear_attention": "gated_delta"}
        config = GPTConfig(**{**shape, **linear.MODELS[name](layers, width)})
        assert config.head_dim * config.num_attention_heads == width
