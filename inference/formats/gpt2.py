"""Stock GPT-2: transformers' GPT2LMHeadModel, as OpenAI's four models on the Hub are kept."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights

from modeling import GPTConfig, GPTForCausalLM
from training.system.errors import UserError

from .base import SPECIAL_IDS, Format, Source, config_of, load_strictly, save_tokenizer
from .layout import KINDS, MASKS, OBSTACLES, in_the_way, to_ours, to_theirs

FIELDS = {  # ours: theirs
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "embedding_dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
    "residual_dropout": "resid_pdrop",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    **{name: name for name in SPECIAL_IDS},
}
ACTIVATIONS = {  # theirs: ours; some have several names
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers' Conv1D keeps (inputs, outputs)


def turned(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with those of a Conv1D transposed, there or back."""
    return {name: weight.T if name.endswith(TRANSPOSED) else weight for name, weight in weights.items()}


class GPT2(Format):
    """transformers' GPT2LMHeadModel."""

    title = "stock GPT-2"

    def recognises(self, source: Source) -> bool:
        return source.config.get("model_type") == GPT2Config.model_type

    def load(self, source: Source) -> GPT2LMHeadModel:
        return load_strictly(GPT2LMHeadModel, source.name, MASKS)

    def config(self, theirs: GPT2LMHeadModel, tokenizer=None) -> GPTConfig:
        config, activation = theirs.config, theirs.config.activation_function
        if config.add_cross_attention:
            raise UserError("add_cross_attention=true: Acorn has no cross attention; the model cannot be converted")
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"activation_function={activation!r}: Acorn has not got it; it has {known}")
        fields = {ours: getattr(config, name) for ours, name in FIELDS.items()}
        return config_of("config.json", **fields, hidden_act=ACTIVATIONS[activation])

    def weights(self, theirs: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
        weights = to_ours(turned(theirs.state_dict()), theirs.config.n_layer)
        for layer, block in enumerate(theirs.transformer.h):
            # Unusual scales of attention (none, or one over the layer's number too) are taken into the queries.
            factor = block.attn.scaling * block.attn.head_dim**0.5
            is_usual = block.attn.scaling == block.attn.head_dim**-0.5
            for kind in () if is_usual else KINDS:
                name = f"model.layers.{layer}.self_attn.q_proj.{kind}"
                weights[name] = weights[name] * factor
        return weights

    def obstacles(self, config: GPTConfig) -> list[str]:
        return in_the_way(config, OBSTACLES)

    def write(self, model: GPTForCausalLM, tokenizer, directory: Path, destination: Path) -> list[str]:
        fields = {theirs: getattr(model.config, ours) for ours, theirs in FIELDS.items()}
        # llama.cpp reads the context length under its old name, n_ctx.
        config = GPT2Config(**fields, activation_function=model.config.hidden_act, n_ctx=fields["n_positions"])
        with no_init_weights():
            stock = GPT2LMHeadModel(config)
        stock.tie_weights()  # which comes with the initialisation otherwise
        stock.load_state_dict(turned(to_theirs(model, has_biases=True)))
        stock.generation_config = model.generation_config
        stock.save_pretrained(directory)
        return save_tokenizer(tokenizer, directory)
