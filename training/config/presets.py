"""Preset name to GPTConfig arguments; `acorn pretrain … --preset NAME` and recipes use them."""

GPT2 = {"vocab_size": 50257, "max_position_embeddings": 1024}
NANOGPT = {"bias": False, "hidden_act": "gelu"}
GPT3 = {"vocab_size": 50257, "max_position_embeddings": 2048}
TOYGPT = {
    "vocab_size": 50257,
    "max_position_embeddings": 512,
    "position_encoding": "sinusoidal",
    "lm_head_bias": True,
}


def _shape(layers: int, width: int, heads: int, head_dim: int | None = None) -> dict:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return shape if head_dim is None else {**shape, "head_dim": head_dim}


PRESETS: dict[str, dict] = {
    # nanoGPT's models: no biases and the exact GELU. The characters' vocabulary comes from the text.
    "baby": {**NANOGPT, **_shape(6, 384, 6), "vocab_size": 65, "max_position_embeddings": 256},
    "baby-cpu": {**NANOGPT, **_shape(4, 128, 4), "vocab_size": 65, "max_position_embeddings": 64},
    "nanogpt": {**GPT2, **NANOGPT, **_shape(12, 768, 12)},
    # Radford et al. 2018: norms after the residual sum, 40,478 byte-pair tokens, dropout 0.1.
    "gpt1": {
        **_shape(12, 768, 12),
        "vocab_size": 40478,
        "max_position_embeddings": 512,
        "norm_order": "post",
        "residual_init": "normal",
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    },
    # Radford et al. 2019.
    "gpt2": {**GPT2, **_shape(12, 768, 12)},
    "gpt2-medium": {**GPT2, **_shape(24, 1024, 16)},
    "gpt2-large": {**GPT2, **_shape(36, 1280, 20)},
    "gpt2-xl": {**GPT2, **_shape(48, 1600, 25)},
    # Brown et al. 2020, table 2.1, to the letter: where heads * head_dim is not the width, head_dim says so. Attention
    # is dense in every layer; the paper alternates it with banded sparse attention (`layer_types` can).
    "gpt3-small": {**GPT3, **_shape(12, 768, 12, 64)},
    "gpt3-medium": {**GPT3, **_shape(24, 1024, 16, 64)},
    "gpt3-large": {**GPT3, **_shape(24, 1536, 16, 96)},
    "gpt3-xl": {**GPT3, **_shape(24, 2048, 24, 128)},
    "gpt3-2.7b": {**GPT3, **_shape(32, 2560, 32, 80)},
    "gpt3-6.7b": {**GPT3, **_shape(32, 4096, 32, 128)},
    "gpt3-13b": {**GPT3, **_shape(40, 5140, 40, 128)},
    "gpt3-175b": {**GPT3, **_shape(96, 12288, 96, 128)},
    "toygpt-small": {**TOYGPT, **_shape(12, 768, 12)},
    "toygpt-medium": {**TOYGPT, **_shape(16, 1024, 16)},
    "toygpt-large": {**TOYGPT, **_shape(24, 2048, 16)},
}
