"""The configuration refuses at construction what could not work, and says why; it keeps what it is given."""

import copy
import json
import logging
import re
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling import GPTConfig, GPTForCausalLM
from training.config.presets import PRESETS
from training.model.loading import load_config

from .variants import VARIANTS, tiny_config

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"layer_types": ["linear_attention"] * 2}
ROPE = {"position_encoding": "rope"}


def rope(**parameters) -> dict:
    return {**ROPE, "rope_parameters": parameters}


REFUSED = {  # what is wrong: arguments over TINY, what the message must say
    "heads do not divide the width": ({"hidden_size": 30}, "hidden_size=30 .*num_attention_heads=4.*head_dim"),
    "kv heads do not divide the heads": ({"num_key_value_heads": 3}, "num_key_value_heads=3 .*divisor"),
    "unknown position": (
        {"position_encoding": "alibi"},
        "position_encoding='alibi': .*learned, sinusoidal, rope, none",
    ),
    "unknown norm": ({"norm": "batch"}, "norm='batch': .*layer_norm, rms_norm"),
    "unknown norm order": ({"norm_order": "both"}, "norm_order='both': .*pre, post"),
    "unknown activation": ({"hidden_act": "tanh"}, "hidden_act='tanh': .*gelu_new, gelu, relu, relu2, silu"),
    "unknown residual init": ({"residual_init": "large"}, "residual_init='large': .*scaled, zero, normal"),
    "unknown layer type": ({"layer_types": [FULL, "banded"]}, "layer_types has 'banded'"),
    "too few layer types": ({"layer_types": [FULL]}, "layer_types has 1 entries for num_hidden_layers=2"),
    "too many layer types": ({"layer_types": [FULL] * 3}, "layer_types has 3 entries for num_hidden_layers=2"),
    "sliding without a window": ({"layer_types": [FULL, SLIDING]}, "sliding_window=None"),
    "window of nothing": ({"sliding_window": 0}, "sliding_window=0"),
    "window of one": ({"sliding_window": 1}, "sliding_window=1.*at least 2"),
    "sharing modes of another length": ({"kv_sharing_modes": ["store"]}, "kv_sharing_modes has 1 entries"),
    "unknown sharing mode": ({"kv_sharing_modes": ["store", "lend"]}, r"kv_sharing_modes\[1\]='lend'"),
    "reuse without a store": ({"kv_sharing_modes": [None, "reuse"]}, r"kv_sharing_modes\[1\]='reuse' has no 'store'"),
    "reuse before its store": (
        {"kv_sharing_modes": ["reuse", "store"]},
        r"kv_sharing_modes\[0\]='reuse' has no 'store'",
    ),
    "reuse across layer types": (
        {"kv_sharing_modes": ["store", "reuse"], "layer_types": [FULL, SLIDING], "sliding_window": 4},
        r"kv_sharing_modes\[1\]='reuse' has no 'store' layer below it that is sliding_attention too",
    ),
    "unknown linear attention": ({"linear_attention": "performer"}, "linear_attention='performer': .*elu, gated_delta"),
    "a convolution over one token": (
        {**LINEAR, "linear_conv_kernel_dim": 1},
        "linear_conv_kernel_dim=1: must be from 2 to 64",
    ),
    "a convolution over all": (
        {**LINEAR, "linear_conv_kernel_dim": 1024},
        "linear_conv_kernel_dim=1024: must be from 2",
    ),
    "a kind of linear layers without any": (
        {"linear_attention": "gated_delta"},
        "gated_delta': no layer of layer_types",
    ),
    "a convolution without linear layers": (
        {"linear_conv_kernel_dim": 4},
        "linear_conv_kernel_dim=4: no layer of layer",
    ),
    "quantization of no keys": (
        {"kv_quantization": "int2", **LINEAR},
        "kv_quantization='int2': no layer of layer_types has keys and values",
    ),
    "tables for values of no layer": (
        {"value_embeddings": True, **LINEAR},
        "value_embeddings=true: no layer of layer_types is softmax attention; leave it out",
    ),
    "tables for values that are latents": (
        {"value_embeddings": True, "kv_lora_rank": 8, **ROPE},
        "value_embeddings=True: does not go with kv_lora_rank",
    ),
    "fewer heads than none": ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1: must be at least 0"),
    "heads past the context": ({"num_nextn_predict_layers": 32}, "num_nextn_predict_layers=32: must be .* below max"),
    "a table of no pairs": ({"bigram_vocab_size": 0}, "bigram_vocab_size=0: must be at least 1"),
    "pairs beside a memory": (
        {"bigram_vocab_size": 9, "memory_length": 8, **ROPE},
        "memory_length=8: a memory does not hold the tokens that bigram_vocab_size needs",
    ),
    "shared keys of a linear layer": (
        {"kv_sharing_modes": ["store", "reuse"], **LINEAR},
        r"kv_sharing_modes\[0\]='store': linear_attention has no keys to share",
    ),
    "unknown kind of quantization": ({"kv_quantization": "int5"}, "kv_quantization='int5': .*int2, int3, int4"),
    "quantization of bits alone": ({"kv_quantization": 2}, "kv_quantization"),
    "a group without quantization": ({"kv_quantization_group": 8}, "kv_quantization_group=8 .*kv_quantization is not"),
    "a group that does not divide the head": (
        {"kv_quantization": "int2", "kv_quantization_group": 16},
        "kv_quantization_group=16 .*head_dim=8: choose one of 2, 4, 8",
    ),
    "a group that is no power of two": (
        {"kv_quantization": "int2", "kv_quantization_group": 12, "head_dim": 24},
        "kv_quantization_group=12 .*head_dim=24: choose one of 2, 4, 8",
    ),
    "a group of nothing": ({"kv_quantization": "int2", "kv_quantization_group": 0}, "kv_quantization_group=0 "),
    "codes that do not fill bytes": (
        {"kv_quantization": "int3", "head_dim": 12},
        "head_dim=12: int3 fills bytes with 8 codes at a time",
    ),
    "rope of an odd head": ({**ROPE, "head_dim": 7}, "head_dim=7: .*even"),
    "sinusoids of an odd width": (
        {"position_encoding": "sinusoidal", "hidden_size": 33, "num_attention_heads": 3},
        "hidden_size=33: .*even",
    ),
    "rope parameters without rope": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_parameters .*position_encoding='learned'",
    ),
    "unknown rope type": (rope(rope_type="spiral"), "rope_type='spiral': .*linear, dynamic, yarn, llama3"),
    "linear rope without factor": (rope(rope_type="linear"), "rope_parameters.factor=None: linear"),
    "yarn without factor": (rope(rope_type="yarn"), "rope_parameters.factor=None: yarn"),
    "llama3 rope with half its factors": (rope(rope_type="llama3", factor=2.0), "low_freq_factor=None: llama3"),
    "rope of half a head": (rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "rope by half of the layer types": (
        {**rope(full_attention={}), "sliding_window": 4, "layer_types": [FULL, SLIDING]},
        "rope_parameters: has nothing for sliding_attention",
    ),
    "rope by layer type and for all": (rope(full_attention={}, rope_type="default"), "rope_parameters.rope_type: st"),
    "rope by layer type without factor": (
        rope(full_attention={"rope_type": "linear"}),
        "rope_parameters.full_attention.factor=None: linear",
    ),
    "zeroed head that is tied": ({"zero_init_head": True}, "zero_init_head=true needs tie_word_embeddings=false"),
    "dropout of everything": ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
    "negative dropout": ({"attention_dropout": -0.1}, "attention_dropout=-0.1"),
    "softcap of zero": ({"logit_softcap": 0}, "logit_softcap=0"),
    "negative init": ({"initializer_range": -0.02}, "initializer_range=-0.02"),
    "negative embedding init": ({"embedding_initializer_range": -1.0}, "embedding_initializer_range=-1.0"),
    "no number for a softcap": ({"logit_softcap": float("nan")}, "logit_softcap=nan"),
    "no number for an init": ({"initializer_range": float("nan")}, "initializer_range=nan"),
    "no number for an eps": ({"norm_eps": float("inf")}, "norm_eps=inf"),
    "no number for rope": (rope(rope_type="linear", factor=float("nan")), "rope_parameters.factor=nan: linear"),
    "negative eps": ({"norm_eps": -1e-5}, "norm_eps=-1e-05"),
    "no head": ({"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
    "no kv head": ({"num_key_value_heads": 0}, "num_key_value_heads=0: must be at least 1"),
    "no head size": ({"head_dim": 0}, "head_dim=0: must be at least 1"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers=0: must be at least 1"),
    "no width": ({"hidden_size": 0}, "hidden_size=0: must be at least 1"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size=0: must be at least 1"),
    "no context": ({"block_size": 0}, "max_position_embeddings=0: must be at least 1"),
    "no mlp": ({"intermediate_size": -1}, "intermediate_size=-1: must be at least 1"),
    "word for a width": ({"hidden_size": "x"}, "hidden_size.* expected int, got str"),
    "fraction of a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers.* expected int, got float"),
    "nanoGPT's name with a word": ({"n_embd": "x"}, "hidden_size.* expected int, got str"),
    "number for a switch": ({"bias": 1}, "bias.* expected bool, got int"),
    "word for layer types": ({"layer_types": FULL}, "layer_types"),
}


@pytest.mark.parametrize(("arguments", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_reason(arguments: dict, reason: str) -> None:
    with pytest.raises(StrictDataclassError, match=reason) as caught:
        tiny_config(**arguments)
    assert len(str(caught.value).splitlines()) == 2  # huggingface_hub's line and ours


def test_nanogpt_names_are_arguments() -> None:
    config = GPTConfig(n_embd=48, n_layer=3, n_head=4, n_kv_head=2, block_size=17, n_inner=50, dropout=0.25)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 4)
    assert (config.num_key_value_heads, config.max_position_embeddings, config.intermediate_size) == (2, 17, 50)
    assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == (0.25, 0.25, 0.25)
    model = GPTForCausalLM(config)
    assert model.model.layers[0].dropout.p == model.model.dropout.p == 0.25
    assert model.model.layers[0].self_attn.attention_dropout == 0.25


def test_what_is_derived_follows_nanogpt_names() -> None:
    config = GPTConfig(n_embd=48, n_head=4, n_layer=3)
    assert config.head_dim == 12
    assert config.intermediate_size == 192
    assert config.num_key_value_heads == 4
    assert config.layer_types == [FULL] * 3
    yarn = {"rope_type": "yarn", "factor": 2.0}
    config = GPTConfig(block_size=64, position_encoding="rope", rope_parameters=yarn)
    assert config.rope_parameters["original_max_position_embeddings"] == 64


def test_nanogpt_names_are_attributes() -> None:
    config = tiny_config()
    names = ("n_embd", "n_layer", "n_head", "n_kv_head", "block_size", "n_positions", "n_inner", "dropout")
    assert [getattr(config, name) for name in names] == [32, 2, 4, 4, 32, 32, 128, 0.0]
    config.block_size = 64
    assert config.max_position_embeddings == 64
    config.dropout = 0.1
    assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == (0.1, 0.1, 0.1)


def test_the_defaults_are_gpt2() -> None:
    ours, preset = GPTConfig().to_dict(), GPTConfig(**PRESETS["gpt2"]).to_dict()
    assert ours == preset
    assert (ours["vocab_size"], ours["head_dim"], ours["intermediate_size"]) == (50257, 64, 3072)


def test_a_window_alone_slides_every_layer() -> None:
    assert tiny_config(sliding_window=5).layer_types == [SLIDING] * 2
    assert tiny_config(sliding_window=5, layer_types=[FULL, SLIDING]).layer_types == [FULL, SLIDING]


@pytest.mark.parametrize("name", VARIANTS)
def test_json_keeps_everything(name: str, tmp_path: Path) -> None:
    config = tiny_config(**VARIANTS[name], dropout=0.1)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "acorn_gpt"
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for argument, value in VARIANTS[name].items():
        if argument != "rope_parameters":
            assert saved[argument] == value
    loaded = GPTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": loaded._name_or_path}
    assert loaded.rope_parameters == config.rope_parameters


def test_the_arguments_stay_as_they_were() -> None:
    arguments = {**ROPE, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    before = copy.deepcopy(arguments)
    tiny_config(**arguments)
    assert arguments == before


def test_rope_theta_alone_is_heard() -> None:
    assert tiny_config(**ROPE, rope_theta=500.0).rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert tiny_config().rope_parameters is None


def test_a_saved_config_loads_by_auto_config(tmp_path: Path) -> None:
    model = GPTForCausalLM(tiny_config(qk_norm=True))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert config.qk_norm
    assert config.n_embd == 32


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_backend_is_taken(backend: str) -> None:
    assert GPTForCausalLM(tiny_config(attn_implementation=backend)).config._attn_implementation == backend
    assert (
        GPTForCausalLM._from_config(tiny_config(), attn_implementation=backend).config._attn_implementation == backend
    )


def test_unknown_attention_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        GPTForCausalLM(tiny_config(attn_implementation="nonsense"))


def test_a_window_that_no_layer_has_is_allowed() -> None:
    """As in transformers; it is there for who names a sliding layer later."""
    config = tiny_config(sliding_window=1, layer_types=[FULL, FULL])
    assert (config.sliding_window, config.layer_types) == (1, [FULL, FULL])


def test_a_configuration_of_an_older_acorn_loads(tmp_path, caplog, monkeypatch) -> None:
    """It calls itself by another name, and names the smoothing of its training, which is not the model's."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # so that a warning is seen here
    tiny_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"label_smoothing": 0.1, "model_type": "gpt"}), encoding="utf-8"
    )
    config = GPTConfig.from_pretrained(tmp_path)
    assert "label_smoothing" not in config.to_dict()
    assert config.model_type == load_config(str(tmp_path)).model_type == config.to_dict()["model_type"] == "acorn_gpt"
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 4}, "sliding_window=4: no layer is sliding_attention"),
        ({"n_layer": 1}, "layer_types has 2 entries for num_hidden_layers=1"),
        ({"norm": "foo"}, "norm='foo': choose one of"),
        ({"memory_length": 8}, "memory_length=8: position_encoding='learned'"),
    ],
    ids=str,
)
def test_what_changes_a_saved_configuration_is_checked(changes: dict, named: str, tmp_path) -> None:
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises((ValueError, StrictDataclassError), match=re.escape(named)):
        GPTConfig.from_pretrained(tmp_path, **changes)
    changed = GPTConfig.from_pretrained(tmp_path, kv_quantization="int2", dtype="bfloat16")
    assert (changed.kv_quantization_group, changed.dtype) == (8, "bfloat16")
