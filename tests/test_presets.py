"""The presets have the sizes that their papers and checkpoints have; built on the meta device, without memory."""

import pytest
import torch

from modeling import GPTConfig, GPTForCausalLM
from training.config.presets import PRESETS

EXACT = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "nanogpt": 124_439_808 - 12 * (2 * 768 + 4 * 768 + 4 * 768 + 768) - 768,  # gpt2 without biases
}
IN_MILLIONS = {"toygpt-small": 123.70, "toygpt-medium": 253.06, "toygpt-large": 1311.58}
# Brown et al. 2020, table 2.1: the size in the name, layers, width, heads, head size.
GPT3 = {
    "gpt3-small": (125e6, 12, 768, 12, 64),
    "gpt3-medium": (350e6, 24, 1024, 16, 64),
    "gpt3-large": (760e6, 24, 1536, 16, 96),
    "gpt3-xl": (1.3e9, 24, 2048, 24, 128),
    "gpt3-2.7b": (2.7e9, 32, 2560, 32, 80),
    "gpt3-6.7b": (6.7e9, 32, 4096, 32, 128),
    "gpt3-13b": (13e9, 40, 5140, 40, 128),
    "gpt3-175b": (175e9, 96, 12288, 96, 128),
}


def build(name: str) -> GPTForCausalLM:
    with torch.device("meta"):
        return GPTForCausalLM(GPTConfig(**PRESETS[name]))


def count(name: str) -> int:
    """Parameters of the preset, a tied head counted once."""
    return sum(parameter.numel() for parameter in build(name).parameters())


def gpt3_count(layers: int, width: int, heads: int, head_dim: int) -> int:
    """The parameters of a decoder with biases, learned positions and tied embeddings, added up by hand."""
    inner = heads * head_dim
    attention = 3 * (width * inner + inner) + inner * width + width
    mlp = width * 4 * width + 4 * width + 4 * width * width + width
    norms = 2 * 2 * width
    return (50257 + 2048) * width + layers * (attention + mlp + norms) + 2 * width


@pytest.mark.parametrize("name", EXACT)
def test_exact_counts(name: str) -> None:
    assert count(name) == EXACT[name]


@pytest.mark.parametrize("name", IN_MILLIONS)
def test_counts_in_millions(name: str) -> None:
    assert round(count(name) / 1e6, 2) == IN_MILLIONS[name]


@pytest.mark.parametrize("name", GPT3)
def test_gpt3_counts(name: str) -> None:
    size, *shape = GPT3[name]
    _, width, heads, head_dim = shape
    assert count(name) == gpt3_count(*shape)
    if heads * head_dim == width:  # of gpt3-xl and gpt3-13b the paper's own table does not add up
        assert count(name) == pytest.approx(size, rel=0.03)


def test_baby_count_without_positions() -> None:
    model = build("baby")
    positions = model.model.positions.embed.weight.numel()
    assert round((count("baby") - positions) / 1e6, 2) == 10.65


def test_every_preset_is_counted_and_every_gpt3_is_there() -> None:
    assert {*EXACT, *IN_MILLIONS, *GPT3, "baby", "baby-cpu"} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_nothing_but_fields(name: str) -> None:
    fields = GPTConfig().to_dict()  # an unknown argument would be taken in silence
    assert [argument for argument in PRESETS[name] if argument not in fields] == []
