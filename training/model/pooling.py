"""Fewer key and value heads in a trained model: those of a group become their mean (GQA, arXiv 2305.13245)."""

import copy

import torch

from modeling import GPTConfig, GPTForCausalLM

from ..system.errors import UserError

POOLED = ("k_proj", "v_proj", "key_quantizer", "value_quantizer")


def refuse_unpoolable(name: str, config: GPTConfig, num_key_value_heads: int) -> None:
    """Refuse a number of heads that those of the model cannot be pooled into, each group as large as the others.

    Linear layers pool where a head is no more than its query, key and value.
    """
    has, what = config.num_key_value_heads, f"num_key_value_heads={num_key_value_heads}"
    if config.kv_lora_rank is not None:
        raise UserError(f"{what}: all heads of {name} share a latent (kv_lora_rank={config.kv_lora_rank}) already")
    for field in ("linear_attention", "linear_conv_kernel_dim"):
        if (value := getattr(config, field)) != getattr(GPTConfig, field):
            why = "gates and convolutions of linear layers do not pool"
            raise UserError(f"{what}: {name} has {field}={value!r}: {why}; pretrain a model with so many heads")
    choices = [count for count in range(1, has) if has % count == 0]
    if num_key_value_heads not in choices:
        mend = f"choose one of {', '.join(map(str, choices))}" if choices else "there is nothing to pool"
        raise UserError(f"{what}: {name} has {has}, which do not pool into so many; {mend}")


@torch.no_grad()
def pool_heads(model: GPTForCausalLM, num_key_value_heads: int) -> GPTForCausalLM:
    """A model of the same weights, but for each group of key and value heads their mean; it needs training then."""
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = num_key_value_heads
    weights = {name: mean_of_groups(name, weight, config) for name, weight in model.state_dict().items()}
    with torch.device("meta"):
        pooled = GPTForCausalLM(config)
    pooled.load_state_dict(weights, assign=True)
    pooled.tie_weights()
    pooled.model.positions = model.model.positions  # its buffers are in no checkpoint
    pooled.generation_config = model.generation_config
    return pooled.eval()


def mean_of_groups(name: str, weight: torch.Tensor, config: GPTConfig) -> torch.Tensor:
    """A weight or bias of keys or values, (heads * head_dim, …), with fewer heads; any other as it is.

    A value embedding, (vocabulary, heads * head_dim), has them in its columns.
    """
    if ".value_embeddings." in name and name.endswith("weight"):
        return mean_of_groups("v_proj.weight", weight.T, config).T.contiguous()
    if name.split(".")[-2] not in POOLED:
        return weight
    groups = weight.unflatten(0, (config.num_key_value_heads, -1, config.head_dim))
    return groups.mean(dim=1).flatten(0, 1)
