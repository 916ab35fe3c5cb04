"""`acorn export --format onnx` in ONNX Runtime: greedy text of every variant, with a cache, token by token."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from inference import export
from inference.formats.onnx import OBSTACLES, opened, write_onnx
from training.data.tokenizers import build_tokenizer
from training.system.errors import UserError

from .tiny_runs import refused
from .variants import VARIANTS, WITHOUT_KEYS, random_model, tiny_config

REFUSED = {  # variant: the field that stands in the way
    "rope_dynamic": "rope_parameters",
    "rope_dynamic_past_context": "rope_parameters",
    "kv_quantization": "kv_quantization",
    "kv_quantization_mixed_layers": "kv_quantization",
    "latent": "kv_lora_rank",
    "latent_shared_sliding": "kv_lora_rank",
    "memory": "memory_length",
    "bigrams": "bigram_vocab_size",
    "sliding_window_two": "sliding_window",
    **dict.fromkeys(sorted(WITHOUT_KEYS), "layer_types"),
}


def greedy(step, prompt: list[int], tokens: int) -> list[int]:
    """The prompt and the most likely tokens after it, by a function from new ids to logits."""
    ids, new = list(prompt), list(prompt)
    for _ in range(tokens):
        new = [int(step(torch.tensor([new]).numpy())[0, -1].argmax())]
        ids += new
    return ids


@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_in_the_way(name: str) -> None:
    config = tiny_config(**VARIANTS[name])
    found = [field for field, (in_the_way, _) in OBSTACLES.items() if in_the_way(config)]
    assert found == ([REFUSED[name]] if name in REFUSED else [])


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in REFUSED], ids=str)
@pytest.mark.clients
@pytest.mark.slow
@torch.no_grad()
def test_greedy_text(name: str, tmp_path) -> None:
    """Both are past the window of those that slide; only the graph keeps a cache."""
    model = random_model(tiny_config(**VARIANTS[name]))
    printed = write_onnx(name, model, None, tmp_path)
    assert printed[0].startswith("largest logit difference")
    for prompt in ([7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]):
        wanted = list(prompt)
        for _ in range(20):
            wanted.append(int(model(torch.tensor([wanted]), use_cache=False).logits[0, -1].argmax()))
        assert greedy(opened(tmp_path / "model.onnx", model.config), prompt, 20) == wanted


@pytest.mark.clients
@pytest.mark.slow
@torch.no_grad()
def test_the_verb_and_the_directory(tmp_path, capsys) -> None:
    from transformers.exporters import ExportedModel

    tokenizer = build_tokenizer("byte")
    model = random_model(tiny_config(vocab_size=257, **VARIANTS["sliding"]))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = tmp_path / "made"
    export.main([str(tmp_path / "model"), str(made), "--format", "onnx"])
    assert f"{made} is written" in capsys.readouterr().out
    files = {path.name for path in made.iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", "tokenizer.json"} <= files
    assert json.loads((made / "config.json").read_text())["sliding_window"] == 5
    again = ExportedModel.from_pretrained(made, trust_remote_code=True)
    assert again.config.sliding_window == 5
    ids = torch.randint(257, (3, 9))
    step = opened(made / "model.onnx", model.config)
    torch.testing.assert_close(torch.tensor(step(ids[:1].numpy())), model(ids[:1]).logits, rtol=1e-4, atol=1e-4)
    assert "already exists" in refused(export.main, str(tmp_path / "model"), str(made), "--format", "onnx")


@pytest.mark.clients
@pytest.mark.slow
@torch.no_grad()
def test_readme_snippet(tmp_path, monkeypatch, capsys) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "onnxruntime" in code)
    model, tokenizer = random_model(tiny_config(vocab_size=257, **VARIANTS["modern"])), build_tokenizer("byte")
    (tmp_path / "models/onnx").mkdir(parents=True)
    write_onnx("modern", model, tokenizer, tmp_path / "models/onnx")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    prompt = torch.tensor([tokenizer("def ")["input_ids"]])
    wanted = model.generate(prompt, max_new_tokens=60, do_sample=False, eos_token_id=None)[0]
    assert capsys.readouterr().out == tokenizer.decode(wanted, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field(name: str, tmp_path) -> None:
    with pytest.raises(UserError, match=rf"ONNX cannot hold {REFUSED[name]}="):
        write_onnx(name, random_model(tiny_config(**VARIANTS[name])), None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_context_that_is_too_small(tmp_path) -> None:
    with pytest.raises(UserError, match="max_position_embeddings=3 "):
        write_onnx("small", random_model(tiny_config(max_position_embeddings=3)), None, tmp_path)


def test_old_transformers_and_missing_packages(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(export, "NEEDS", {"onnx": []})
    monkeypatch.setattr(transformers, "__version__", "5.23.0")
    line = refused(export.main, str(tmp_path / "model"), str(tmp_path / "made"), "--format", "onnx")
    assert line == "--format onnx: needs transformers 5.24 or later, and 5.23.0 is installed; upgrade it"
    monkeypatch.setattr(export, "NEEDS", {"onnx": ["json", "not_there"]})
    line = refused(export.main, str(tmp_path / "model"), str(tmp_path / "made"), "--format", "onnx")
    assert line == "--format onnx: needs not_there: .venv/bin/pip install -e '.[onnx]'"
    assert not (tmp_path / "made").exists()
