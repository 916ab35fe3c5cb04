"""GPT-2's names for our tensors, which nanoGPT and all its children share, and what of ours they have no place for.

Linear weights are (outputs, inputs) here, as in torch and nanoGPT; transformers' GPT-2 keeps them the other way round.
"""

from collections.abc import Callable, Mapping

import torch

from modeling import GPTConfig, GPTForCausalLM

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


Obstacle = tuple[Callable[[GPTConfig], bool], str]

# field: (when it stands in the way, why), for transformers' GPT-2 and so for nanoGPT too
OBSTACLES: dict[str, Obstacle] = {
    "position_encoding": (lambda c: c.position_encoding == "rope", "positions are a table that is added"),
    "norm": (lambda c: c.norm != "layer_norm", "its norms are layer norms"),
    "norm_order": (lambda c: c.norm_order != "pre", "its norms come before the sub-layers"),
    "qk_norm": (lambda c: c.qk_norm, "it does not norm queries and keys"),
    "embedding_norm": (lambda c: c.embedding_norm, "it does not norm the embeddings"),
    "gated_mlp": (lambda c: c.gated_mlp, "its MLP has no gate"),
    "head_dim": (lambda c: c.head_dim * c.num_attention_heads != c.hidden_size, "its heads share out hidden_size"),
    "sliding_window": (
        lambda c: "sliding_attention" in c.layer_types and c.sliding_window < c.max_position_embeddings,
        "every layer sees the whole context",
    ),
    "kv_sharing_modes": (lambda c: "reuse" in (c.kv_sharing_modes or ()), "every layer has its own keys and values"),
    "lm_head_bias": (lambda c: c.lm_head_bias, "its head has no bias"),
    "logit_softcap": (lambda c: c.logit_softcap is not None, "it does not cap its logits"),
}


def in_the_way(config: GPTConfig, obstacles: Mapping[str, Obstacle]) -> list[str]:
    """`field=value (why)` for each obstacle that the config has."""
    found = ((name, why) for name, (stands, why) in obstacles.items() if stands(config))
    return [f"{name}={getattr(config, name)!r} ({why})" for name, why in found]
