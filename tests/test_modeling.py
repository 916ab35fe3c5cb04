"""What every variant of the model must pass; a new line in variants.py is tested here by being there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling import GPTForCausalLM, loss

from .variants import INEXACT_WITH_CACHE, VARIANTS, random_model, tiny_config

every_variant = pytest.mark.parametrize("name", VARIANTS)
every_variant_with_cache = pytest.mark.parametrize("name", [name for name in VARIANTS if name not in INEXACT_WITH_CACHE])
CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # logits have a standard deviation of about 1.5


def build(name: str) -> GPTForCausalLM:
    return random_model(tiny_config(**VARIANTS[name]))


def cached_logits(model: GPTForCausalLM, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Logits of `ids` given in pieces of the given lengths, with the cache carried from one to the next."""
    cache, logits = None, []
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


@every_variant
def test_gradient_checkpointing_changes_nothing(name: str, ids: torch.Tensor) -> None:
    model = build(name)
    expected_loss, expected = gradients(model, ids)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable()
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
