"""Multi-head latent attention: a cache of one low-rank latent and one small rotary key a token, for all heads."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils.generic import is_flash_attention_requested

from .attention import SoftmaxAttention


def refuse_paged(cache) -> None:
    """Refuse the cache of continuous batching, which is no Cache, and of the name `cache` in all versions."""
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(
            "kv_lora_rank: a paged cache holds keys and values of one width, not latents; use generate() in place of "
            "generate_batch() and transformers serve"
        )


def check_latents(config) -> None:
    """Raise ValueError for sizes of latent attention where there is none, and for what does not go with it."""
    sizes = ("q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    given = [field for field in sizes if getattr(config, field) is not None]
    if config.kv_lora_rank is None:
        if given:
            raise ValueError(f"{given[0]}={getattr(config, given[0])} needs kv_lora_rank: give it, or leave this out")
        return
    config.refuse_below_one("kv_lora_rank", *given)
    if config.position_encoding != "rope":
        raise ValueError(
            f"kv_lora_rank={config.kv_lora_rank} needs position_encoding='rope', not {config.position_encoding!r}: "
            "part of its keys is rotary"
        )
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim={config.qk_rope_head_dim}: rope rotates pairs, so it must be even")
    if "linear_attention" in config.layer_types:
        raise ValueError("layer_types has linear_attention: does not go with kv_lora_rank; leave out one of them")
    others = {
        "head_dim": config.qk_rope_head_dim,
        "num_key_value_heads": 1,
        "qk_norm": False,
        "kv_quantization": None,
        "value_embeddings": False,
    }
    for field, value in others.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"{field}={getattr(config, field)!r}: does not go with kv_lora_rank, whose heads share a latent with "
                "a norm of its own and have qk_rope_head_dim and qk_nope_head_dim as sizes; leave it out"
            )


class LatentAttention(SoftmaxAttention):
    """Causal attention whose keys and values are computed from a latent (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    A head's key is a part of its own, from the latent, and a rotary part that all heads share, as a rotation cannot
    stand between a latent and its projection. The cache holds the rotary parts as its keys and the latents as its
    values, of one head each. A layer that reuses another's has a projection of its own from the latent, and none to it.
    """

    def _build_projections(self, config) -> None:
        heads, self.latent_dim = config.num_attention_heads, config.kv_lora_rank
        self.plain_dim, self.rotary_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.head_dim, self.value_dim = self.plain_dim + self.rotary_dim, config.v_head_dim
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1  # attended to are keys and values of every head

        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.bias)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.bias)
            self.q_a_norm = nn.RMSNorm(config.q_lora_rank, config.norm_eps, config.norm_gain)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * self.head_dim, bias=config.bias)
        if self.kv_source is None:
            self.kv_a_proj = nn.Linear(config.hidden_size, self.latent_dim + self.rotary_dim, bias=config.bias)
            self.kv_a_norm = nn.RMSNorm(self.latent_dim, config.norm_eps, config.norm_gain)
        self.kv_b_proj = nn.Linear(self.latent_dim, heads * (self.plain_dim + self.value_dim), bias=config.bias)
        self.o_proj = nn.Linear(heads * self.value_dim, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_embeddings=None,
        shared_key_values=None,
        rotate_keys=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As SoftmaxAttention's; the angles, and what is shared and held, are of the rotary part and the latent."""
        refuse_paged(kwargs.get("cache"))
        plain, rotary = self._split_heads(self._queries(hidden_states)).split((self.plain_dim, self.rotary_dim), dim=-1)
        rotary, key, latent = self._held(
            hidden_states, rotary, position_embeddings, shared_key_values, rotate_keys, kwargs
        )
        query, (key, value) = torch.cat((plain, rotary), dim=-1), self._expanded(key, latent)
        attended, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(attended.flatten(2)), weights

    def _keys_and_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary keys and latents, (batch, 1, tokens, rotary_dim) and (batch, 1, tokens, latent_dim)."""
        latent, key = self.kv_a_proj(hidden_states)[:, None].split((self.latent_dim, self.rotary_dim), dim=-1)
        return key, self.kv_a_norm(latent).to(key.dtype)  # under autocast the norm gives float32

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, heads * head_dim), by one projection or through a bottleneck of q_lora_rank."""
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(hidden_states)))

    def _expanded(self, key: torch.Tensor, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every head, (batch, heads, keys, head_dim) and (…, value_dim).

        key, latent: (batch, 1, keys, rotary_dim) and (batch, 1, keys, latent_dim).
        """
        heads = self.kv_b_proj(latent[:, 0]).unflatten(-1, (-1, self.plain_dim + self.value_dim)).transpose(1, 2)
        plain, value = heads.split((self.plain_dim, self.value_dim), dim=-1)
        return torch.cat((plain, key.expand(-1, plain.shape[1], -1, -1)), dim=-1), value

    def _attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As SoftmaxAttention's; flash attention gets values as wide as keys, as it takes no others."""
        if is_flash_attention_requested(self.config):
            value = nn.functional.pad(value, (0, self.head_dim - self.value_dim))
        attended, weights = super()._attend(query, key, value, attention_mask, **kwargs)
        return attended[..., : self.value_dim], weights


__all__ = ["LatentAttention", "check_latents"]
