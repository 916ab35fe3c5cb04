"""What the model can do beyond its variants: what Trainer, generate, PEFT, torch.compile and parallelism ask of it."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import cache_utils

from modeling import GPTForCausalLM, GPTModel
from training.loop.fast_on_cpu import FastRMSNorm, FastRMSNormOfMatmuls, use_fast_dropout, use_fast_norms

from .variants import VARIANTS, random_model, tiny_config

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def build(name: str) -> GPTForCausalLM:
    return random_model(tiny_config(**VARIANTS[name]))


def step(model: GPTForCausalLM, run, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of one training step, by the model itself or by `run`, its compiled form."""
    model.zero_grad()
    loss = run(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


# Loss


def test_micro_batches_with_the_count_of_the_step_are_one_batch(ids: torch.Tensor) -> None:
    model, labels = build("gpt2").train(), ids.clone()
    labels[0, 5:] = -100  # micro-batches of unequal weight: means of means would be wrong
    model(ids, labels=labels).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    count, losses = (labels[:, 1:] != -100).sum(), []
    for i in range(len(ids)):
        losses.append(model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss)
        losses[-1].backward()
    torch.testing.assert_close(sum(losses), model(ids, labels=labels).loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected, rtol=1e-5, atol=1e-6)


def test_count_may_be_a_number(ids: torch.Tensor) -> None:
    model = build("gpt2")
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=45).loss, model(ids, labels=ids).loss)


def test_shifted_labels_are_taken_as_they_are(ids: torch.Tensor) -> None:
    model = build("gpt2")
    shifted = torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)
    assert torch.equal(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
    expected = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)


def test_no_label_is_no_loss(ids: torch.Tensor) -> None:
    model = build("gpt2").train()
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_logits_come_with_the_loss_unless_asked_not_to(ids: torch.Tensor) -> None:
    model = build("gpt2").train()
    assert torch.equal(model(ids, labels=ids).logits, model(ids).logits)
    assert model(ids, labels=ids, return_logits=False).logits is None
    assert model(ids, shift_labels=ids, return_logits=False).loss == model(ids, shift_labels=ids).loss
    assert model(ids).logits.shape == (3, 16, 61)
    assert model(ids, labels=ids).past_key_values is None
    assert model.eval()(ids, labels=ids).logits.shape == (3, 16, 61)
    assert isinstance(model(ids, labels=ids, return_dict=False), tuple)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "sliding", "modern"])
def test_padding_gives_no_nan(name: str, backend: str, ids: torch.Tensor) -> None:
    model, mask = build(name).train(), torch.ones_like(ids)
    model.set_attn_implementation(backend)
    mask[0, :9], mask[1, 12:] = 0, 0
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Inputs and outputs


@torch.no_grad()
def test_embeddings_instead_of_ids(ids: torch.Tensor) -> None:
    model = build("gpt2")
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="exactly one"):
        model()


@torch.no_grad()
def test_only_the_last_logits(ids: torch.Tensor) -> None:
    model = build("head_bias")
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:], **CLOSE)
    some = torch.tensor([1, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=some).logits, model(ids).logits[:, some], **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "post_norm", "modern", "shared_kv_mixed_layers"])
@torch.no_grad()
def test_hidden_states_and_attention_weights_come_out(name: str, ids: torch.Tensor) -> None:
    model = build(name)
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    assert [states.shape for states in outputs.hidden_states] == [(3, 16, 32)] * (layers + 1)
    assert torch.equal(outputs.hidden_states[-1], model.model(ids).last_hidden_state)
    assert [weights.shape for weights in outputs.attentions] == [(3, 4, 16, 16)] * layers
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 16))
        assert not weights.triu(1).any()
    assert model(ids).hidden_states is None


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model(torch.cat([ids, ids, ids], dim=1)),
        lambda model, ids: model(ids, position_ids=torch.arange(20, 36)[None]),
        lambda model, ids: model(ids, past_key_values=model(torch.cat([ids, ids], dim=1)).past_key_values),
        lambda model, ids: model.generate(ids, max_new_tokens=18, do_sample=False),
        lambda model, ids: model.generate(ids, max_new_tokens=18, do_sample=False, use_cache=False),
        lambda model, ids: model.generate(ids, max_new_tokens=18, do_sample=False, cache_implementation="static"),
    ],
    ids=["row", "position_ids", "cache", "generate", "generate_uncached", "generate_static"],
)
def test_learned_positions_end_in_words(call, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"max_position_embeddings=32: learned positions end there; shorten"):
        call(build("gpt2"), ids)


@pytest.mark.parametrize("name", ["sinusoidal", "rope", "rope_dynamic", "no_positions", "mixed_layers_full_first"])
def test_other_positions_do_not_end(name: str, ids: torch.Tensor) -> None:
    assert build(name).generate(ids, max_new_tokens=30, min_new_tokens=30).shape == (3, 46)


# Generation


@pytest.mark.parametrize(
    "name", ["gpt2", "sinusoidal", "rope", "rope_yarn", "no_positions", "mixed_layers", "shared_kv_sliding", "modern"]
)
def test_a_left_padded_batch_generates_as_single_rows(name: str, ids: torch.Tensor) -> None:
    model, lengths = build(name), [9, 4, 6]
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    padded = torch.stack([nn.functional.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    together = model.generate(padded, attention_mask=mask, **options)
    for row, found in zip(rows, together, strict=True):
        assert torch.equal(found[9:], model.generate(row[None], **options)[0, len(row) :])


@pytest.mark.parametrize("name", ["gpt2", "modern", "shared_kv_two_groups", "mixed_layers"])
def test_beams_run_through_the_cache(name: str, ids: torch.Tensor) -> None:
    model, options = build(name), {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids[:, :5], **options)
    assert torch.equal(with_cache, model.generate(ids[:, :5], use_cache=False, **options))


CROPS_SHARED_KV = pytest.mark.skipif(
    not hasattr(cache_utils, "DummyLayer"), reason="transformers before sharing caches"
)


@pytest.mark.parametrize("name", ["gpt2", "rope", pytest.param("shared_kv_two_groups", marks=CROPS_SHARED_KV)])
def test_prompt_lookup_generates_the_same(name: str, ids: torch.Tensor) -> None:
    model, prompt = build(name), torch.cat([ids[:1, :6], ids[:1, :6]], dim=1)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), model.generate(prompt, **options))


# What is cheap on a CPU


@pytest.mark.parametrize("is_half", [False, True], ids=["fp32", "bf16"])
def test_fast_norms_and_activations_train_alike_and_evaluate_the_same(is_half: bool, ids: torch.Tensor) -> None:
    plain, fast = build("modern").train(), build("modern").train()
    use_fast_norms(fast)
    changed = [type(norm) for norm in fast.modules() if isinstance(norm, torch.nn.RMSNorm)]
    assert (changed.count(FastRMSNormOfMatmuls), changed.count(FastRMSNorm), len(changed)) == (4, 6, 10)
    losses = []
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, atol=2e-5, rtol=2e-2 if is_half else 1e-5)
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        distance = (one.grad - other.grad).norm() / one.grad.norm()
        assert distance < (0.05 if is_half else 1e-5)
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, fast.eval()(ids).logits)


def test_a_norm_with_a_gain_stays_torchs() -> None:
    model = build("rms_norm")
    use_fast_norms(model)
    assert {type(norm) for norm in model.modules() if isinstance(norm, torch.nn.RMSNorm)} == {torch.nn.RMSNorm}


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_dropout_drops_its_rate_and_keeps_the_mean(rate: float) -> None:
    model = random_model(tiny_config(dropout=rate)).train()
    assert type(model.model.dropout) is type(model.model.layers[0].dropout) is torch.nn.Dropout  # what travels
    use_fast_dropout(model)
    for module in (model.model.dropout, model.model.layers[0].dropout):
        states = torch.ones(300, 333, requires_grad=True)
        dropped = module(states)
        assert (dropped == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
        assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
        assert len(dropped.unique()) == 2
        dropped.sum().backward()
        assert torch.equal(states.grad, dropped)
        assert torch.equal(module.eval()(states), states)
        assert module.train()(torch.ones(3, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_every_dropout_is_drawn_anew_and_replayed_by_checkpointing(backend: str, ids: torch.Tensor) -> None:
    places = ("embedding_dropout", "attention_dropout", "residual_dropout")
    for arguments in [{place: 0.3} for place in places] + [{"dropout": 0.3}]:
        model = random_model(tiny_config(**arguments)).train()
        model.set_attn_implementation(backend)
        assert model(ids, labels=ids).loss != model(ids, labels=ids).loss
        runs = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            torch.manual_seed(5)
            runs.append(step(model, model, ids))
        torch.testing.assert_close(runs[1], runs[0])
        assert torch.equal(model.eval()(ids).logits, model(ids).logits)


# Number formats and compilation


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "modern", "shared_kv_rope", "post_rms_norm", "logit_softcap"])
def test_bfloat16_and_autocast_stay_close(name: str, backend: str, ids: torch.Tensor) -> None:
    model = build(name)
    model.set_attn_implementation(backend)
    expected = model(ids).logits.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(ids, use_cache=True).logits
        model.train()(ids, labels=ids).loss.backward()
    under_bfloat16 = model.eval().bfloat16()(ids).logits
    assert under_bfloat16.dtype == torch.bfloat16
    for found in (under_autocast, under_bfloat16):
        assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.fixture
def fresh_dynamo():
    """Compiled code is cached by code object, and all variants share theirs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("gpt2", "aot_eager"),
        ("modern", "aot_eager"),
        ("shared_kv_mixed_layers", "eager"),
        ("dropout", "aot_eager"),
        pytest.param("dropout", "inductor", marks=pytest.mark.slow),
        pytest.param("gpt2", "inductor", marks=pytest.mark.slow),
        pytest.param("modern", "inductor", marks=pytest.mark.slow),
        pytest.param("shared_kv_mixed_layers", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiles_as_one_graph(name: str, backend: str, ids: torch.Tensor, fresh_dynamo) -> None:
    model = (random_model(tiny_config(dropout=0.2)) if name == "dropout" else build(name)).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = step(model, compiled, ids)
    if name == "dropout":  # a compiled random stream is another one
        assert torch.isfinite(found[0])
    else:
        torch.testing.assert_close(found, step(model, model, ids), **CLOSE)


@pytest.mark.parametrize("name", ["modern", "shared_kv_mixed_layers"])
def test_blocks_compile_one_by_one(name: str, ids: torch.Tensor, fresh_dynamo) -> None:
    model = build(name).train()
    expected = step(model, model, ids)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(step(model, model, ids), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "sliding", "grouped_query", "shared_kv_mixed_layers", "free_head_dim"])
@torch.no_grad()
def test_flex_attention_equals_sdpa(name: str, ids: torch.Tensor, fresh_dynamo) -> None:
    model = build(name)
    expected = model(ids).logits
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


# Changing and keeping the model


@pytest.mark.parametrize("name", ["gpt2", "head_bias", "untied", "untied_head_bias"])
@torch.no_grad()
def test_vocabulary_grows_and_shrinks(name: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = build(name)
    expected = model(ids).logits
    model.resize_token_embeddings(70)
    grown = model(ids).logits
    assert model.config.vocab_size == 70
    assert grown.shape[-1] == 70
    torch.testing.assert_close(grown[..., :61], expected, **CLOSE)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    model(torch.full_like(ids, 69), labels=ids)
    model.save_pretrained(tmp_path)
    assert torch.equal(GPTForCausalLM.from_pretrained(tmp_path)(ids).logits, grown)
    model.resize_token_embeddings(61)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["queries_and_values", "all_linear"])
@pytest.mark.parametrize("name", ["gpt2", "modern", "shared_kv"])
def test_lora_wraps_trains_and_merges(name: str, targets, ids: torch.Tensor) -> None:
    model = build(name)
    before = model(ids).logits.detach()
    adapter = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = get_peft_model(model, adapter).train()
    wrapped(ids, labels=ids).loss.backward()
    trained = {key for key, parameter in wrapped.named_parameters() if parameter.grad is not None}
    assert trained == {key for key, _ in wrapped.named_parameters() if "lora_" in key}
    adapted = wrapped.eval()(ids).logits.detach()
    assert (adapted - before).abs().max() > 1e-2
    merged = wrapped.merge_and_unload()
    assert type(merged) is GPTForCausalLM
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-5, atol=1e-5 * adapted.abs().max().item())


@pytest.mark.parametrize("part", ["causal_lm", "base_model"])
def test_what_is_saved_is_for_generation(part: str, tmp_path: Path) -> None:
    model = build("gpt2")
    model = model if part == "causal_lm" else model.model
    model.config.use_cache = False  # as Trainer leaves it
    model.config.auto_map = {"AutoConfig": "configuration_gpt.GPTConfig"}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["use_cache"] is True
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert model.config.use_cache is False


def test_the_base_of_a_saved_model_loads_alone(ids: torch.Tensor, tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    base = GPTModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["gpt2", "gated_mlp", "modern", "shared_kv"])
def test_parallel_plans_name_what_is_there(name: str) -> None:
    model = build(name)
    linears = {key for key, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    plan = [key for key in model.config.base_model_tp_plan if key.startswith("layers.")]
    patterns = {key: re.compile(key.replace(".", r"\.").replace("*", r"\d+")) for key in plan}
    covered = {key for key in linears for pattern in patterns.values() if pattern.fullmatch(key)}
    assert covered == linears  # a linear left out would be whole on every device
    assert all(any(map(pattern.fullmatch, linears)) for pattern in patterns.values())
    assert all(hasattr(model, key) for key in model._tp_plan if "." not in key)
    assert not model.supports_pp_plan
    blocks = {type(layer).__name__ for layer in model.model.layers}
    assert blocks <= set(model._no_split_modules)
