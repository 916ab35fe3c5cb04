"""Multi-head latent attention: DeepSeek's numbers, a cache of the latents alone, and what is refused."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DeepseekV3Config, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from modeling.attention import eager_attention_forward
from modeling.compat import CACHE_NAME
from training.model.sizes import flops_per_token, matrix_parameters

from .variants import random_model, tiny_config

LATENT = {"position_encoding": "rope", "kv_lora_rank": 12}
SIZES = {"qk_rope_head_dim": 6, "qk_nope_head_dim": 5, "v_head_dim": 7}
NAMES = {"kv_a_proj": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "q_a_norm": "q_a_layernorm"}


@pytest.mark.parametrize("q_lora_rank", [None, 10], ids=["plain_queries", "low_rank_queries"])
@torch.no_grad()
def test_it_is_deepseeks_attention(q_lora_rank: int | None) -> None:
    """Theirs norms latents with an epsilon of 1e-6 and scores without biases."""
    shape = {**LATENT, **SIZES, "q_lora_rank": q_lora_rank, "bias": False, "norm_eps": 1e-6, "norm": "rms_norm"}
    ours = random_model(tiny_config(**shape)).model
    attention, states = ours.layers[0].self_attn, torch.randn(3, 9, 32)
    theirs_config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=12,
        q_lora_rank=q_lora_rank,
        rope_interleave=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
        **SIZES,
    )
    theirs = DeepseekV3Attention(theirs_config, 0).eval()
    theirs.load_state_dict(
        {".".join(NAMES.get(part, part) for part in key.split(".")): w for key, w in attention.state_dict().items()}
    )
    positions = torch.arange(9)[None]
    mask = create_causal_mask(theirs_config, states, torch.ones(3, 9), None, positions)
    expected, _ = theirs(states, DeepseekV3RotaryEmbedding(theirs_config)(states, positions), mask)
    found, _ = attention(states, None, ours.positions.angles(states, positions)["full_attention"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_the_cache_holds_one_latent_and_one_rotary_key_a_token(kind: type, ids: torch.Tensor) -> None:
    model = random_model(tiny_config(**LATENT, **SIZES))
    cache = kind(config=model.config, **({} if kind is DynamicCache else {"max_cache_len": 16}))
    model(ids, **{CACHE_NAME: cache})
    for layer in cache.layers:
        assert layer.keys.shape == (3, 1, 16, 6)
        assert layer.values.shape == (3, 1, 16, 12)


@torch.no_grad()
def test_a_layer_that_reuses_a_latent_reads_it_by_a_projection_of_its_own(ids: torch.Tensor) -> None:
    model = random_model(tiny_config(**LATENT, kv_sharing_modes=["store", "reuse"]))
    names = {name.split(".")[0] for name, _ in model.model.layers[1].self_attn.named_parameters()}
    assert names == {"q_proj", "kv_b_proj", "o_proj"}
    before = model(ids).logits
    model.model.layers[1].self_attn.kv_b_proj.bias += 1
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)


@torch.no_grad()
def test_flash_attention_gets_values_as_wide_as_keys(ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = random_model(tiny_config(**LATENT, **SIZES)), []
    model.set_attn_implementation("eager")
    expected = model(ids).logits

    def flash(module, query, key, value, *args, **kwargs):
        widths.append((key.shape[-1], value.shape[-1]))
        return eager_attention_forward(module, query, key, value, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    masks = {"full_attention": torch.full((1, 1, 16, 16), -1e9).triu(1)}
    model.config._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(model(ids, attention_mask=masks).logits, expected, rtol=1e-4, atol=1e-5)
    assert set(widths) == {(11, 11)}


def test_the_sizes_that_are_not_given() -> None:
    config = tiny_config(**LATENT)
    assert (config.qk_nope_head_dim, config.v_head_dim, config.qk_rope_head_dim, config.q_lora_rank) == (8, 8, 4, None)
    assert (config.head_dim, config.num_key_value_heads) == (4, 1)  # of what the cache holds


@pytest.mark.parametrize("sizes", [SIZES, {**SIZES, "q_lora_rank": 10}], ids=["plain_queries", "low_rank_queries"])
def test_what_multiplies_is_counted(sizes: dict) -> None:
    config = tiny_config(**LATENT, **sizes, bias=False, norm_gain=False, kv_sharing_modes=["store", "reuse"])
    model = random_model(config)
    assert matrix_parameters(config) == model.num_parameters()
    scores = 2 * 6 * 4 * (11 + 7) * 32  # layers, forward and backward, heads, sizes of keys and values, context
    assert flops_per_token(config) == 6 * matrix_parameters(config) + scores


REFUSED = {
    "a size without a latent": ({"v_head_dim": 8}, "v_head_dim=8 needs kv_lora_rank"),
    "a bottleneck without a latent": ({"q_lora_rank": 8}, "q_lora_rank=8 needs kv_lora_rank"),
    "a latent of nothing": ({**LATENT, "kv_lora_rank": 0}, "kv_lora_rank=0: must be at least 1"),
    "no rotary part": ({**LATENT, "qk_rope_head_dim": 0}, "qk_rope_head_dim=0: must be at least 1"),
    "half a pair": ({**LATENT, "qk_rope_head_dim": 3}, "qk_rope_head_dim=3: .*even"),
    "no values": ({**LATENT, "v_head_dim": -1}, "v_head_dim=-1: must be at least 1"),
    "other positions": ({"kv_lora_rank": 8}, "kv_lora_rank=8 needs position_encoding='rope', not 'learned'"),
    "grouped heads": ({**LATENT, "num_key_value_heads": 2}, "num_key_value_heads=2: .*kv_lora_rank.*leave it out"),
    "a head size": ({**LATENT, "head_dim": 8}, "head_dim=8: .*qk_.*leave it out"),
    "norms of keys": ({**LATENT, "qk_norm": True}, "qk_norm=True: .*leave it out"),
    "codes": ({**LATENT, "kv_quantization": "int2"}, "kv_quantization='int2': .*kv_lora_rank.*leave it out"),
    "states": ({**LATENT, "layer_types": ["full_attention", "linear_attention"]}, "linear_attention: does not go with"),
    "a word": ({**LATENT, "kv_lora_rank": "x"}, "kv_lora_rank.* expected"),
}


@pytest.mark.parametrize(("arguments", "reason"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_reason(arguments: dict, reason: str) -> None:
    with pytest.raises(StrictDataclassError, match=reason) as caught:
        tiny_config(**arguments)
    assert len(str(caught.value).splitlines()) == 2  # huggingface_hub's line and ours
