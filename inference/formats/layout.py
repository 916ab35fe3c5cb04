"""GPT-2's names for our tensors, which nanoGPT and all its children share, and what of ours they have no place for.

Linear weights are (outputs, inputs) here, as in torch and nanoGPT; transformers' GPT-2 keeps them the other way round.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from modeling import GPTConfig, GPTForCausalLM

OUTSIDE = {  # ours: theirs
    "model.embed_tokens": "transformer.wte",
    "model.positions.embed": "transformer.wpe",
    "model.final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
IN_LAYER = {
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
JOINT = ("q_proj", "k_proj", "v_proj")  # theirs is one matrix, attn.c_attn, with these below one another
KINDS = ("weight", "bias")
# Buffers with the causal mask, which transformers 2.9 to 4.29 saved, and nanoGPT where torch has no fused attention.
MASKS = (".attn.bias", ".attn.masked_bias")


def named_pairs(num_layers: int) -> Iterator[tuple[str, str]]:
    """(our module, their module) wherever one is one."""
    yield from OUTSIDE.items()
    for layer in range(num_layers):
        yield from ((f"model.layers.{layer}.{ours}", f"transformer.h.{layer}.{IN_LAYER[ours]}") for ours in IN_LAYER)


def joints(num_layers: int) -> Iterator[tuple[list[str], str]]:
    """(our three projections, their joint one) of each layer."""
    for layer in range(num_layers):
        yield [f"model.layers.{layer}.self_attn.{name}" for name in JOINT], f"transformer.h.{layer}.attn.c_attn"


def to_ours(theirs: Mapping[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Their tensors under our names; what they do not have is left out."""
    weights = {}
    for kind in KINDS:
        for our_name, their_name in named_pairs(num_layers):
            if f"{their_name}.{kind}" in theirs:
                weights[f"{our_name}.{kind}"] = theirs[f"{their_name}.{kind}"]
        for our_names, their_name in joints(num_layers):
            if f"{their_name}.{kind}" in theirs:
                parts = theirs[f"{their_name}.{kind}"].chunk(3)
                weights |= {f"{name}.{kind}": part for name, part in zip(our_names, parts, strict=True)}
    return weights


@torch.no_grad()
def to_theirs(model: GPTForCausalLM, has_biases: bool) -> dict[str, torch.Tensor]:
    """Our weights under their names, filled up with what they have and we leave out.

    A norm without gain gets ones, a linear layer without bias zeros (`has_biases`), shared heads are repeated, and
    sinusoidal positions, or none, become the table that learned ones are.
    """
    config, ours = model.config, model.state_dict()
    weights = {}
    if config.position_encoding != "rope":
        weights["transformer.wpe.weight"] = position_table(model)
    for our_name, their_name in named_pairs(config.num_hidden_layers):
        weight = ours.get(f"{our_name}.weight")
        if weight is None and "norm" in our_name:
            weight = torch.ones(config.hidden_size, device=model.device)
        if weight is not None:
            weights[f"{their_name}.weight"] = weight
        if has_biases and our_name not in ("model.embed_tokens", "model.positions.embed", "lm_head"):
            weights[f"{their_name}.bias"] = ours.get(f"{our_name}.bias", weight.new_zeros(weight.shape[0]))
    for our_names, their_name in joints(config.num_hidden_layers):
        for kind in KINDS if has_biases else KINDS[:1]:
            parts = [_every_head(ours, f"{name}.{kind}", config) for name in our_names]
            weights[f"{their_name}.{kind}"] = torch.cat(parts)
    return weights


def _every_head(ours: dict, name: str, config: GPTConfig) -> torch.Tensor:
    """A query, key or value weight or bias with rows for all query heads, or zeros for a bias that is not there."""
    if name not in ours:
        return torch.zeros(config.hidden_size)
    heads = ours[name].unflatten(0, (-1, config.head_dim))
    return heads.repeat_interleave(config.num_attention_heads // heads.shape[0], dim=0).flatten(0, 1)


def position_table(model: GPTForCausalLM) -> torch.Tensor:
    """What the model adds to the embeddings at each position: (max_position_embeddings, hidden_size)."""
    positions = torch.arange(model.config.max_position_embeddings, device=model.device)
    nothing = torch.zeros(1, len(positions), model.config.hidden_size, device=model.device)
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
