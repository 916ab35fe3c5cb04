"""GPT-2 in our parts computes what transformers' GPT-2 computes; so do GPT-1, Llama and Mistral."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from inference.formats.gpt2 import to_ours, turned
from modeling import GPTConfig, GPTForCausalLM

from .variants import VARIANTS, randomize

TINY_SHAPE = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 61, "n_positions": 32}
REAL_WIDTH = {"n_embd": 768, "n_layer": 2, "n_head": 12, "vocab_size": 503, "n_positions": 64}
GPT1_NAMES = {"tokens_embed": "wte", "positions_embed": "wpe"}


@torch.no_grad()
def ours_of(theirs: GPT2LMHeadModel | OpenAIGPTLMHeadModel, **shape) -> GPTForCausalLM:
    """Our model with the weights of `theirs`."""
    weights = turned(theirs.state_dict())
    for their_name, name in GPT1_NAMES.items():
        weights = {key.replace(their_name, name): weight for key, weight in weights.items()}
    ours = GPTForCausalLM(GPTConfig(**shape)).eval()
    ours.load_state_dict(to_ours(weights, theirs.config.n_layer))  # strict: every weight has its place
    return ours


def build_both(shape: dict, activation: str = "gelu_new") -> tuple[GPTForCausalLM, GPT2LMHeadModel, torch.Tensor]:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": None, "eos_token_id": None}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, **dropout, **special, activation_function=activation)).eval()
    if shape is TINY_SHAPE:
        randomize(theirs)  # their own initialisation leaves every bias at zero
    else:
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(shape["vocab_size"], (2, shape["n_positions"]))
    return ours_of(theirs, **shape, hidden_act=activation), theirs, ids


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", [TINY_SHAPE, REAL_WIDTH], ids=["tiny", "real_width"])
@torch.no_grad()
def test_logits_and_loss_equal(shape: dict, backend: str) -> None:
    ours, theirs, ids = build_both(shape)
    ours.set_attn_implementation(backend)
    theirs.set_attn_implementation(backend)
    found, expected = ours(ids, labels=ids), theirs(ids, labels=ids)
    assert expected.logits.std() > 0.1
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)


def test_gradients_equal() -> None:
    ours, theirs, ids = build_both(TINY_SHAPE)
    for model in (ours, theirs):
        model.train()(ids, labels=ids).loss.backward()
    pairs = [(ours.model.embed_tokens, theirs.transformer.wte), (ours.model.positions.embed, theirs.transformer.wpe)]
    for found, expected in pairs:
        torch.testing.assert_close(found.weight.grad, expected.weight.grad, rtol=1e-4, atol=1e-5)


def test_generation_equals() -> None:
    ours, theirs, ids = build_both(TINY_SHAPE)
    prompt, mask = ids[:, :5], torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@torch.no_grad()
def test_other_activations_equal(activation: str) -> None:
    ours, theirs, ids = build_both(TINY_SHAPE, activation)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_gpt1_equals() -> None:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    theirs = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**TINY_SHAPE, **dropout)).eval()
    randomize(theirs)
    ids = torch.randint(TINY_SHAPE["vocab_size"], (2, 32))
    found = ours_of(theirs, **TINY_SHAPE, norm_order="post")(ids).logits
    torch.testing.assert_close(found, theirs(ids).logits, rtol=1e-4, atol=1e-5)


LLAMA_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "model.norm.": "model.final_norm.",
}
LLAMA_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("stock", ["llama", "mistral"])
@pytest.mark.parametrize("name", ["rope", "rope_theta", "rope_linear", "rope_dynamic", "rope_yarn", "rope_llama3"])
@torch.no_grad()
def test_llama_and_mistral_equal(name: str, stock: str) -> None:
    parameters = VARIANTS[name].get("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    window = {"sliding_window": 5} if stock == "mistral" else {}
    config_class, model_class = (
        (LlamaConfig, LlamaForCausalLM) if stock == "llama" else (MistralConfig, MistralForCausalLM)
    )
    theirs = model_class(
        config_class(**LLAMA_SHAPE, rms_norm_eps=1e-5, rope_parameters=dict(parameters), **window)
    ).eval()
    randomize(theirs)
    choices = {"norm": "rms_norm", "bias": False, "gated_mlp": True, "hidden_act": "silu"}
    rope = {"position_encoding": "rope", "rope_parameters": parameters}
    ours = GPTForCausalLM(GPTConfig(**LLAMA_SHAPE, **choices, **rope, **window)).eval()
    weights = theirs.state_dict()
    for their_name, our_name in LLAMA_NAMES.items():
        weights = {key.replace(their_name, our_name): weight for key, weight in weights.items()}
    ours.load_state_dict(weights)  # strict: every weight has its place
    ids = torch.randint(61, (2, 40 if name == "rope_dynamic" else 32))  # dynamic shows past the context only
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=2e-5)
