"""The cache policies: without loss the text of the plain cache, else the tokens, bits and refusals that they say."""

import pytest
import safetensors.torch
import torch

from inference.caches.policies import build_cache
from modeling.compat import CACHE_NAME

from .variants import INEXACT_WITH_CACHE, VARIANTS, random_model, tiny_config

LOSSLESS = {"window": {"cache_window": 26, "cache_sinks": 2}}  # 28 of a context of 32, and no text is longer
LOSSY = {"window": {"cache_window": 6, "cache_sinks": 2}}
EXACT = [name for name in VARIANTS if name not in INEXACT_WITH_CACHE]


def endless(name: str, **overrides):
    """The variant of that name, which no token ends."""
    model = random_model(tiny_config(**VARIANTS[name] | overrides))
    model.generation_config.eos_token_id = None
    return model


def grown(model, ids: torch.Tensor, cache=None, tokens: int = 8, mask=None, **generation) -> torch.Tensor:
    """Greedy text with this cache, or generate()'s own."""
    more = {} if cache is None else {CACHE_NAME: cache}
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"do_sample": False, "pad_token_id": 0, **more, **generation}
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **settings)


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("name", LOSSLESS)
@torch.no_grad()
def test_without_loss_the_text_is_the_plain_caches(name: str, variant: str, ids: torch.Tensor) -> None:
    model = endless(variant)
    for more in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        cache = build_cache(model.config, name, **LOSSLESS[name])
        assert torch.equal(grown(model, ids, cache, **more), grown(model, ids, **more))
        assert cache.has_gaps or "sliding" in variant


@pytest.mark.parametrize("name", LOSSY)
@torch.no_grad()
def test_its_bits_are_the_bytes_that_its_state_serialises_to(name: str, ids: torch.Tensor) -> None:
    model = endless("shared_kv_mixed_layers")
    cache = build_cache(model.config, name, **LOSSY[name])
    grown(model, ids, cache)
    written = safetensors.torch.save({key: tensor.contiguous() for key, tensor in cache.state().items()})
    header = 8 + int.from_bytes(written[:8], "little")
    assert cache.state_bits() == 8 * (len(written) - header) > 0
