"""The cache policies: without loss the text of the plain cache, else the tokens, bits and refusals that they say."""

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config

from inference.caches.policies import POLICIES, Caches, Eviction, build_cache
from modeling.compat import CACHE_NAME
from training.system.errors import UserError

from .variants import HOLDS_LATENTS, INEXACT_WITH_CACHE, LINEAR, VARIANTS, random_model, tiny_config

EVICTIONS = ("window", "h2o", "tova", "random")
LOSSLESS = {name: {"cache_budget": 28} for name in EVICTIONS}  # of a context of 32, and no text is longer
LOSSY = {name: {"cache_budget": 8, "cache_sinks": 2} for name in EVICTIONS}
WITHOUT_KEYS = [name for name, given in VARIANTS.items() if LINEAR in given.get("layer_types", ())]
EXACT = [name for name in VARIANTS if name not in INEXACT_WITH_CACHE | HOLDS_LATENTS | {*WITHOUT_KEYS}]
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
    expected = grown(model, ids, tokens=3)
    for name, settings in LOSSLESS.items():
        cache = build_cache(model.config, name, **settings)
        assert torch.equal(grown(model, ids, cache, tokens=3), expected), name
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


@torch.no_grad()
def fed(model, ids: torch.Tensor, cache, pieces: list[int]) -> torch.Tensor:
    """Logits of ids given in pieces of these lengths."""
    given = ids.split(pieces, dim=1)
    return torch.cat([model(piece, use_cache=True, **{CACHE_NAME: cache}).logits for piece in given], dim=1)


def test_the_table_is_tested() -> None:
    assert {name for name, policy in POLICIES.items() if isinstance(policy, Eviction)} == set(EVICTIONS)


@pytest.mark.parametrize("name", LOSSY)
def test_no_layer_holds_more_than_its_budget_however_long_the_text(name: str, ids: torch.Tensor) -> None:
    model = endless("mixed_layers_full_first")
    cache = build_cache(model.config, name, **LOSSY[name])
    text = ids.repeat(1, 5)  # ten times the budget
    fed(model, text[:, :40], cache, [30, *[1] * 10])
    early = cache.state_bits()
    assert [layer.store.length for layer in cache.layers] == [8, 4]  # the second slides over 5
    fed(model, text[:, 40:], cache, [1] * 40)
    assert cache.state_bits() == early
    assert cache.get_seq_length() == 80 and cache.layers[0].get_mask_sizes(1) == (9, 72)


@pytest.mark.parametrize(("name", "positions"), [*zip(LOSSY, ["slot", "absolute"] * 2, strict=True)])
def test_a_row_holds_what_it_would_alone_under_each_backend(name: str, positions: str, ids: torch.Tensor) -> None:
    model = endless("modern", num_key_value_heads=2)
    settings = LOSSY[name] | {"cache_positions": positions}
    found = fed(model, ids, build_cache(model.config, name, **settings), [9, *[1] * 7])
    alone = [fed(model, row[None], build_cache(model.config, name, **settings), [9, *[1] * 7]) for row in ids]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("eager")
    eager = fed(model, ids, build_cache(model.config, name, **settings), [9, *[1] * 7])
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)
    assert (found - model(ids).logits)[:, 9:].abs().max() > 1e-2  # something was dropped


@torch.no_grad()
def test_by_slot_a_window_sees_its_tokens_as_if_no_others_had_been(ids: torch.Tensor) -> None:
    model = endless("rope", num_hidden_layers=1)  # deeper, keys tell of tokens that are dropped by now
    for budget, sinks in ((5, 0), (8, 3)):
        cache = build_cache(model.config, "window", cache_budget=budget, cache_sinks=sinks)
        last = fed(model, ids, cache, [1] * 16)[:, -1]
        seen = torch.cat((ids[:, :sinks], ids[:, 15 - budget + sinks :]), dim=1)
        torch.testing.assert_close(last, model(seen).logits[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_absolute_positions_are_where_the_tokens_were(ids: torch.Tensor) -> None:
    model = endless("rope", num_hidden_layers=1)
    cache = build_cache(model.config, "window", cache_budget=8, cache_sinks=3, cache_positions="absolute")
    last = fed(model, ids, cache, [1] * 16)[:, -1]
    held = [0, 1, 2, *range(10, 16)]
    mask = torch.ones(3, 9, dtype=torch.long)  # without one, places that leap would be texts of their own
    positions = torch.tensor([held])
    expected = model(ids[:, held], attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["grouped_query", "shared_kv_rope", "qk_norm"])
def test_h2o_scores_by_the_attention_weights_that_eager_returns(variant: str, ids: torch.Tensor) -> None:
    model = endless(variant)
    cache = build_cache(model.config, "h2o", cache_budget=20)
    fed(model, ids, cache, [5, 1, 10])  # under SDPA, which returns none
    model.set_attn_implementation("eager")
    weights = model(ids, output_attentions=True, use_cache=False).attentions
    for place, layer in cache.holding.items():
        by_group = weights[place].unflatten(1, (model.config.num_key_value_heads, -1)).mean(2)
        torch.testing.assert_close(layer.mass, by_group.sum(-2), rtol=1e-4, atol=1e-5)


def test_h2o_keeps_the_heaviest_and_the_newest(ids: torch.Tensor) -> None:
    model = endless("rope", num_hidden_layers=1)
    for scores in ("sum", "mean"):
        settings = {"cache_budget": 8, "cache_window": 3, "cache_sinks": 1, "cache_positions": "absolute"}
        cache = build_cache(model.config, "h2o", cache_scores=scores, **settings)
        fed(model, ids, cache, [16])
        model.set_attn_implementation("eager")
        mass = model(ids, output_attentions=True, use_cache=False).attentions[0].sum(-2)
        mass = mass / torch.arange(16, 0, -1) if scores == "mean" else mass
        best = mass[..., 1:13].topk(4).indices + 1
        for row, head in ((0, 0), (2, 3)):
            kept = sorted([0, *best[row, head].tolist(), 13, 14, 15])
            assert cache.layers[0].born[row, head].tolist() == kept
        model.set_attn_implementation("sdpa")


def test_tova_keeps_what_the_newest_token_attends_to(ids: torch.Tensor) -> None:
    model = endless("gpt2", num_hidden_layers=1)
    cache = build_cache(model.config, "tova", cache_budget=6, cache_positions="absolute")
    fed(model, ids, cache, [16])
    model.set_attn_implementation("eager")
    best = model(ids, output_attentions=True, use_cache=False).attentions[0][:, :, -1].mean(1).topk(6).indices
    held = cache.layers[0].born
    assert held[:, 0].tolist() == best.sort().values.tolist() and torch.equal(held[:, 0], held[:, 3])


def test_random_choices_follow_from_the_seed(ids: torch.Tensor) -> None:
    model = endless("gpt2")
    settings = {"cache_budget": 8, "cache_positions": "absolute"}
    seeds = [0, 0, 1]
    caches = [build_cache(model.config, "random", cache_seed=seed, **settings) for seed in seeds]
    for cache in caches:
        torch.rand(1)  # what else is drawn does not matter
        fed(model, ids, cache, [1] * 16)
    same, other = ([cache.layers[0].born.tolist() for cache in caches[1:]], caches[0].layers[0].born.tolist())
    assert same[0] == other != same[1]
    assert other != caches[0].layers[1].born.tolist()


@pytest.mark.parametrize("name", [*LOSSY, "h2o+int4"])
def test_beams_reorder_all_that_is_held(name: str, ids: torch.Tensor) -> None:
    model, order = endless("rope", hidden_size=64), torch.tensor([2, 0, 0])
    cache = build_cache(model.config, name, cache_budget=8, cache_positions="absolute")
    fed(model, ids, cache, [12, 1, 1, 1, 1])
    before = cache.state()
    cache.reorder_cache(order)
    after = cache.state()
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 4]))
    for held, again in ((before, after), (before, cache.state())):
        for key, tensor in held.items():
            expected = tensor if key.endswith("seen") else tensor[order]
            assert torch.equal(again[key], expected), key
    assert len({key.split(".")[1] for key in before}) > 2


def test_a_cache_is_empty_after_a_reset_and_takes_no_tokens_back(ids: torch.Tensor) -> None:
    model = endless("rope")
    for name, settings in LOSSY.items():
        cache = build_cache(model.config, name, **settings)
        first = fed(model, ids, cache, [5, *[1] * 11])
        with pytest.raises(ValueError, match="takes no tokens back"):
            cache.crop(-1)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(fed(model, ids, cache, [5, *[1] * 11]), first)


@pytest.mark.parametrize("name", LOSSY)
def test_padded_rows_are_refused_by_what_drops_tokens(name: str, ids: torch.Tensor) -> None:
    model, mask = endless("rope"), torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="padded rows do not go with a cache that drops tokens"):
        grown(model, ids, build_cache(model.config, name, **LOSSY[name]), mask=mask)


@pytest.mark.parametrize("variant", SHAPES)
def test_padded_rows_go_with_a_policy_that_drops_none(variant: str, ids: torch.Tensor) -> None:
    model, mask = endless(variant), torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    cache = build_cache(model.config, "window", cache_budget=1000)  # over the context
    assert torch.equal(grown(model, ids, cache, mask=mask), grown(model, ids, mask=mask))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("windw", {}, "did you mean 'window'"),
        ("window", {}, "give --cache_window, the newest tokens that it holds, or --cache_budget"),
        ("window", {"cache_window": 5, "cache_budget": 9}, "give --cache_window"),
        ("window", {"cache_window": 3}, "cache_window=3: is smaller than cache_sinks=4"),
        ("window", {"cache_window": 0}, "cache_window=0: must be a whole number from 1"),
        ("window", {"cache_window": 8, "cache_sinks": -1}, "cache_sinks=-1: must be a whole number from 0"),
        ("window", {"cache_window": 8, "cache_scores": "sum"}, "cache_scores=sum: has no effect with cache=window"),
        ("window", {"cache_budget": 4}, "cache_budget=4: does not hold cache_sinks=4"),
        ("window", {"cache_window": 8, "cache_positions": "relative"}, "unknown cache_positions 'relative'"),
        ("h2o", {}, "cache=h2o: give --cache_budget"),
        ("h2o", {"cache_window": 9}, "cache=h2o: give --cache_budget"),
        ("h2o", {"cache_budget": 9, "cache_window": 10}, "cache_budget=9: does not hold"),
        ("h2o", {"cache_budget": 9, "cache_scores": "max"}, "unknown cache_scores 'max'"),
        ("h2o", {"cache_budget": 9, "cache_seed": 1}, "cache_seed=1: has no effect with cache=h2o"),
        ("random", {"cache_budget": 9, "cache_seed": -1}, "cache_seed=-1: must be"),
        ("h2o+window", {"cache_budget": 9}, "one policy that drops tokens goes over one that quantizes"),
        ("h2o+", {"cache_budget": 9}, "unknown cache 'h2o+'"),
        ("window", {"window": 8}, "did you mean 'cache_window'"),
    ],
)
def test_refusals(name: str, settings: dict, words: str) -> None:
    with pytest.raises(UserError) as refusal:
        build_cache(tiny_config(), name, **settings)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("variant", WITHOUT_KEYS)
def test_layers_without_keys_are_refused(variant: str) -> None:
    for name, settings in [*LOSSY.items(), ("int4", {})]:
        with pytest.raises(UserError, match="is linear_attention, and holds no keys"):
            build_cache(tiny_config(**VARIANTS[variant]), name, **settings)


def test_models_of_other_makers_are_refused() -> None:
    with pytest.raises(UserError, match="is for Acorn's models, not for model_type=gpt2"):
        build_cache(GPT2Config(n_layer=1), "window", cache_window=8)


def test_a_budget_over_the_context_is_said_and_the_full_cache_used(capsys) -> None:
    assert Caches(tiny_config(), "h2o", cache_budget=31).is_bounded
    caches = Caches(tiny_config(), "h2o", cache_budget=32)
    assert not caches.is_bounded and not caches().has_gaps
    assert "cache_budget=32: is not below the model's context of 32: the full cache is used" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(HOLDS_LATENTS))
def test_latents_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"cache=window: layers hold latents \(kv_lora_rank=12\)"):
        build_cache(tiny_config(**VARIANTS[name]), "window", cache_window=8)
