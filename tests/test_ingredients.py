"""What value embeddings, gates, skips and their like do, and that all that handles a model's weights knows of them."""

import pytest
import torch

from modeling import GPTForCausalLM
from training.model.optimizers import build_muon
from training.model.pooling import pool_heads

from .test_optimizers import arguments, names_of
from .variants import VARIANTS, random_model, tiny_config

NAME = "tables_gates_and_skips"
OFF = {"value_embeddings": False, "attention_gate": False, "embedding_skip": False}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture
def model() -> GPTForCausalLM:
    return random_model(tiny_config(**VARIANTS[NAME]))


@torch.no_grad()
def test_each_is_undone_by_its_own_weights(model, ids) -> None:
    plain = GPTForCausalLM(tiny_config(**VARIANTS[NAME] | OFF)).eval()
    missing, _ = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == [] and list(model.model.value_embeddings) == ["2", "0"]
    neutral = {"factor": 0.0, "of_stream": 1.0, "of_first": 0.0, "g_proj.bias": 50.0}
    own = {name: weight.clone() for name, weight in model.named_parameters() if name.endswith(tuple(neutral))}
    for name in own:
        model.get_parameter(name).fill_(next(value for end, value in neutral.items() if name.endswith(end)))
    expected = plain(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    for name, weight in own.items():  # and each of them matters, in every layer that has it
        changed = model.get_parameter(name)
        before = changed.clone()
        changed.copy_(weight)
        assert (model(ids).logits - expected).abs().max() > 1e-3, name
        changed.copy_(before)


@torch.no_grad()
def test_a_value_embedding_is_added_to_the_values(model, ids) -> None:
    attention, table, seen = model.model.layers[2].self_attn, model.model.value_embeddings["2"], []
    attention.v_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    cache = model(ids, use_cache=True).past_key_values
    kept = (seen[0] + table.factor * table.weight[ids]).unflatten(-1, (2, 8)).transpose(1, 2)[:, :, -4:]
    torch.testing.assert_close(cache.layers[2].values, kept, **CLOSE)  # the last 4 of its window


def test_embeddings_instead_of_ids_are_refused_where_ids_are_looked_up_again(model) -> None:
    with pytest.raises(ValueError, match=r"inputs_embeds: value_embeddings look up the tokens.*; give input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


def test_muon_takes_the_gates_and_adamw_the_tables_and_factors(model) -> None:
    hidden, rest = build_muon(model, arguments()).param_groups
    assert any("g_proj.weight" in name for name in names_of(model, hidden))
    others = {name for name in names_of(model, rest) if "value_embeddings" in name or "skip" in name}
    assert len(others) == 6  # of two layers a table and a factor, and the skip's two
    assert not any("value_embeddings" in name or "skip" in name for name in names_of(model, hidden))


@torch.no_grad()
def test_tables_follow_heads_that_are_pooled_and_a_vocabulary_that_grows(model, ids) -> None:
    table = model.model.value_embeddings["2"].weight
    pooled = pool_heads(model, 1).model.value_embeddings["2"].weight
    torch.testing.assert_close(pooled, (table[:, :8] + table[:, 8:]) / 2)
    expected = model(ids).logits
    model.resize_token_embeddings(70)
    torch.testing.assert_close(model(ids).logits[..., :61], expected, **CLOSE)
    assert torch.isfinite(model(torch.full_like(ids, 69)).logits).all()
    model.resize_token_embeddings(61)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
