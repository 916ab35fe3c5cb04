"""transformers' generate_batch, which `transformers serve` answers many requests with: the same text as generate()."""

import inspect

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from .variants import HOLDS_LATENTS, VARIANTS, WITHOUT_KEYS, random_model, tiny_config

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [3]]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
# Without a GPU transformers cannot find the size itself; pages are `block_size` long before 5.18.
PAGE = next(
    name for name in ("page_size", "block_size") if name in inspect.signature(ContinuousBatchingConfig).parameters
)
SMALL = {PAGE: 16, "num_blocks": 32, "max_batch_tokens": 64}
# One of each way that a layer finds its keys: its own, a window's, another layer's.
QUICK = ("rope", "mixed_layers", "shared_kv_two_groups")


def answered(model) -> dict:
    """What generate_batch makes of the prompts, by request."""
    return model.generate_batch(
        PROMPTS,
        generation_config=GenerationConfig(eos_token_id=-1, **GREEDY),
        continuous_batching_config=ContinuousBatchingConfig(**SMALL),
        progress_bar=False,
    )


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("paged|eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in VARIANTS
        if name not in WITHOUT_KEYS
    ],
)
def test_a_batch_of_requests_generates_what_each_alone_does(name: str, backend: str) -> None:
    model = random_model(tiny_config(**VARIANTS[name]))
    alone = [model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    model.set_attn_implementation(backend)
    outputs = answered(model)
    if name in HOLDS_LATENTS:
        assert all("kv_lora_rank: a paged cache" in output.error for output in outputs.values())
        return
    if name == "bigrams":
        assert all("bigram_vocab_size: needs the last token" in output.error for output in outputs.values())
        return
    assert [outputs[name].generated_tokens for name in sorted(outputs)] == alone
