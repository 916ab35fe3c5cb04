"""Models that llama.cpp can hold, with the architecture it holds them in, for the tests of the GGUF export."""

from string import ascii_letters, digits

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from inference.formats.gguf_vocabulary import RULES
from training.data.tokenizers import END_OF_TEXT, build_entries

from .variants import FULL, SLIDING, VARIANTS, _rope, random_model, tiny_config

ROPE = {"position_encoding": "rope"}
RMS = {"norm": "rms_norm", **ROPE}
SWIGLU = {**RMS, "gated_mlp": True, "hidden_act": "silu"}
RELU2 = {**RMS, "hidden_act": "relu2", "bias": False}
LLAMA3 = VARIANTS["rope_llama3"]

# name: (llama.cpp's architecture, arguments of GPTConfig over TINY)
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", SWIGLU),
    "llama_no_bias": ("llama", {**SWIGLU, "bias": False, "tie_word_embeddings": False}),
    "llama_grouped": ("llama", {**SWIGLU, "num_key_value_heads": 2}),
    "llama_no_gain": ("llama", {**SWIGLU, "norm_gain": False}),
    "llama_head_dim": ("llama", {**SWIGLU, "num_attention_heads": 3, "head_dim": 6}),
    "llama_theta": ("llama", {**SWIGLU, **_rope("default", rope_theta=500.0)}),
    "llama_linear": ("llama", {**SWIGLU, **_rope("linear", factor=4.0)}),
    "llama_yarn": ("llama", {**SWIGLU, **_rope("yarn", factor=4.0, original_max_position_embeddings=8)}),
    "llama_llama3": ("llama", {**SWIGLU, **LLAMA3}),
    "llama_wide_window": ("llama", {**SWIGLU, "sliding_window": 64}),
    "llama_embedding_norm": ("llama", {**SWIGLU, "embedding_norm": True}),
    "qwen3": ("qwen3", {**SWIGLU, "qk_norm": True, "bias": False, "num_key_value_heads": 1}),
    "qwen3_no_gain": ("qwen3", {**SWIGLU, "qk_norm": True, "bias": False, "norm_gain": False, "head_dim": 12}),
    "qwen3_yarn": ("qwen3", {**SWIGLU, **VARIANTS["rope_yarn"], "qk_norm": True, "bias": False}),
    "arcee": ("arcee", RELU2),
    "arcee_llama3": ("arcee", {**RELU2, **LLAMA3, "num_key_value_heads": 2}),
    "apertus": ("apertus", {**RELU2, "qk_norm": True}),
    "apertus_llama3": ("apertus", {**RELU2, **LLAMA3, "qk_norm": True, "tie_word_embeddings": False}),
    "quickstart": ("apertus", VARIANTS["modern"]),
    "starcoder2": ("starcoder2", ROPE),
    "starcoder2_no_bias": ("starcoder2", {**ROPE, "bias": False, "norm_gain": False, "num_key_value_heads": 2}),
    "jais2": ("jais2", {**ROPE, "hidden_act": "relu2", "head_dim": 12}),
    "jais2_no_bias": ("jais2", {**ROPE, "hidden_act": "relu2", "bias": False, "embedding_norm": True}),
    "sliding": ("granite_swa", {**SWIGLU, "sliding_window": 5}),
    "sliding_mixed": ("granite_swa", {**SWIGLU, "layer_types": [SLIDING, FULL], "sliding_window": 5, "bias": False}),
    "sliding_no_positions": ("granite_swa", {**SWIGLU, "position_encoding": "none", "sliding_window": 5}),
    "llama_no_positions": ("llama", {**SWIGLU, "position_encoding": "none"}),
    "apertus_no_positions": ("apertus", {**RELU2, "position_encoding": "none", "qk_norm": True}),
    "gpt2_no_positions_embedding_norm": ("gpt2", {"position_encoding": "none", "embedding_norm": True}),
}
# of tests/variants.py
HELD = {
    **dict.fromkeys(
        "gpt2 sinusoidal no_positions layer_norm_no_gain layer_norm_no_gain_no_bias layer_norm_large_eps "
        "embedding_range gelu odd_intermediate_size one_head grouped_query multi_query no_bias untied zero_head "
        "normal_residual_init zero_residual_init one_layer".split(),
        "gpt2",
    ),
    **dict.fromkeys("rope rope_theta rope_linear rope_yarn".split(), "starcoder2"),
    "modern": "apertus",
}
CASES |= {name: (held, VARIANTS[name]) for name, held in HELD.items()}


def model_of(fields: dict):
    """A random model of these fields over TINY."""
    return random_model(tiny_config(**fields))


def tokenizer_of(size: int):
    """Characters and an end-of-text token, `size` entries in all."""
    return build_entries(sorted(ascii_letters + digits)[: size - 1], has_end=True)


def split_otherwise(rule: str, text: str) -> PreTrainedTokenizerFast:
    """A BPE of 400 entries that takes texts apart by a rule of llama.cpp's other than GPT-2's."""
    pattern, is_whole = RULES[rule]
    backend = Tokenizer(models.BPE(ignore_merges=is_whole))
    backend.normalizer = normalizers.NFC() if rule == "qwen2" else None
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=399, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
