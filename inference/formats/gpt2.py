"""Stock GPT-2, transformers' GPT2LMHeadModel, and its names for our tensors, which nanoGPT and its children share.

Linear weights are (outputs, inputs) as in torch and nanoGPT, but for GPT2LMHeadModel's own, see `turned`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.initialization import no_init_weights

from modeling import GPTConfig, GPTForCausalLM
from training.system.errors import UserError

from .base import SPECIAL_IDS, Format, Obstacle, Source, config_of, load_strictly, save_tokenizer

# theirs: ours; three of ours are one matrix of theirs, below one another
OUTSIDE = {
    "transformer.wte": ("model.embed_tokens",),
    "transformer.wpe": ("model.positions.embed",),
    "transformer.ln_f": ("model.final_norm",),
    "lm_head": ("lm_head",),
}
IN_LAYER = {
    "ln_1": ("attn_norm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("mlp_norm",),
    "mlp.c_fc": ("mlp.up_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
WITHOUT_BIAS = ("transformer.wte", "transformer.wpe", "lm_head")
KINDS = ("weight", "bias")
# Buffers with the causal mask, which transformers 2.9 to 4.29 saved, and nanoGPT where torch has no fused attention.
MASKS = (".attn.bias", ".attn.masked_bias")


def names(num_layers: int) -> dict[str, list[str]]:
    """Their module: ours."""
    inside = {
        f"transformer.h.{layer}.{theirs}": [f"model.layers.{layer}.{name}" for name in ours]
        for layer in range(num_layers)
        for theirs, ours in IN_LAYER.items()
    }
    return {theirs: list(ours) for theirs, ours in OUTSIDE.items()} | inside


def to_ours(theirs: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Their tensors under our names; what they do not have is left out."""
    return {
        f"{name}.{kind}": part
        for their_name, our_names in names(num_layers).items()
        for kind in KINDS
        if f"{their_name}.{kind}" in theirs
        for name, part in zip(our_names, theirs[f"{their_name}.{kind}"].chunk(len(our_names)), strict=True)
    }


@torch.no_grad()
def to_theirs(model: GPTForCausalLM, has_biases: bool) -> dict[str, torch.Tensor]:
    """Our weights under their names, filled up with what they have and we leave out.

    A norm without gain gets ones, a linear layer without bias zeros (`has_biases`), shared heads are repeated, and
    sinusoidal positions, or none, become the table that learned ones are.
    """
    config, ours = model.config, model.state_dict()
    if config.position_encoding != "rope":
        ours.setdefault("model.positions.embed.weight", position_table(model))
    weights = {}
    for their_name, our_names in names(config.num_hidden_layers).items():
        for kind in KINDS if has_biases and their_name not in WITHOUT_BIAS else KINDS[:1]:
            parts = [_whole(ours, name, kind, config) for name in our_names]
            if parts[0] is not None:  # rotary positions have no table
                weights[f"{their_name}.{kind}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return weights


def _whole(ours: dict[str, torch.Tensor], name: str, kind: str, config: GPTConfig) -> torch.Tensor | None:
    """Our tensor with rows for all query heads, or what stands for one that we leave out."""
    tensor = ours.get(f"{name}.{kind}")
    if tensor is not None and name.endswith(("k_proj", "v_proj")):
        heads = tensor.unflatten(0, (-1, config.head_dim))
        return heads.repeat_interleave(config.num_attention_heads // heads.shape[0], dim=0).flatten(0, 1)
    if tensor is None and kind == "bias":
        return torch.zeros(config.intermediate_size if name.endswith("up_proj") else config.hidden_size)
    return torch.ones(config.hidden_size) if tensor is None and "norm" in name else tensor


def position_table(model: GPTForCausalLM) -> torch.Tensor:
    """What the model adds to the embeddings at each position: (max_position_embeddings, hidden_size)."""
    positions = torch.arange(model.config.max_position_embeddings)
    nothing = torch.zeros(1, len(positions), model.config.hidden_size)
    return model.model.positions.add(nothing, positions[None])[0]


# field: (when it stands in the way, why), for transformers' GPT-2 and so for nanoGPT too
OBSTACLES: dict[str, Obstacle] = {
    "position_encoding": (lambda c: c.position_encoding == "rope", "positions are a table that is added"),
    "norm": (lambda c: c.norm != "layer_norm", "its norms are layer norms"),
    "norm_order": (lambda c: c.norm_order != "pre", "its norms come before the sub-layers"),
    "qk_norm": (lambda c: c.qk_norm, "it does not norm queries and keys"),
    "embedding_norm": (lambda c: c.embedding_norm, "it does not norm the embeddings"),
    "gated_mlp": (lambda c: c.gated_mlp, "its MLP has no gate"),
    "head_dim": (lambda c: c.head_dim * c.num_attention_heads != c.hidden_size, "its heads share out hidden_size"),
    "layer_types": (lambda c: "linear_attention" in c.layer_types, "every layer is softmax attention"),
    "sliding_window": (
        lambda c: "sliding_attention" in c.layer_types and c.sliding_window < c.max_position_embeddings,
        "every layer sees the whole context",
    ),
    "kv_sharing_modes": (lambda c: "reuse" in (c.kv_sharing_modes or ()), "every layer has its own keys and values"),
    "kv_quantization": (lambda c: c.kv_quantization is not None, "it does not quantize keys and values"),
    "kv_lora_rank": (lambda c: c.kv_lora_rank is not None, "every head has keys and values of its own"),
    "bigram_vocab_size": (lambda c: c.bigram_vocab_size is not None, "it embeds no pairs of tokens"),
    "value_embeddings": (lambda c: c.value_embeddings, "tokens are embedded once"),
    "memory_length": (lambda c: c.memory_length > 0, "it has no memory of the segments before"),
    "lm_head_bias": (lambda c: c.lm_head_bias, "its head has no bias"),
    "logit_softcap": (lambda c: c.logit_softcap is not None, "it does not cap its logits"),
}
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
ACTIVATIONS = {name: name for name in ("gelu_new", "gelu", "relu", "relu2", "silu")}  # theirs: ours
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers' Conv1D keeps (inputs, outputs)


def turned(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with those of a Conv1D transposed, there or back."""
    return {name: weight.T if name.endswith(TRANSPOSED) else weight for name, weight in weights.items()}


class GPT2(Format):
    """transformers' GPT2LMHeadModel."""

    title = "stock GPT-2"
    obstructing = OBSTACLES

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
