"""`acorn convert … --num_key_value_heads N`: heads pooled into their means, and head counts that do not pool."""

import re
from pathlib import Path

import pytest
import torch

from inference import convert
from inference.formats.conversion import read_model
from modeling import GPTForCausalLM
from training.data.tokenizers import build_tokenizer
from training.model.pooling import pool_heads

from .foreign import stock_gpt2
from .tiny_runs import refused
from .variants import random_model, tiny_config

LINEAR = {"layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    random_model(tiny_config(vocab_size=257, position_encoding="rope", qk_norm=True)).save_pretrained(tmp_path / "src")
    build_tokenizer("byte").save_pretrained(tmp_path / "src")
    return tmp_path / "src"


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_pooled_head_is_the_mean_of_its_group(source: Path, tmp_path: Path, kv_heads: int, capsys) -> None:
    convert.main([str(source), str(tmp_path / "dst"), "--to", "acorn", "--num_key_value_heads", str(kv_heads)])
    printed = capsys.readouterr().out
    assert f"4 key and value heads became {kv_heads}" in printed
    assert "--model_name_or_path" in printed
    before, _ = read_model(str(source))
    after, tokenizer = read_model(str(tmp_path / "dst"))
    assert after.config.num_key_value_heads == kv_heads
    assert len(tokenizer) == 257
    for name, weight in before.state_dict().items():
        found = after.state_dict()[name]
        if ".k_proj." in name or ".v_proj." in name:
            heads = weight.unflatten(0, (4, 8))
            for group in range(kv_heads):
                own = heads[group * 4 // kv_heads : (group + 1) * 4 // kv_heads].mean(0)
                torch.testing.assert_close(found.unflatten(0, (kv_heads, 8))[group], own)
        else:
            assert torch.equal(found, weight)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"kv_sharing_modes": [None, "store"]}, LINEAR], ids=["shared", "linear"])
def test_heads_that_are_alike_lose_nothing(fields: dict, ids: torch.Tensor) -> None:
    model = random_model(tiny_config(num_key_value_heads=2, position_encoding="rope", **fields))
    pooled = pool_heads(model, 1)
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            linear, mean = getattr(layer.self_attn, name), getattr(pooled.model.layers[0].self_attn, name)
            assert mean.weight.shape[0] * 2 == linear.weight.shape[0]
            linear.weight.copy_(linear.weight[:8].repeat(2, 1))
            linear.bias.copy_(linear.bias[:8].repeat(2))
    torch.testing.assert_close(pool_heads(model, 1)(ids).logits, model(ids).logits, rtol=1e-4, atol=2e-5)


def test_the_pooled_model_is_one_of_its_own(ids: torch.Tensor) -> None:
    model = random_model(tiny_config(tie_word_embeddings=True))
    pooled = pool_heads(model, 2)
    assert type(pooled) is GPTForCausalLM
    assert pooled.lm_head.weight is pooled.model.embed_tokens.weight
    assert model.config.num_key_value_heads == 4
    pooled.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in pooled.parameters())


def test_a_gpt2_is_pooled_on_its_way(tmp_path: Path) -> None:
    stock_gpt2().save_pretrained(tmp_path / "gpt2")
    heads = read_model(str(tmp_path / "gpt2"))[0].config.num_attention_heads
    convert.main([str(tmp_path / "gpt2"), str(tmp_path / "dst"), "--to", "acorn", "--num_key_value_heads", "1"])
    config = read_model(str(tmp_path / "dst"))[0].config
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, 1)


@pytest.mark.parametrize(
    ("count", "named"),
    [
        ("3", "num_key_value_heads=3: .* has 4, which do not pool into so many; choose one of 1, 2"),
        ("4", "num_key_value_heads=4: .*choose one of 1, 2"),
        ("8", "num_key_value_heads=8: .*choose one of 1, 2"),
        ("0", "num_key_value_heads=0: .*choose one of 1, 2"),
        ("-1", "num_key_value_heads=-1: .*choose one of 1, 2"),
    ],
)
def test_counts_that_do_not_pool(source: Path, tmp_path: Path, count: str, named: str) -> None:
    said = refused(convert.main, str(source), str(tmp_path / "dst"), "--to", "acorn", f"--num_key_value_heads={count}")
    assert re.search(named, said)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_key_value_heads": 1}, "has 1, which do not pool into so many; there is nothing to pool"),
        ({"position_encoding": "rope", "kv_lora_rank": 8}, "share a latent (kv_lora_rank=8) already"),
        ({**LINEAR, "linear_attention": "gated_delta"}, "linear_attention='gated_delta': gates"),
        ({**LINEAR, "linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim=3: gates"),
    ],
)
def test_heads_that_do_not_pool(fields: dict, named: str, tmp_path: Path) -> None:
    random_model(tiny_config(**fields)).save_pretrained(tmp_path / "src")
    said = refused(
        convert.main, str(tmp_path / "src"), str(tmp_path / "dst"), "--to", "acorn", "--num_key_value_heads", "1"
    )
    assert named in said
    assert not (tmp_path / "dst").exists()
