"""A model that is trained with quantized keys and values, and its cache of codes: the same numbers, in few bits."""

import shutil
from shlex import split as words

import pytest
import torch
from transformers.cache_utils import DynamicCache

from modeling.compat import CACHE_NAME
from modeling.kv_quantization import CodedCache, CodedLayer, KVQuantizer, build_cache, hadamard, pack, unpack
from training import pretrain

from .tiny_runs import go_on, grow, metrics, refused, same_weights, tiny_argv, write_text
from .variants import random_model, tiny_config

KINDS = {"int2": 9.2, "int3": 14.0, "int4": 19.0}  # and the least that each reaches on normal numbers, in decibels
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "kv_quantization": "int2"}


def states(tokens: int = 7, head_dim: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 2, tokens, head_dim, generator=torch.Generator().manual_seed(seed))


def quantizer(kind: str, group: int, scale: float = 0.0) -> KVQuantizer:
    """A quantizer of two heads of 64 with biases of that size."""
    made = KVQuantizer(kind, group, kv_heads=2, head_dim=64)
    torch.nn.init.normal_(made.bias, std=scale, generator=torch.Generator().manual_seed(9))
    return made


def as_they_are(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return keys


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_come_out_of_their_bytes(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 5, 16), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, 2 * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits), codes)


def test_a_hadamard_matrix_is_its_own_inverse_and_keeps_lengths() -> None:
    given = states()
    turned = hadamard(given, 32)
    torch.testing.assert_close(hadamard(turned, 32), given)
    torch.testing.assert_close(turned.norm(dim=-1), given.norm(dim=-1))
    assert hadamard(torch.eye(4), 4).abs().eq(0.5).all()


@pytest.mark.parametrize(("kind", "least"), KINDS.items())
def test_levels_are_where_normal_numbers_want_them(kind: str, least: float) -> None:
    given = states(200)
    read = quantizer(kind, 64)(given)
    assert 10 * torch.log10(given.square().mean() / (read - given).square().mean()) > least


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-3, 1e3])
def test_numbers_of_any_size_stay_finite(scale: float) -> None:
    read = quantizer("int2", 32)(scale * states())
    assert read.isfinite().all()
    assert read.abs().max() <= max(1e-4, 6 * scale)


def test_the_gradient_goes_straight_through_and_leads_the_bias_to_the_mean() -> None:
    given, weights = (states() + 3).requires_grad_(), states(seed=1)
    made = quantizer("int2", 64)
    (made(given) * weights).sum().backward()
    assert torch.equal(given.grad, weights)
    assert made.bias.grad.lt(0).all()  # a step against it goes up
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        made(given).sum().backward()
        optimizer.step()
    torch.testing.assert_close(made.bias.detach(), given.detach().mean((0, 2)).flatten(), rtol=0, atol=0.1)


def test_training_may_begin_without_it_and_leads_the_bias_all_the_same() -> None:
    given, made = (states() + 3).requires_grad_(), quantizer("int2", 64)
    made.begins_later = True
    read = made(given)
    assert torch.equal(read, given)
    read.sum().backward()
    assert given.grad.eq(1).all() and made.bias.grad.lt(0).all()
    made.eval()  # what is evaluated is the model that will be loaded
    assert not torch.equal(made(given), given)


def test_a_run_begins_with_it_at_its_step_whether_it_was_stopped_or_not(tmp_path) -> None:
    flags = [
        *words("--position_encoding rope --kv_quantization int2 --n_head 1 --save_steps 2 --seed 3"),
        "--max_steps",
    ]
    never = grow(tmp_path, *flags, "8", "--kv_quantization", "none", name="never")
    later = grow(tmp_path, *flags, "8", "--kv_quantization_start", "0.875", name="later")
    whole = grow(tmp_path, *flags, "8", name="whole")
    losses = {run.name: [row["train_loss"] for row in metrics(run)] for run in (never, later, whole)}
    assert losses["later"][0] == losses["never"][0] != losses["whole"][0]
    assert losses["later"][1] != losses["never"][1]
    again = shutil.copytree(later, tmp_path / "again")
    go_on(again, "--checkpoint", "checkpoint-6")
    assert same_weights(again / "checkpoint-8", later / "checkpoint-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--kv_quantization none --kv_quantization_start 4", "kv_quantization_start=4: has no effect without"),
        ("--kv_quantization_start 8", "kv_quantization_start=8: the run ends with step 8; lower it"),
        ("--kv_quantization_start -1", "kv_quantization_start=-1"),
    ],
)
def test_starts_that_cannot_be(tmp_path, monkeypatch, flags: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    asked = ["--position_encoding", "rope", "--kv_quantization", "int2", "--n_head", "1", *words(flags)]
    assert message in refused(pretrain.main, *tiny_argv(*asked))
    assert not (tmp_path / "run").exists()


def test_what_tokens_have_in_common_costs_no_bits() -> None:
    common, given = 5 * states(1)[:1], states(50)
    made = quantizer("int2", 64)
    with torch.no_grad():
        far = (made(given + common) - given - common).square().mean()
        made.bias.copy_(common.flatten())
        near = (made(given + common) - given - common).square().mean()
    assert near < 0.15 < far / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_cache_gives_back_to_the_bit_what_attention_sees_without_one(kind: str, dtype: torch.dtype) -> None:
    both, layer = (quantizer(kind, 32, scale=0.5), quantizer(kind, 32, scale=0.2)), CodedLayer()
    keys, values = states(23).to(dtype), states(23, seed=1).to(dtype)
    for place in range(23):
        new = (keys[:, :, place : place + 1], values[:, :, place : place + 1])
        read = layer.update(*new, quantizers=both, rotate=as_they_are)
    assert torch.equal(read[0], both[0](keys)) and torch.equal(read[1], both[1](values))
    assert read[0].dtype == read[1].dtype == dtype


@pytest.mark.parametrize(("kind", "group", "bits"), [("int2", 64, 2.125), ("int2", 32, 2.25), ("int4", 32, 4.25)])
def test_bits_a_value_with_the_scales(kind: str, group: int, bits: float) -> None:
    layer = CodedLayer()
    layer.update(states(10), states(10), quantizers=[quantizer(kind, group)] * 2, rotate=as_they_are)
    assert layer.state_bits() == bits * 2 * states(10).numel()
    assert sum(len(held.numpy().tobytes()) for held in layer.state().values()) * 8 == layer.state_bits()


@torch.no_grad()
def test_generate_fills_it_by_itself(ids: torch.Tensor) -> None:
    model = random_model(tiny_config(**MIXED))
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    found = model.generate(ids[:, :6], **options)
    cache = getattr(found, CACHE_NAME)
    assert isinstance(cache, CodedCache)
    assert [layer.get_mask_sizes(1) for layer in cache.layers] == [(5, 9), (14, 0)]  # the last token has not been read
    assert cache.state_bits() == 3 * 8 * (4 + 13) * 2 * 4 * (2 + 1)  # rows, bits, tokens, keys and values, heads, bytes
    plain = {CACHE_NAME: DynamicCache(config=model.config)}
    given = model.generate(ids[:, :6], **options, **plain)
    assert type(getattr(given, CACHE_NAME)) is DynamicCache  # what a caller gives is taken
    assert torch.equal(given.sequences, found.sequences)


@pytest.mark.parametrize("more", [{"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}])
@torch.no_grad()
def test_beams_and_drafts_write_what_a_plain_cache_would(more: dict, ids: torch.Tensor) -> None:
    model = random_model(tiny_config(kv_quantization="int3"))
    model.generation_config.eos_token_id = None
    rows = ids[:1, :6].repeat(1, 2)
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **more}
    plain = {CACHE_NAME: DynamicCache(config=model.config)}
    assert torch.equal(model.generate(rows, **options), model.generate(rows, **options, **plain))


def test_rows_and_tokens_of_the_cache_can_be_taken() -> None:
    layer, given = CodedLayer(), {"quantizers": [quantizer("int2", 32)] * 2, "rotate": as_they_are}
    layer.update(states(6), states(6, seed=1), **given)
    layer.crop(-2)
    layer.batch_select_indices(torch.tensor([2, 0]))
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([0, 3]))
    new = states(1, seed=2)[:2]
    keys, _ = layer.update(new, new, **given)
    assert keys.shape == (2, 2, 5, 64) and layer.get_seq_length() == 5
    assert torch.equal(keys[:, :, :4], quantizer("int2", 32)(states(6))[[2, 0], :, :4])
    layer.reset()
    assert (layer.get_seq_length(), layer.state(), layer.state_bits()) == (0, {}, 0)


def test_a_window_gives_drafts_back_where_it_was_told_that_they_come() -> None:
    layer, given = CodedLayer(sliding_window=4), {"quantizers": [quantizer("int2", 32)] * 2, "rotate": as_they_are}
    layer.update(states(6), states(6, seed=1), **given)
    with pytest.raises(ValueError, match="the window has let go"):
        layer.crop(-1)
    layer.activate_past_recording()
    drafts = states(3, seed=2)
    layer.update(drafts, drafts, **given)
    layer.crop(-2)
    assert (layer.length, layer.get_seq_length()) == (3, 7)
    keys, _ = layer.update(drafts, drafts, **given)
    expected = torch.cat((states(6)[:, :, 4:], drafts[:, :, :1], drafts), dim=2)
    assert torch.equal(keys, quantizer("int2", 32)(expected))


@torch.no_grad()
def test_only_layers_of_keys_and_values_hold_codes(ids: torch.Tensor) -> None:
    model = random_model(tiny_config(kv_sharing_modes=["store", "reuse"], kv_quantization="int2"))
    cache = build_cache(model.config)
    model(ids, use_cache=True, **{CACHE_NAME: cache})
    assert cache.state_bits() == cache.layers[0].state_bits() > 0
    assert type(build_cache(tiny_config())) is DynamicCache
