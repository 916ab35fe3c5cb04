"""THE table of model variants: every test of the model is crossed with every line."""

import torch

from modeling import GPTConfig, GPTForCausalLM

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def _rope(rope_type: str, **parameters) -> dict:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}
    return {"position_encoding": "rope", "rope_parameters": parameters}


# name: arguments of GPTConfig over TINY. The tests' rows have 16 tokens; windows and scaled contexts are shorter.
VARIANTS: dict[str, dict] = {
    "gpt2": {},
    "sinusoidal": {"position_encoding": "sinusoidal"},
    "rope": {"position_encoding": "rope"},
    "no_positions": {"position_encoding": "none"},
    "rope_theta": _rope("default", rope_theta=500.0),
    "rope_linear": _rope("linear", factor=4.0),
    "rope_dynamic": _rope("dynamic", factor=2.0),
    "rope_dynamic_past_context": {**_rope("dynamic", factor=2.0), "max_position_embeddings": 12},
    "rope_yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=8),
    "rope_llama3": _rope(
        "llama3", factor=4.0, original_max_position_embeddings=8, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    "rope_by_layer": {
        "position_encoding": "rope",
        "layer_types": [SLIDING, FULL],
        "sliding_window": 5,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            FULL: {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    },
    "layer_norm_no_gain": {"norm_gain": False},
    "layer_norm_no_gain_no_bias": {"norm_gain": False, "bias": False},
    "layer_norm_large_eps": {"norm_eps": 0.1},
    "rms_norm": {"norm": "rms_norm"},
    "rms_norm_no_gain": {"norm": "rms_norm", "norm_gain": False},
    "post_norm": {"norm_order": "post"},
    "post_rms_norm": {"norm_order": "post", "norm": "rms_norm"},
    "qk_norm": {"qk_norm": True},
    "qk_norm_no_gain": {"qk_norm": True, "norm_gain": False},
    "embedding_norm": {"embedding_norm": True},
    "embedding_range": {"embedding_initializer_range": 1.0},
    "gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "relu2": {"hidden_act": "relu2"},
    "silu": {"hidden_act": "silu"},
    "gated_mlp": {"gated_mlp": True, "hidden_act": "silu"},
    "odd_intermediate_size": {"intermediate_size": 37},
    "one_head": {"num_attention_heads": 1},
    "grouped_query": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1},
    "free_head_dim": {"head_dim": 6},
    "free_head_dim_indivisible": {"num_attention_heads": 3, "head_dim": 8},
    "sliding": {"sliding_window": 5},
    "sliding_window_two": {"sliding_window": 2},
    "mixed_layers": {"layer_types": [SLIDING, FULL], "sliding_window": 5},
    "mixed_layers_full_first": {"layer_types": [FULL, SLIDING], "sliding_window": 5, "position_encoding": "rope"},
    "shared_kv": {"kv_sharing_modes": ["store", "reuse"]},
    "shared_kv_rope": {"kv_sharing_modes": ["store", "reuse"], "position_encoding": "rope", "qk_norm": True},
    "shared_kv_sliding": {"kv_sharing_modes": ["store", "reuse"], "sliding_window": 5},
    "shared_kv_two_groups": {
        "num_hidden_layers": 5,
        "kv_sharing_modes": [None, "store", "reuse", "store", "reuse"],
        "num_key_value_heads": 2,
    },
    "shared_kv_mixed_layers": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, SLIDING, FULL, FULL],
        "sliding_window": 5,
        "kv_sharing_modes": ["store", "reuse", "store", "reuse"],
    },
    "kv_quantization": {"kv_quantization": "int2", "position_encoding": "rope"},
    "kv_quantization_mixed_layers": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, FULL, FULL],
        "sliding_window": 5,
        "kv_sharing_modes": [None, "store", "reuse"],
        "num_key_value_heads": 2,
        "kv_quantization": "int4",
        "kv_quantization_group": 4,
    },
    "linear": {"layer_types": [LINEAR, LINEAR]},
    "linear_rope_mixed": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, LINEAR, FULL],
        "sliding_window": 5,
        "position_encoding": "rope",
        "linear_conv_kernel_dim": 3,
        "qk_norm": True,
    },
    "gated_delta": {
        "layer_types": [LINEAR, LINEAR],
        "linear_attention": "gated_delta",
        "linear_conv_kernel_dim": 4,
        "num_key_value_heads": 2,
        "position_encoding": "none",
    },
    "gated_delta_mixed": {"layer_types": [LINEAR, FULL], "linear_attention": "gated_delta", "bias": False},
    "shared_kv_between_sliding_layers": {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING],
        "sliding_window": 5,
        "kv_sharing_modes": ["store", "store", "reuse", "store", "reuse", "reuse"],
        "num_key_value_heads": 2,
        "position_encoding": "rope",
        "value_embeddings": True,
    },
    "latent": {"position_encoding": "rope", "kv_lora_rank": 12},
    "latent_shared_sliding": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "sliding_window": 5,
        "kv_sharing_modes": ["store", "reuse", None],
        "position_encoding": "rope",
        "kv_lora_rank": 12,
        "q_lora_rank": 10,
        "qk_rope_head_dim": 6,
        "qk_nope_head_dim": 5,
        "v_head_dim": 7,
    },
    "bigrams": {"bigram_vocab_size": 50, "position_encoding": "rope", "num_key_value_heads": 1},
    "memory": {"position_encoding": "rope", "memory_length": 16, "max_position_embeddings": 8},
    "no_bias": {"bias": False},
    "head_bias": {"lm_head_bias": True},
    "untied": {"tie_word_embeddings": False},
    "untied_head_bias": {"tie_word_embeddings": False, "lm_head_bias": True},
    "zero_head": {"tie_word_embeddings": False, "zero_init_head": True},
    "normal_residual_init": {"residual_init": "normal"},
    "zero_residual_init": {"residual_init": "zero"},
    "logit_softcap": {"logit_softcap": 2.0},
    "one_layer": {"num_hidden_layers": 1},
    "modern": {
        "position_encoding": "rope",
        "norm": "rms_norm",
        "norm_gain": False,
        "qk_norm": True,
        "embedding_norm": True,
        "embedding_initializer_range": 1.0,
        "hidden_act": "relu2",
        "bias": False,
        "tie_word_embeddings": False,
        "residual_init": "zero",
        "zero_init_head": True,
    },
}

# Past the context dynamic rope changes its frequencies with the length, and keys that a cache holds keep the old ones.
INEXACT_WITH_CACHE = {"rope_dynamic_past_context"}
# What holds, pages or takes keys and values of heads refuses these by kv_lora_rank.
HOLDS_LATENTS = {name for name, fields in VARIANTS.items() if "kv_lora_rank" in fields}

# Linear layers have a state in place of keys.
WITHOUT_KEYS = {name for name, overrides in VARIANTS.items() if LINEAR in overrides.get("layer_types", ())}


def tiny_config(**overrides) -> GPTConfig:
    """A configuration of TINY shape with `overrides`."""
    return GPTConfig(**{**TINY, **overrides})


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew, so large that each shows in the logits and attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_gain else 0.3 * noise)


def random_model(config: GPTConfig, seed: int = 0) -> GPTForCausalLM:
    """A model in eval mode with no parameter left at a neutral value such as zero or one."""
    model = GPTForCausalLM(config).eval()
    randomize(model, seed)
    return model
