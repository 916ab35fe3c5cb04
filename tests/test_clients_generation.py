"""Clients that generate from an Acorn directory: each in a process where nothing of Acorn is installed."""

import pytest

from .client_runs import run_client
from .tiny_runs import grow

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("more", [(), pytest.param(("quanto",), marks=pytest.mark.slow)], ids=["hqq", "quanto"])
def test_transformers_own_ways_to_generate(more: tuple[str, ...], grown, tmp_path) -> None:
    draft = grow(
        grown.parent, *"--tokenizer byte --n_layer 1 --block_size 64 --max_steps 8".split(), name=f"draft-{len(more)}"
    )
    facts = run_client("generation", grown, draft, *more, cwd=tmp_path)
    assert facts["tokens"] > 20
    assert "requires a cache that can be cropped" in facts.pop("quantized and assisted")
    ways = {name: value for name, value in facts.items() if name != "tokens"}
    assert ways.pop("hqq, 8 bits") == 1
    assert ways.pop("hqq, 4 bits") > 0.5
    assert not more or ways.pop("quanto, 4 bits") > 0.5
    assert ways == dict.fromkeys(("static", "assisted", "prompt lookup", "pipeline", "AutoModel", "torch.export"), True)


def test_generate_batch(grown, tmp_path) -> None:
    assert run_client("continuous", grown, cwd=tmp_path) == {"same": True, "requests": 10}


def test_quantized_weights(grown, tmp_path) -> None:
    facts = run_client("quantized_weights", grown, cwd=tmp_path)
    assert facts["torchao"]["kinds"] == ["Int8Tensor", "Linear"]
    assert facts["quanto"]["kinds"] == ["QLinear", "WeightQBytesTensor"]
    for name, fact in facts.items():
        assert 0 < fact["off"] < 0.02, name
        assert fact["tokens"] == 10
