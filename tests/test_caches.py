"""The cache policies: without loss the text of the plain cache, else the tokens, bits and refusals that they say."""

import pytest
import safetensors.torch
import torch

from inference.caches.policies import build_cache
from modeling.compat import CACHE_NAME

from .variants import INEXACT_WITH_CACHE, VARIANTS, random_model, tiny_config

# 28 of a context of 32, and no text is longer
LOSSLESS = {name: {"cache_budget": 28} for name in ("window", "h2o", "tova", "random")}
LOSSY = {name: {"cache_budget": 8, "cache_sinks": 2} for name in LOSSLESS}
EXACT = [name for name in VARIANTS if name not in INEXACT_WITH_CACHE]
SHAPES = ("gpt2", "grouped_query", "mixed_layers_full_first", "shared_kv_rope", "modern")


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
@torch.no_grad()
def test_without_loss_the_text_is_the_plain_caches(variant: str, ids: torch.Tensor) -> None:
    model = endless(variant)
    expected = grown(model, ids, tokens=4)
    for name, settings in LOSSLESS.items():
        cache = build_cache(model.config, name, **settings)
        assert torch.equal(grown(model, ids, cache, tokens=4), expected), name
        assert all(layer.store.length == layer.seen or layer.is_sliding for layer in cache.holding.values())


@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("name", LOSSLESS)
@torch.no_grad()
def test_beams_take_what_is_held_with_them(name: str, variant: str, ids: torch.Tensor) -> None:
    model, beams = endless(variant), {"num_beams": 3, "num_return_sequences": 2}
    cache = build_cache(model.config, name, **LOSSLESS[name])
    assert torch.equal(grown(model, ids, cache, **beams), grown(model, ids, **beams))


@pytest.mark.parametrize("name", LOSSY)
@torch.no_grad()
def test_its_bits_are_the_bytes_that_its_state_serialises_to(name: str, ids: torch.Tensor) -> None:
    model = endless("shared_kv_mixed_layers")
    cache = build_cache(model.config, name, **LOSSY[name])
    grown(model, ids, cache)
    written = safetensors.torch.save({key: tensor.contiguous() for key, tensor in cache.state().items()})
    header = 8 + int.from_bytes(written[:8], "little")
    assert cache.state_bits() == 8 * (len(written) - header) > 0
