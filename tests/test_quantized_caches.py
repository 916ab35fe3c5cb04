"""Caches of codes: how close what is read back is, that nothing is coded twice, and how few bits that takes."""

import pytest
import safetensors.torch
import torch

from inference.caches.codes import Affine, Float8, Symmetric, from_bytes, to_bytes
from inference.caches.policies import build_cache
from modeling.compat import CACHE_NAME
from training.system.errors import UserError

from .variants import random_model, tiny_config

KINDS = ("int8", "fp8", "int4", "int3", "int2")
WIDE = {"hidden_size": 128, "max_position_embeddings": 256, "position_encoding": "rope"}  # heads of 32


def states(tokens: int, seed: int = 0, heads: int = 2, head_dim: int = 32) -> torch.Tensor:
    return torch.randn(3, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))


def empty(name: str, **settings):
    """A layer of a cache with this policy."""
    overrides = settings.pop("config", WIDE)
    return build_cache(tiny_config(**overrides), name, torch.float16, **settings).layers[0]


def decibels(read: torch.Tensor, given: torch.Tensor) -> float:
    return float(10 * torch.log10(given.square().mean() / (read - given).square().mean()))


# ---- numbers


@pytest.mark.parametrize(
    ("numbers", "least"),
    [(Symmetric(8), 43), (Float8(), 31), (Affine(4), 19), (Symmetric(4), 18), (Affine(3), 12), (Affine(2), 5)],
)
def test_a_group_is_read_back_as_closely_as_its_bits_allow(numbers, least: float) -> None:
    groups = states(64)
    coded = numbers.encode(groups)
    assert decibels(numbers.decode(coded), groups) > least
    assert coded.codes.dtype == coded.scales.dtype == torch.uint8
    assert int(coded.codes.max()) < 2**numbers.bits


@pytest.mark.parametrize("numbers", [Symmetric(8), Float8(), Affine(4), Affine(2), Symmetric(4)])
@pytest.mark.parametrize("constant", [0.0, 1.0, -700.0, 1e-3])
def test_a_group_without_spread_keeps_its_size(numbers, constant: float) -> None:
    groups = torch.full((2, 32), constant)
    read = numbers.decode(numbers.encode(groups))
    torch.testing.assert_close(read, groups, rtol=0.1, atol=1e-4)


def test_a_group_far_from_zero_keeps_its_place() -> None:
    groups = 50 + 0.1 * states(4)
    assert (Affine(2).decode(Affine(2).encode(groups)) - groups).abs().max() < 0.5


def test_floating_point_codes_are_better_beside_an_outlier() -> None:
    groups = states(64)
    groups[..., 0] = 60
    small = slice(1, None)
    float8, int8 = (
        decibels(n.decode(n.encode(groups))[..., small], groups[..., small]) for n in (Float8(), Symmetric(8))
    )
    assert float8 > int8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [6, 8, 13, 32])
def test_codes_fill_the_fewest_bytes(bits: int, head_dim: int) -> None:
    codes = torch.randint(2**bits, (2, 5, head_dim), dtype=torch.uint8)
    packed = to_bytes(codes, bits)
    unit = 3 if bits == 3 else 1
    assert packed.shape[-1] == unit * -(-head_dim * bits // (8 * unit))
    assert torch.equal(from_bytes(packed, bits, head_dim), codes)


# ---- a layer


@pytest.mark.parametrize("name", KINDS)
def test_what_was_coded_is_never_coded_again(name: str) -> None:
    layer, before = empty(name), {}
    for place in range(70):
        layer.update(states(1, place), states(1, 1000 + place))
        now = {key: value for key, value in layer.store.state().items() if not key.endswith("full")}
        for key, old in before.items():
            assert torch.equal(now[key][:, :, : old.shape[2]], old), key
        before = now
    assert layer.store.length == layer.seen == 70


@pytest.mark.parametrize("name", KINDS)
def test_what_is_read_is_what_is_held_from_the_first_update_on(name: str) -> None:
    keys, values = states(64), states(64, 1)
    layer = empty(name)
    read_keys, read_values = layer.update(keys, values)
    assert not torch.equal(read_keys, keys) and not torch.equal(read_values, values)
    again = layer.update(states(1, 2), states(1, 3))
    assert torch.equal(again[0][:, :, :64], read_keys)
    assert torch.equal(again[1][:, :, :64], read_values)


@pytest.mark.parametrize("name", KINDS)
def test_the_newest_are_held_in_full(name: str) -> None:
    keys, values = states(50).half().float(), states(50, 1).half().float()
    layer = empty(name, cache_window=10)
    for place in range(50):
        read_keys, read_values = layer.update(keys[:, :, place : place + 1], values[:, :, place : place + 1])
    assert torch.equal(read_keys[:, :, -10:], keys[:, :, -10:])
    assert torch.equal(read_values[:, :, -10:], values[:, :, -10:])
    assert not torch.equal(read_values[:, :, 39], values[:, :, 39])


@pytest.mark.parametrize(
    ("name", "bits"), [("int8", 8.25), ("fp8", 8.25), ("int4", 4.375), ("int3", 3.5), ("int2", 2.5)]
)
def test_how_many_bits_a_number_takes(name: str, bits: float) -> None:
    layer = empty(name)
    layer.update(states(64), states(64, 1))
    assert layer.state_bits() - 64 == bits * 2 * 3 * 2 * 64 * 32  # 64 of them count the tokens seen


@pytest.mark.parametrize("name", ["int4", "h2o+int2", "window+int8", "tova+fp8", "random+int3"])
@torch.no_grad()
def test_its_bits_are_the_bytes_that_its_state_serialises_to(name: str) -> None:
    model = random_model(tiny_config(**WIDE, num_key_value_heads=2))
    settings = {"cache_budget": 20} if "+" in name else {}
    cache, ids = build_cache(model.config, name, **settings), torch.arange(123).view(3, 41) % 61
    for piece in ids.split([30, 1, 10], dim=1):
        logits = model(piece, use_cache=True, **{CACHE_NAME: cache}).logits
    assert logits.isfinite().all()
    written = safetensors.torch.save({key: tensor.contiguous() for key, tensor in cache.state().items()})
    header = 8 + int.from_bytes(written[:8], "little")
    assert cache.state_bits() == 8 * (len(written) - header) > 0


@pytest.mark.parametrize("name", ["window", "random"])
def test_an_eviction_drops_the_same_tokens_over_any_store(name: str) -> None:
    plain, coded = empty(name, cache_budget=12), empty(f"{name}+int8", cache_budget=12)
    for place in range(40):
        new, query = (states(1, place), states(1, 1000 + place)), states(1, 2000 + place, heads=4)
        expected = plain.update(*new, query_states=query, rotate=None, scaling=0.2)
        found = coded.update(*new, query_states=query, rotate=None, scaling=0.2)
        torch.testing.assert_close(found[1], expected[1], rtol=0.02, atol=0.02)
    assert coded.store.length == plain.store.length <= 12


def test_heads_that_keep_other_tokens_code_what_not_all_keep() -> None:
    layer = empty("h2o+int4", cache_budget=16, cache_window=6)
    for place in range(30):
        new, query = (states(1, place), states(1, 1000 + place)), states(1, 2000 + place, heads=4)
        keys, _ = layer.update(*new, query_states=query, rotate=None, scaling=1.0)
    held = layer.store.parts["key"]
    assert held.length == 16 and 6 <= held.full.shape[-2] < 16
    torch.testing.assert_close(
        keys[:, :, -6:], torch.cat([states(1, i) for i in range(24, 30)], 2), rtol=2e-3, atol=2e-3
    )


def test_turning_spreads_an_outlier() -> None:
    values = states(64)
    values[..., 3] *= 30
    turned, plain = (empty("int4", cache_rotation=how).update(states(64, 1), values)[1] for how in ("hadamard", "none"))
    others = [channel for channel in range(32) if channel != 3]
    assert decibels(turned[..., others], values[..., others]) > decibels(plain[..., others], values[..., others]) + 3


# ---- a model


@torch.no_grad()
def test_fewer_bits_are_read_less_exactly() -> None:
    model = random_model(tiny_config(**WIDE))
    ids = torch.arange(150).view(2, 75) * 7 % 61
    expected, far = model(ids, use_cache=False).logits, {}
    for name in KINDS:
        cache = build_cache(model.config, name)
        logits = [model(piece, use_cache=True, **{CACHE_NAME: cache}).logits for piece in ids.split(15, dim=1)]
        far[name] = float((torch.cat(logits, 1) - expected).square().mean().sqrt())
    assert 0 < far["int8"] < 0.2 < expected.std()
    assert far["int8"] < far["fp8"] < far["int4"] < far["int3"] < far["int2"]


@torch.no_grad()
def test_beams_and_samples_of_one_prompt() -> None:
    model = random_model(tiny_config(**WIDE))
    model.generation_config.eos_token_id = None
    ids, options = torch.arange(40).view(1, 40), {"max_new_tokens": 6, "pad_token_id": 0}
    for more in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3}):
        cache = build_cache(model.config, "int3", cache_window=4)
        rows = model.generate(ids, **options, **more, **{CACHE_NAME: cache})
        assert rows.shape == (more["num_return_sequences"], 46)


@pytest.mark.parametrize("head_dim", [6, 7, 24, 48])
@torch.no_grad()
def test_any_head_can_be_held(head_dim: int) -> None:
    model = random_model(tiny_config(head_dim=head_dim, max_position_embeddings=64))
    for name in KINDS:
        cache = build_cache(model.config, name)
        assert model(torch.arange(40)[None], use_cache=True, **{CACHE_NAME: cache}).logits.isfinite().all()


REFUSED = {
    "a group that does not divide the head": ("int4", {"cache_group": 24}, {}, "cache_group=24: .*head_dim=32"),
    "a group larger than the head": ("int2", {"cache_group": 64}, {}, "cache_group=64: .*head_dim=32"),
    "an unknown rotation": ("int4", {"cache_rotation": "random"}, {}, "cache_rotation.*hadamard"),
    "a rotation of none": ("window", {"cache_rotation": "none", "cache_window": 8}, {}, "cache_rotation=none: has no"),
    "two kinds": ("int4+int2", {}, {}, r"int4\+int2: one policy"),
    "a head that cannot be turned": (
        "int4",
        {"cache_rotation": "hadamard"},
        {"head_dim": 7},
        "cache_rotation=hadamard",
    ),
    "a model that quantizes": ("int4", {}, {"kv_quantization": "int2"}, "own cache holds int2"),
}


@pytest.mark.parametrize(("name", "settings", "overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_in_one_line(name: str, settings: dict, overrides: dict, message: str) -> None:
    config = tiny_config(**({"hidden_size": 128} | overrides))
    with pytest.raises(UserError, match=message) as caught:
        build_cache(config, name, **settings)
    assert "\n" not in str(caught.value)
