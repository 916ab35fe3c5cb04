"""Linear attention: three forms of one computation, and a state that does not grow."""

import math

import pytest
import torch
from transformers import DynamicCache

from modeling import GPTForCausalLM
from modeling.compat import CACHE_NAME
from modeling.linear_attention import StateLayer, chunked, features, recurrent
from modeling.segment_memory import UnrotatedCache, UnrotatedLayer

from .variants import LINEAR, VARIANTS, random_model, tiny_config

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GATED = {"layer_types": [LINEAR] * 2, "linear_attention": "gated_delta", "linear_conv_kernel_dim": 4}
KINDS = ("linear", "gated_delta")
every_kind = pytest.mark.parametrize("name", KINDS)


def build(name: str) -> GPTForCausalLM:
    return random_model(tiny_config(**VARIANTS[name]))


# the three forms


def inputs(kind: str, tokens: int = 150) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Queries, keys, values and state of two rows, two heads and groups of three; and the gates of the kind."""
    shapes = [(2, 2, 3, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens, 5), (2, 2, 8, 5)]
    query, key, value, state = (torch.randn(shape, requires_grad=True) for shape in shapes)
    if kind == "linear":
        return [query, key, value, state], {}
    key = torch.nn.functional.normalize(key.detach(), dim=-1).requires_grad_()
    log_decay, strength = torch.randn(2, 2, tokens).sub(2).exp().neg(), torch.rand(2, 2, tokens)
    return [query, key, value, state], {"log_decay": log_decay.requires_grad_(), "strength": strength.requires_grad_()}


@every_kind
def test_parallel_chunked_and_recurrent_are_equal_and_so_are_their_gradients(name: str) -> None:
    states, gates = inputs(name)
    weights = torch.randn(2, 2, 3, 150, 5)
    found = {}
    for form in (recurrent, *(lambda *a, size=size, **k: chunked(*a, **k, size=size) for size in (7, 64, 150))):
        read, state = form(*states, **gates)
        gradients = torch.autograd.grad((read * weights).sum() + state.square().sum(), [*states, *gates.values()])
        found[len(found)] = [read, state, *gradients]
    for size in (1, 2, 3):
        for ours, expected in zip(found[size], found[0], strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(ours / scale, expected / scale, **CLOSE)


def test_the_parallel_form_is_the_papers() -> None:
    (query, key, value, _), _ = inputs("linear", tokens=20)
    query, key = features(query), features(key)
    nothing = torch.zeros(2, 2, 8, 6)
    read, _ = chunked(query, key, torch.cat((value, torch.ones(2, 2, 20, 1)), dim=-1), nothing, size=20)
    weights = (query @ key[:, :, None].mT).tril()
    expected = (weights @ value[:, :, None]) / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(read[..., :5] / read[..., 5:], expected, **CLOSE)


def test_the_delta_rule_puts_a_new_value_in_the_place_of_the_old() -> None:
    key, values = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8), dim=-1), torch.randn(1, 1, 2, 5)
    whole = torch.ones(1, 1, 2)
    _, state = chunked(key[:, :, None], key.expand(-1, -1, 2, -1), values, torch.zeros(1, 1, 8, 5), None, whole)
    torch.testing.assert_close(key[:, :, 0:1] @ state, values[:, :, 1:], **CLOSE)


def test_features_stay_above_zero() -> None:
    assert (features(torch.tensor([-80.0, -20.0, 0.0, 3.0])) > 0).all()
    torch.testing.assert_close(features(torch.tensor([-1.0, 2.0])), torch.tensor([math.exp(-1), 3.0]))


@pytest.mark.parametrize("tokens", [1, 100])
@torch.no_grad()
def test_rotary_positions_leave_the_normaliser_positive(tokens: int) -> None:
    """With keys and queries in opposite directions the turned features alone would divide by what is near zero."""
    config = tiny_config(layer_types=[LINEAR] * 2, position_encoding="rope", max_position_embeddings=128)
    model = random_model(config)
    logits = [model(torch.full((1, tokens), token), use_cache=False).logits for token in range(10)]
    assert all(torch.isfinite(one).all() and one.abs().max() < 100 for one in logits)


# packed documents and padding


@pytest.mark.parametrize("name", [*KINDS, "linear_rope_mixed"])
@pytest.mark.parametrize("first", [5, 70])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(name: str, first: int) -> None:
    model = random_model(tiny_config(**{**VARIANTS[name], "max_position_embeddings": 256}))
    ids = torch.randint(61, (2, 150))
    positions = torch.cat((torch.arange(first), torch.arange(150 - first)))[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in (ids[:, :first], ids[:, first:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **CLOSE)


@every_kind
@torch.no_grad()
def test_padding_leaves_no_trace_in_the_state(name: str) -> None:
    model, ids = build(name), torch.randint(61, (1, 9))
    padded, mask = torch.nn.functional.pad(ids, (4, 0), value=7), torch.ones(1, 13, dtype=torch.long)
    mask[:, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [
        getattr(model(*args, **options, use_cache=True), CACHE_NAME)
        for args, options in (((ids,), {}), ((padded,), {"attention_mask": mask, "position_ids": positions}))
    ]
    for layer, other in zip(*(cache.layers for cache in caches), strict=True):
        assert layer.state().keys() == other.state().keys()
        for key, tensor in layer.state().items():
            torch.testing.assert_close(other.state()[key], tensor, **CLOSE)


def test_masks_of_another_kind_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_mask of shape \(3, 1, 16, 16\): linear_attention takes \(batch"):
        build("linear")(ids, attention_mask=torch.ones(3, 1, 16, 16))


# generation


@pytest.mark.parametrize("name", [*KINDS, "linear_rope_mixed"])
def test_beams_samples_and_a_cache_of_transformers(name: str, ids: torch.Tensor) -> None:
    model, options = build(name), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    beams = {**options, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    expected = model.generate(ids, **options)
    given = {CACHE_NAME: DynamicCache(config=model.config)}
    assert torch.equal(model.generate(ids, **options, **given), expected)
    torch.manual_seed(1)
    drawn = model.generate(ids, **{**options, "do_sample": True, "num_return_sequences": 2})
    torch.manual_seed(1)
    without = model.generate(ids, **{**options, "do_sample": True, "num_return_sequences": 2}, use_cache=False)
    assert torch.equal(drawn, without)


@every_kind
def test_a_text_goes_on_from_its_state(name: str, ids: torch.Tensor) -> None:
    model, options = build(name), {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    whole = model.generate(ids, max_new_tokens=8, **options)
    half = model.generate(ids, max_new_tokens=4, **options)
    more = model.generate(half.sequences, max_new_tokens=4, **options, **{CACHE_NAME: getattr(half, CACHE_NAME)})
    assert torch.equal(more.sequences, whole.sequences)


@every_kind
@torch.no_grad()
def test_a_state_is_what_it_says_it_is(name: str, ids: torch.Tensor) -> None:
    model = build(name)
    cache = getattr(model(ids, use_cache=True), CACHE_NAME)
    assert cache.get_seq_length() == 16
    config, layer = model.config, cache.layers[0]
    assert type(layer) is StateLayer
    numbers = 3 * config.num_key_value_heads * config.head_dim**2
    if name == "linear":
        numbers += 3 * config.num_key_value_heads * config.head_dim
    else:
        numbers += 3 * 3 * (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    assert layer.state_bits() == 32 * numbers == 8 * sum(len(t.numpy().tobytes()) for t in layer.state().values())
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(ids, **{CACHE_NAME: cache}, use_cache=True).logits
    torch.testing.assert_close(again, model(ids).logits, **CLOSE)


@pytest.mark.slow
@every_kind
@torch.no_grad()
def test_ten_thousand_tokens_take_no_more_than_one(name: str) -> None:
    model = random_model(tiny_config(**{**VARIANTS[name], "position_encoding": "rope"}))
    step = torch.tensor([[3]])
    cache = getattr(model(step, use_cache=True), CACHE_NAME)
    bits = [sum(layer.state_bits() for layer in cache.layers)]
    for _ in range(10_000):
        logits = model(step, use_cache=True, **{CACHE_NAME: cache}).logits
        step = logits[:, -1:].argmax(-1)
        bits.append(sum(layer.state_bits() for layer in cache.layers))
    assert cache.get_seq_length() == 10_001
    assert set(bits) == {bits[0]}
    assert torch.isfinite(logits).all()


# what does not go together


def test_what_needs_keys_is_refused(ids: torch.Tensor) -> None:
    model = build("linear")
    cache = UnrotatedCache(layers=[UnrotatedLayer() for _ in range(2)])
    with pytest.raises(ValueError, match="layer 0 has a state and no keys for UnrotatedLayer to hold"):
        model(ids, use_cache=True, **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=r"a cache that can be cropped|holds no single tokens"):
        model.generate(ids[:1], max_new_tokens=3, prompt_lookup_num_tokens=2)
    kept = getattr(model(ids, use_cache=True), CACHE_NAME)
    with pytest.raises(ValueError, match="none can be taken back"):
        kept.crop(-1)
    with pytest.raises(ValueError, match="takes no keys and values"):
        kept.update(torch.zeros(1), torch.zeros(1), 0)


def test_an_untrained_head_remembers_from_short_to_long() -> None:
    model = GPTForCausalLM(tiny_config(**GATED))
    kept = model.model.layers[0].self_attn.f_proj.bias.sigmoid()
    torch.testing.assert_close(1 / (1 - kept), 1 + torch.tensor([4.0, 25.398, 161.27, 1024.0]), rtol=1e-3, atol=0)
    convolution = model.model.layers[0].self_attn.conv
    states = torch.randn(2, 9, 96)
    assert torch.equal(convolution(states, None, None)[0], states)
