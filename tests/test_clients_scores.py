"""Clients that score an Acorn directory: each in a process where nothing of Acorn is installed."""

import json
import math
from pathlib import Path

import pytest
import torch

from modeling import GPTForCausalLM
from training.data.tokenizers import load_tokenizer

from .client_runs import run_client

pytestmark = pytest.mark.clients
TEXTS = ["the quick brown fox jumps over a lazy dog", "and how vexingly quick daft zebras jump"]


@torch.no_grad()
def bits_per_byte(directory: Path) -> float:
    """Of all TEXTS, each by itself after the token that ends a text."""
    model, tokenizer = GPTForCausalLM.from_pretrained(directory).eval(), load_tokenizer(str(directory))
    nats = 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)


def test_lm_eval(grown, tmp_path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    facts = run_client("lm_eval_rolling", grown, texts, cwd=tmp_path)
    assert facts["bits per byte"] == pytest.approx(bits_per_byte(grown), rel=1e-5)


def test_evaluate(grown, tmp_path) -> None:
    facts = run_client("evaluator", grown, cwd=tmp_path)
    assert facts["letters"] == sum(map(len, facts["texts"])) > 20
    # evaluate 0.4.6 asks transformers 5 for its TensorFlow classes, whatever the model; goes when a later one does not
    assert facts["evaluator"] == "module transformers has no attribute TFPreTrainedModel"
