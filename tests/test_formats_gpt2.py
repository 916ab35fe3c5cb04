"""Stock GPT-2 in and out: logits equal for every option of its own, and for each variant of ours that it can hold."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from inference.formats import FORMATS
from inference.formats.base import open_source
from modeling import GPTForCausalLM
from training.system.errors import UserError

from .foreign import stock_gpt2
from .variants import VARIANTS, random_model, tiny_config

GPT2, ACORN = FORMATS["gpt2"], FORMATS["acorn"]
OPTIONS = {
    "gpt2": {},
    "gelu": {"activation_function": "gelu"},
    "gelu_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "swish": {"activation_function": "swish"},
    "untied": {"tie_word_embeddings": False},
    "narrow": {"n_inner": 40},
    "epsilon": {"layer_norm_epsilon": 0.1},
    "by_layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "upcast": {"reorder_and_upcast_attn": True},
}
HELD = {  # the variants of ours that stock GPT-2 can hold
    "gpt2",
    "sinusoidal",
    "no_positions",
    "layer_norm_no_gain",
    "layer_norm_no_gain_no_bias",
    "layer_norm_large_eps",
    "embedding_range",
    "gelu",
    "relu",
    "relu2",
    "silu",
    "odd_intermediate_size",
    "one_head",
    "grouped_query",
    "multi_query",
    "no_bias",
    "untied",
    "zero_head",
    "normal_residual_init",
    "zero_residual_init",
    "one_layer",
}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_there_and_back(name: str, tmp_path) -> None:
    stock = stock_gpt2(**OPTIONS[name])
    stock.save_pretrained(tmp_path / "stock")
    ids = torch.randint(257, (2, 24))
    ours = GPT2.to_acorn(GPT2.load(open_source(str(tmp_path / "stock"))))
    close(ours(ids).logits, stock(ids).logits)
    ACORN.write(ours, None, tmp_path / "ours", tmp_path / "ours")
    GPT2.write(GPTForCausalLM.from_pretrained(tmp_path / "ours"), None, tmp_path / "back", tmp_path / "back")
    close(GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_our_variants(name: str, ids, tmp_path) -> None:
    config = tiny_config(**VARIANTS[name])
    obstacles = GPT2.obstacles(config)
    assert (not obstacles) == (name in HELD)
    if obstacles:
        assert all(f"{getattr(config, line.split('=')[0])!r} (" in line for line in obstacles)
        return
    model = random_model(config)
    GPT2.write(model, None, tmp_path, tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # no code of ours is needed
    assert type(stock) is GPT2LMHeadModel
    close(stock(ids).logits, model(ids).logits)


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["as on the Hub", "with the head"])
@torch.no_grad()
def test_masks_that_older_versions_saved_are_no_weights(prefix: str, tmp_path) -> None:
    """transformers 2.9 to 4.29 kept its causal masks in the file, where OpenAI's models on the Hub have them still."""
    stock, ids = stock_gpt2(), torch.randint(257, (2, 24))
    stock.save_pretrained(tmp_path)
    state = {name.removeprefix("transformer."): weight for name, weight in stock.transformer.state_dict().items()}
    for layer in range(stock.config.n_layer):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril()
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(
        {prefix + name: weight for name, weight in state.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    close(GPT2.to_acorn(GPT2.load(open_source(str(tmp_path))))(ids).logits, stock(ids).logits)


def test_a_weight_without_a_place_is_refused(tmp_path) -> None:
    stock = stock_gpt2()
    stock.save_pretrained(
        tmp_path, state_dict={**stock.state_dict(), "transformer.h.0.attn.c_attn.gate": torch.ones(2)}
    )
    with pytest.raises(UserError, match="no place in the model"):
        GPT2.load(open_source(str(tmp_path)))


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert GPT2.obstacles(tiny_config(sliding_window=32)) == []
    assert "sliding_window=31" in GPT2.obstacles(tiny_config(sliding_window=31))[0]


def test_each_obstacle_is_named() -> None:
    found = {line.split("=")[0] for line in GPT2.obstacles(tiny_config(**VARIANTS["modern"]))}
    assert found == {"position_encoding", "norm", "qk_norm", "embedding_norm"}


def test_the_config_says_what_others_read(tmp_path) -> None:
    model = random_model(tiny_config(eos_token_id=7, residual_dropout=0.2, intermediate_size=40))
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    GPT2.write(model, None, tmp_path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_ctx"], config["n_positions"], config["n_inner"]) == (32, 32, 40)
    assert (config["eos_token_id"], config["bos_token_id"], config["resid_pdrop"]) == (7, None, 0.2)
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert "auto_map" not in config
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["temperature"], generation["eos_token_id"]) == (0.7, 7)


def test_generation_config_travels_in_too(tmp_path) -> None:
    stock = stock_gpt2()
    stock.generation_config.temperature, stock.generation_config.do_sample = 0.6, True
    stock.save_pretrained(tmp_path)
    ours = GPT2.to_acorn(GPT2.load(open_source(str(tmp_path))))
    assert (ours.generation_config.temperature, ours.generation_config.eos_token_id) == (0.6, 256)


def test_weights_say_whether_they_are_tied(tmp_path) -> None:
    stock = stock_gpt2(tie_word_embeddings=False)
    stock.config.tie_word_embeddings = True
    stock.save_pretrained(tmp_path)
    assert not GPT2.config(GPT2.load(open_source(str(tmp_path)))).tie_word_embeddings


@pytest.mark.parametrize(
    ("field", "value"), [("activation_function", "tanh"), ("add_cross_attention", True)], ids=["tanh", "cross"]
)
def test_what_we_have_no_place_for(field: str, value) -> None:
    with pytest.raises(UserError, match=field):
        GPT2.config(stock_gpt2(**{field: value}))
