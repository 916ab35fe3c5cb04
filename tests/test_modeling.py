"""What every variant of the model must pass; a new line in variants.py is tested here by being there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling import GPTForCausalLM, loss
from modeling.segment_memory import UnrotatedCache, UnrotatedLayer

from .variants import FULL, INEXACT_WITH_CACHE, SLIDING, VARIANTS, WITHOUT_KEYS, random_model, tiny_config

every_variant = pytest.mark.parametrize("name", VARIANTS)
every_variant_with_cache = pytest.mark.parametrize("name", [n for n in VARIANTS if n not in INEXACT_WITH_CACHE])
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # logits have a standard deviation of about 1.5


def build(name: str) -> GPTForCausalLM:
    return random_model(tiny_config(**VARIANTS[name]))


def cached_logits(model: GPTForCausalLM, ids: torch.Tensor, chunks: list[int], cache=None) -> torch.Tensor:
    """Logits of `ids` given in pieces of the given lengths, with the cache carried from one to the next."""
    logits = []
    for piece in ids.split(chunks, dim=1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def gradients(model: GPTForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step on `ids`, some of which do not count."""
    labels = ids.clone()
    labels[1, 5:9] = -100
    model.train().zero_grad()
    loss = model(ids, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@every_variant_with_cache
@pytest.mark.parametrize("chunks", [[1] * 16, [7, 9], [15, 1]], ids=["token_by_token", "two_chunks", "last_token"])
@torch.no_grad()
def test_cached_equals_uncached(name: str, chunks: list[int], ids: torch.Tensor) -> None:
    model = build(name)
    torch.testing.assert_close(cached_logits(model, ids, chunks), model(ids, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n not in INEXACT_WITH_CACHE | WITHOUT_KEYS])
@torch.no_grad()
def test_a_cache_of_unrotated_keys_equals_none(name: str, ids: torch.Tensor) -> None:
    model = build(name)
    cache = UnrotatedCache(layers=[UnrotatedLayer() for _ in model.model.layers])
    found = cached_logits(model, ids, [7, 1, 8], cache)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, **CLOSE)
    first = cache.layers[0]
    assert first.keys.shape == (3, model.config.num_key_value_heads, 16, model.config.head_dim)
    assert first.get_mask_sizes(1) == (17, 0)


@every_variant
@torch.no_grad()
def test_later_tokens_do_not_show_in_earlier_logits(name: str, ids: torch.Tensor) -> None:
    model, changed = build(name), ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :9], before[:, :9], **CLOSE)
    assert (after[:, 9] - before[:, 9]).abs().max() > 1e-2  # the token itself does show


@every_variant
@torch.no_grad()
def test_eager_equals_sdpa(name: str, ids: torch.Tensor) -> None:
    model = build(name)
    assert model.config._attn_implementation == "sdpa"
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    with_sdpa = [model(ids, attention_mask=mask).logits for mask in (None, padding)]
    model.set_attn_implementation("eager")
    with_eager = [model(ids, attention_mask=mask).logits for mask in (None, padding)]
    torch.testing.assert_close(with_eager[0], with_sdpa[0], **CLOSE)
    # Rows of padding see nothing, and what a backend writes there is its own affair.
    torch.testing.assert_close(with_eager[1][padding == 1], with_sdpa[1][padding == 1], **CLOSE)


@every_variant
@torch.no_grad()
def test_saved_and_loaded_is_equal(name: str, ids: torch.Tensor, tmp_path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is not type(model)  # it is the code in the directory that ran
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its callers live on
@every_variant
def test_gradient_checkpointing_changes_nothing(name: str, ids: torch.Tensor) -> None:
    model = build(name)
    expected_loss, expected = gradients(model, ids)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    found_loss, found = gradients(model, ids)
    assert len(calls) == 2 * len(model.model.layers)  # each block really ran twice
    assert torch.equal(found_loss, expected_loss)
    torch.testing.assert_close(found, expected, **CLOSE)


@every_variant
def test_chunked_loss_changes_nothing(name: str, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    expected_loss, expected = gradients(model, ids)
    calls, whole = [], loss.checkpoint
    monkeypatch.setattr(loss, "checkpoint", lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs))
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 61 * 5)
    found_loss, found = gradients(model, ids)
    assert len(calls) == 10  # 48 rows in fives
    torch.testing.assert_close(found_loss, expected_loss)
    torch.testing.assert_close(found, expected, **CLOSE)


@every_variant
def test_learns_a_batch_by_heart(name: str, ids: torch.Tensor) -> None:
    model = GPTForCausalLM(tiny_config(**VARIANTS[name])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@every_variant
@pytest.mark.parametrize("padded", [False, True], ids=["rows_of_one_length", "left_padded"])
def test_generates_the_same_with_every_cache(name: str, padded: bool, ids: torch.Tensor) -> None:
    model, prompts, options = build(name), ids[:, :6], {"max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    mask[0, :2] = 0 if padded else 1
    options["attention_mask"] = mask
    dynamic = model.generate(prompts, **options)
    static = model.generate(prompts, cache_implementation="static", **options)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), **CLOSE)
    if name not in INEXACT_WITH_CACHE:
        uncached = model.generate(prompts, use_cache=False, **options)
        torch.testing.assert_close(torch.stack(uncached.logits), torch.stack(dynamic.logits), **CLOSE)


# What a choice means, where no stock model (test_gpt2_equality.py) says it.


def same_weights(name: str, **overrides) -> tuple[GPTForCausalLM, GPTForCausalLM]:
    """The variant, and a model that differs in `overrides` alone."""
    model, other = build(name), GPTForCausalLM(tiny_config(**{**VARIANTS[name], **overrides})).eval()
    other.load_state_dict(model.state_dict())
    return model, other


@torch.no_grad()
def test_softcap_bounds_the_logits(ids: torch.Tensor) -> None:
    capped, raw = same_weights("logit_softcap", logit_softcap=None)
    torch.testing.assert_close(capped(ids).logits, 2 * torch.tanh(raw(ids).logits / 2), **CLOSE)
    assert raw(ids).logits.abs().max() > 2


@torch.no_grad()
def test_relu2_is_the_square(ids: torch.Tensor) -> None:
    mlp, states = build("relu2").model.layers[0].mlp, torch.randn(5, 32)
    torch.testing.assert_close(mlp(states), mlp.down_proj(mlp.up_proj(states).clamp(min=0) ** 2), **CLOSE)


@torch.no_grad()
def test_qk_norm_forgets_the_size_of_queries_and_keys(ids: torch.Tensor) -> None:
    model = random_model(tiny_config(qk_norm=True, bias=False))
    before = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 7
        layer.self_attn.k_proj.weight *= 3
    torch.testing.assert_close(model(ids).logits, before, **CLOSE)


@torch.no_grad()
def test_embedding_norm_comes_before_the_first_block(ids: torch.Tensor) -> None:
    first = build("modern")(ids, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(first.square().mean(-1), torch.ones(3, 16), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_sinusoids_are_those_of_the_paper(ids: torch.Tensor) -> None:
    model = build("sinusoidal")
    added = model.model.positions.add(torch.zeros(1, 20, 32), torch.arange(20)[None])[0]
    for position, pair in [(0, 0), (7, 3), (19, 15)]:
        angle = torch.tensor(position / 10000 ** (2 * pair / 32))
        torch.testing.assert_close(added[position, 2 * pair : 2 * pair + 2], torch.stack([angle.sin(), angle.cos()]))


@torch.no_grad()
def test_without_positions_one_layer_knows_no_order(ids: torch.Tensor) -> None:
    model = random_model(tiny_config(position_encoding="none", num_hidden_layers=1))
    reordered = torch.cat([ids[:, :-1].flip(1), ids[:, -1:]], dim=1)
    torch.testing.assert_close(model(reordered).logits[:, -1], model(ids).logits[:, -1], **CLOSE)


@torch.no_grad()
def test_reuse_takes_the_keys_and_values_of_the_nearest_store(ids: torch.Tensor) -> None:
    model = build("shared_kv_two_groups")
    layers = model.model.layers
    assert [hasattr(layer.self_attn, "k_proj") for layer in layers] == [True, True, False, True, False]
    before = model(ids, output_hidden_states=True).hidden_states
    layers[3].self_attn.v_proj.bias += 1
    after = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(after[3], before[3])  # what layer 2, which reuses layer 1, puts out
    values, reuse = [], layers[4].self_attn
    layers[3].self_attn.v_proj.register_forward_hook(lambda module, inputs, output: values.append(output))
    attended = []
    reuse.o_proj.register_forward_pre_hook(lambda module, inputs: attended.append(inputs[0]))
    model(ids)
    first_token = values[0][:, 0].unflatten(-1, (2, 8)).repeat_interleave(2, dim=1)  # it sees itself alone
    torch.testing.assert_close(attended[0][:, 0], first_token.flatten(1), **CLOSE)


@pytest.mark.parametrize("name", ["rope", "rope_linear", "rope_yarn", "rope_llama3", "shared_kv_rope", "modern"])
@torch.no_grad()
def test_rope_sees_distances_only(name: str, ids: torch.Tensor) -> None:
    model, position_ids = build(name), torch.arange(16)[None]
    expected = model(ids, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, position_ids=position_ids + 9, use_cache=False).logits, expected, **CLOSE)
    spread = model(ids, position_ids=position_ids * 2, use_cache=False).logits
    assert (spread - expected).abs().max() > 1e-2


def test_rope_by_layer_type_turns_each_layer_by_its_own(ids: torch.Tensor) -> None:
    own = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    layers = {"position_encoding": "rope", "layer_types": [SLIDING, FULL], "sliding_window": 5}
    alike = random_model(tiny_config(**layers, rope_parameters=own))
    by_layer = random_model(tiny_config(**layers, rope_parameters={SLIDING: own, FULL: own}))
    assert torch.equal(by_layer(ids).logits, alike(ids).logits)
    for changed in (SLIDING, FULL):
        parameters = {SLIDING: own, FULL: own} | {changed: {**own, "factor": 2.0}}
        other = random_model(tiny_config(**layers, rope_parameters=parameters))
        assert not torch.allclose(other(ids).logits, alike(ids).logits, atol=1e-3)
