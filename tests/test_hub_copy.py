"""A saved model is whole: it loads and runs in a process where nothing of Acorn can be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .variants import VARIANTS, random_model, tiny_config

WITHOUT_ACORN = '''
import importlib, sys

class NoAcorn:
    """An editable installation puts Acorn on every path of the environment, so forbid it by name."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"acorn", "modeling", "training", "finetune", "inference"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoAcorn())
for name in ("acorn", "modeling", "training"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported: this process proves nothing")
'''

LOAD_ALL = """
import json, pathlib, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
wrong = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    expected = torch.load(folder / "expected.pt")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        base, base_report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        with torch.no_grad():
            checks = {
                "config class": type(config).__name__ == "GPTConfig",
                "model class": type(model).__name__ == "GPTForCausalLM",
                "base class": type(base).__name__ == "GPTModel",
                "loaded whole": not any(report.values()) and not base_report["missing_keys"],
                "logits": torch.equal(model(expected["ids"]).logits, expected["logits"]),
                "hidden states": torch.equal(base(expected["ids"]).last_hidden_state, expected["hidden_states"]),
            }
            if config.memory_length:
                grown = model.generate(expected["ids"], max_new_tokens=20, do_sample=False)
                checks["text past the context"] = torch.equal(grown, expected["grown"])
        wrong[folder.name] = [what for what, holds in checks.items() if not holds]
    except Exception as error:
        wrong[folder.name] = [repr(error)]
print(json.dumps(wrong))
"""

PIPELINE = """
import json, torch
from transformers import pipeline

torch.set_num_threads(1)
generate = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True, device="cpu")
prompts = ["a b c", "d"]
rows = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
print(json.dumps([row[0]["generated_text"] for row in rows]))
"""


def run_without_acorn(script: str, *arguments: Path, cwd: Path) -> object:
    """Run `script` in an isolated interpreter that knows no Acorn, and return the JSON it prints."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(cwd / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT_ACORN + script, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and `<|endoftext|>`, split at spaces."""
    words = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    end = {"eos_token": words[0], "pad_token": words[0]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **end)


@torch.no_grad()
def test_all_variants_load_where_acorn_is_not(ids: torch.Tensor, tmp_path: Path) -> None:
    for name, overrides in VARIANTS.items():
        model, folder = random_model(tiny_config(**overrides)), tmp_path / "saved" / name
        model.save_pretrained(folder)
        hidden_states = model.model(ids).last_hidden_state
        expected = {"ids": ids, "logits": model(ids).logits, "hidden_states": hidden_states}
        if model.config.memory_length:
            expected["grown"] = model.generate(ids, max_new_tokens=20, do_sample=False)
        torch.save(expected, folder / "expected.pt")
    wrong = run_without_acorn(LOAD_ALL, tmp_path / "saved", cwd=tmp_path)
    assert wrong == {name: [] for name in VARIANTS}


def test_a_pipeline_runs_where_acorn_is_not(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = tiny_config(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0)
    model = random_model(config)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    texts = run_without_acorn(PIPELINE, tmp_path / "saved", cwd=tmp_path)

    for prompt, text in zip(["a b c", "d"], texts, strict=True):
        prompt_ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(prompt_ids, max_new_tokens=5, do_sample=False)[0]
        generated = tokenizer.decode(expected[prompt_ids.shape[1] :])
        assert text.replace(" ", "") == (prompt + generated).replace(" ", "")  # spaces are the pipeline's own affair


@pytest.mark.parametrize("is_base", [False, True], ids=["causal_lm", "base_model"])
def test_the_saved_directory_holds_its_code(is_base: bool, tmp_path: Path) -> None:
    model = random_model(tiny_config())
    (model.model if is_base else model).save_pretrained(tmp_path)
    saved = {path.name for path in tmp_path.glob("*.py")}
    assert {"configuration_gpt.py", "modeling_gpt.py", "attention.py", "positions.py", "loss.py"} <= saved
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_gpt.GPTConfig",
        "AutoModel": "modeling_gpt.GPTModel",
        "AutoModelForCausalLM": "modeling_gpt.GPTForCausalLM",
    }
