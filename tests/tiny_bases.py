"""Tiny models to finetune, in stock GPT-2 format and in ours, on disk with a byte tokenizer."""

from pathlib import Path
from shlex import split as words

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from training.data.tokenizers import build_tokenizer

from . import variants

VOCABULARY, CONTEXT = 257, 64
TINY = words(
    "--max_steps 6 --eval_steps 3 --per_device_train_batch_size 4 --block_size 40 "
    "--tokens_per_step none --warmup_steps 0 --learning_rate 1e-2 --max_new_tokens 8 --validation_fraction 0.2 "
    "--precision fp32"
)
OURS = {
    "gpt": {},
    "gpt-rope-gqa": {"position_encoding": "rope", "num_key_value_heads": 2, "norm": "rms_norm", "bias": False},
}


def stock_model(**overrides) -> GPT2LMHeadModel:
    """A random GPT2LMHeadModel whose weights are large enough for every part to matter."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "vocab_size": VOCABULARY}
    ends = {"eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**{**sizes, **ends, **dropouts, "initializer_range": 0.2, **overrides})
    return GPT2LMHeadModel(config).eval()


def our_model(name: str = "gpt", **overrides):
    """A random GPTForCausalLM."""
    ends = {"eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    return variants.random_model(variants.tiny_config(**{**sizes, **ends, **OURS[name], **overrides}))


def save(model, folder: Path) -> Path:
    """Write a model and its tokenizer as one directory."""
    model.save_pretrained(folder)
    build_tokenizer("byte").save_pretrained(folder)
    return folder


BASES = {"gpt2": stock_model, **{name: (lambda name=name: our_model(name)) for name in OURS}}
