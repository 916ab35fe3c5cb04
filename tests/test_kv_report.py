"""The measure of caches: what decoding through one gives, against whole passes and known numbers."""

import math

import pytest
import torch

from inference.caches.policies import build_cache
from inference.measuring.kv_report import cut_streams, decode, drawn_mean, own_cache, paired
from inference.measuring.recall import plant, recalled
from training.model.loading import load_model_and_tokenizer
from training.system.errors import UserError

from .variants import VARIANTS, random_model, tiny_config

LENGTH = 24


@pytest.fixture(scope="module")
def streams():
    """Ten streams of 24 random tokens, of which the last 12 count."""
    ids = torch.randint(61, (10 * LENGTH + 1,), generator=torch.Generator().manual_seed(3))
    return cut_streams(ids, LENGTH, most=20, bytes_per_token=2.0)


@pytest.fixture(scope="module")
def model():
    """A model with rotary positions and grouped heads, none of whose weights is zero."""
    return random_model(tiny_config(**VARIANTS["modern"]))


def through(model, streams, *policy, **settings):
    """What is decoded through a policy, in float32."""
    return decode(model, streams.ids, streams.first, lambda: build_cache(model.config, *policy, **settings), 4)


def test_streams_are_contiguous_and_spread_over_the_text() -> None:
    streams = cut_streams(torch.arange(1001), 100, most=8, bytes_per_token=1.0)
    assert streams.ids.shape == (8, 101)
    assert torch.equal(streams.ids.diff(dim=1), torch.ones(8, 100, dtype=torch.long))
    assert (streams.ids[0, 0], streams.ids[-1, -1], streams.length, streams.first) == (0, 1000, 100, 50)
    assert (streams.ids[1:, 0] >= streams.ids[:-1, -1]).all()  # no target is counted twice


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UserError, match=r"300 tokens: 8 streams of 100 need 801; .*--length"):
        cut_streams(torch.arange(300), 100, most=8, bytes_per_token=1.0)


@pytest.mark.parametrize("variant", ["gpt2", "modern", "mixed_layers_full_first", "shared_kv_rope"])
@torch.no_grad()
def test_the_models_own_cache_gives_the_losses_of_whole_passes(variant: str, streams) -> None:
    model = random_model(tiny_config(**VARIANTS[variant]))
    decoded = decode(model, streams.ids, streams.first, own_cache, batch_size=3)
    logits = model(streams.ids[:, :-1], use_cache=False).logits[:, streams.first :]
    targets = streams.ids[:, streams.first + 1 :]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(decoded.nats, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(decoded.right, logits.argmax(-1) == targets)


def test_a_lossless_policy_loses_exactly_nothing(model, streams) -> None:
    full = through(model, streams, "full")
    same = through(model, streams, "window", cache_budget=LENGTH)
    lost, percent = paired(same.nats, full.nats, num_bytes=100.0, seed=0)
    assert (lost.value, lost.low, lost.high) == (percent.value, percent.low, percent.high) == (0, 0, 0)
    assert same.bits == full.bits > same.mean_bits


def test_a_harmful_policy_is_found_to_be_one(grown) -> None:
    model, tokenizer = load_model_and_tokenizer(str(grown))
    ids = torch.tensor(tokenizer((grown.parent / "text.txt").read_text()[:900], add_special_tokens=False)["input_ids"])
    streams = cut_streams(ids, 48, most=16, bytes_per_token=1.0)
    full, short = through(model, streams, "full"), through(model, streams, "window", cache_budget=2, cache_sinks=0)
    lost, percent = paired(short.nats, full.nats, num_bytes=float(full.nats.numel()), seed=0)
    assert 0 < lost.low < lost.value < lost.high
    assert percent.value == pytest.approx(100 * (short.nats.sum() / full.nats.sum() - 1).item(), rel=1e-4)
    assert lost.value == pytest.approx((short.nats - full.nats).mean().item() / math.log(2), rel=1e-4)
    assert short.bits < full.bits / 10


def test_bits_are_those_of_one_row_at_16_bits_a_number(model, streams) -> None:
    full = decode(model, streams.ids, streams.first, lambda: build_cache(model.config, "full", torch.float16), 4)
    config = model.config
    numbers = 2 * LENGTH * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert full.bits == 16 * numbers + 64 * config.num_hidden_layers  # each layer counts the tokens that it has seen
    own = decode(model, streams.ids, streams.first, own_cache, 4)
    assert own.bits == 16 * numbers
    assert own.mean_bits == pytest.approx(16 * numbers * (1 + streams.first + LENGTH) / 2 / LENGTH)


def test_a_state_of_a_fixed_size_is_counted_as_it_is(streams) -> None:
    model = random_model(tiny_config(layer_types=["linear_attention"] * 2, position_encoding="none"))
    held = decode(model, streams.ids, streams.first, own_cache, 4)
    assert held.bits > 0
    assert held.mean_bits == pytest.approx(held.bits)


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of known streams: the truth lies within 95 of 100 intervals, give or take what 200 draws do."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        baseline = 1 + torch.rand(40, 8, generator=generator)
        nats = baseline + 0.03 + 0.1 * torch.randn(40, 1, generator=generator)  # a stream's targets hang together
        lost, _ = paired(nats, baseline, num_bytes=320 / math.log(2), seed=seed)
        covered += lost.low <= 0.03 <= lost.high
    assert 178 <= covered <= 199


def test_an_interval_is_the_same_for_the_same_seed() -> None:
    values = torch.arange(12.0)
    assert drawn_mean(values, 5) == drawn_mean(values, 5) != drawn_mean(values, 6)
    assert drawn_mean(values, 5).value == 5.5
    assert drawn_mean(torch.full((9,), 2.0), 1) == (2.0, 2.0, 2.0)


# ---- recall


def test_a_probe_holds_its_passage_twice_at_each_distance(streams) -> None:
    probe = plant(streams, rows=3)
    assert probe.distances.tolist() == [0] * 3 + [13] * 3 + [6] * 3
    passage = probe.ids[:, -6:]
    assert torch.equal(passage, streams.ids[[5, 6, 7], :6].repeat(3, 1))
    for row, distance in zip(probe.ids, probe.distances.tolist(), strict=True):
        start = LENGTH + 1 - 6 - distance
        assert torch.equal(row[start : start + 6], row[-6:])
    assert torch.equal(probe.ids[:3, :-6], streams.ids[:3, :-6])


def test_recall_is_what_the_copy_gains(streams) -> None:
    probe = plant(streams, rows=3)
    nats = torch.full((9, 12), 5.0)
    nats[3:6, -4:] = 1.0  # the value's four tokens, at distance 13
    without, near, far = recalled(probe, nats, nats < 2)
    assert (without.distance, near.distance, far.distance) == (0, 6, 13)
    assert (without.gain, near.gain, far.gain) == (0, 0, 4)
    assert (without.accuracy, near.accuracy, far.accuracy) == (0, 0, 1)
