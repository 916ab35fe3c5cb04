"""What tables of tokens and pairs do, and that all that handles a model's weights knows of them."""

import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm

from finetune.adapters import prompt
from inference.formats.acorn import Acorn
from inference.formats.base import open_source
from modeling import GPTForCausalLM, GPTModel, modeling_gpt
from modeling.loss import FURTHER_WEIGHT
from training.model.loading import load_causal_lm
from training.model.optimizers import build_muon
from training.model.pooling import pool_heads
from training.model.sizes import flops_per_token
from training.system.errors import UserError

from .test_optimizers import arguments, names_of
from .variants import VARIANTS, random_model, tiny_config

NAME = "shared_kv_between_sliding_layers"
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture
def model() -> GPTForCausalLM:
    return random_model(tiny_config(**VARIANTS[NAME]))


@torch.no_grad()
def test_each_table_is_undone_by_its_factor(model, ids) -> None:
    plain = GPTForCausalLM(tiny_config(**VARIANTS[NAME] | {"value_embeddings": False})).eval()
    missing, _ = plain.load_state_dict(model.state_dict(), strict=False)
    tables = model.model.value_embeddings
    assert missing == [] and list(tables) == ["3", "0"]  # of the layers with values of their own every other one
    factors = [table.factor.clone().squeeze() for table in tables.values()]
    for table in tables.values():
        table.factor.zero_()
    expected = plain(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    for table, factor in zip(tables.values(), factors, strict=True):
        table.factor.fill_(factor)
        assert (model(ids).logits - expected).abs().max() > 1e-3
        table.factor.zero_()


@torch.no_grad()
def test_a_value_embedding_is_added_to_the_values(model, ids) -> None:
    attention, table, seen = model.model.layers[3].self_attn, model.model.value_embeddings["3"], []
    attention.v_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    cache = model(ids, use_cache=True).past_key_values
    kept = (seen[0] + table.factor * table.weight[ids]).unflatten(-1, (2, 8)).transpose(1, 2)[:, :, -4:]
    torch.testing.assert_close(cache.layers[3].values, kept, **CLOSE)  # the last 4 of its window


def test_embeddings_instead_of_ids_are_refused_where_ids_are_looked_up_again(model) -> None:
    with pytest.raises(ValueError, match="inputs_embeds: this model looks up its tokens in other tables too; give"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(UserError, match="adapter=prompt: its virtual tokens are none that value_embeddings looks up"):
        prompt(None, model)


@pytest.fixture
def pairs() -> GPTForCausalLM:
    """A model that knows the order of tokens by its pairs alone."""
    none = {"position_encoding": "none", "num_hidden_layers": 1, "bigram_vocab_size": 10_000}
    return random_model(tiny_config(**none))


@torch.no_grad()
def test_a_pair_has_a_row_of_its_own_where_there_are_enough(pairs) -> None:
    table = pairs.model.bigrams
    before, here = torch.arange(61).repeat_interleave(61), torch.arange(61).repeat(61)
    rows = table.rows(before, here)
    assert rows.min() >= 0 and rows.max() < 10_000
    assert len(set(rows.tolist())) > 0.75 * 61 * 61  # by chance 0.84 of them
    table.weight.zero_()
    table.weight[rows[7 * 61 + 5]] = 1.0
    looked_up = table(torch.zeros(1, 4, 32), torch.tensor([[5, 7, 5, 5]]), torch.arange(4)[None], None)
    assert looked_up.sum(-1).tolist() == [[0.0, 0.0, 32.0, 0.0]]


@torch.no_grad()
def test_the_token_before_ends_where_a_text_does(pairs, ids) -> None:
    expected = pairs(ids[:1, 6:]).logits
    packed = torch.cat((torch.arange(6), torch.arange(10)))[None]
    found = pairs(ids[:1], position_ids=packed, use_cache=False).logits[:, 6:]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (pairs(ids[:1]).logits[:, 6:7] - expected[:, :1]).abs().max() > 1e-3


@torch.no_grad()
def test_the_token_before_is_in_the_cache_whatever_becomes_of_it(pairs, ids) -> None:
    whole = pairs(ids, use_cache=False).logits
    cache = pairs(ids[:, :9], use_cache=True).past_key_values
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    found = pairs(ids[[2, 0, 1], 7:], past_key_values=cache).logits
    torch.testing.assert_close(found, whole[[2, 0, 1], 7:], **CLOSE)
    beams = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(pairs.generate(ids, **beams), pairs.generate(ids, use_cache=False, **beams))
    drafts = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    greedy = pairs.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(pairs.generate(ids[:1], **drafts), greedy)


def test_adamw_takes_the_tables_and_factors(model) -> None:
    hidden, rest = build_muon(model, arguments()).param_groups
    assert sum("value_embeddings" in name for name in names_of(model, rest)) == 4  # of two layers a table and a factor
    assert not any("value_embeddings" in name for name in names_of(model, hidden))


@torch.no_grad()
def test_tables_follow_heads_that_are_pooled_and_a_vocabulary_that_grows(model, ids) -> None:
    table = model.model.value_embeddings["3"].weight
    pooled = pool_heads(model, 1).model.value_embeddings["3"].weight
    torch.testing.assert_close(pooled, (table[:, :8] + table[:, 8:]) / 2)
    expected = model(ids).logits
    model.resize_token_embeddings(70)
    torch.testing.assert_close(model(ids).logits[..., :61], expected, **CLOSE)
    assert torch.isfinite(model(torch.full_like(ids, 69)).logits).all()
    model.resize_token_embeddings(61)
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


# Heads for tokens after the next


@pytest.fixture
def further() -> GPTForCausalLM:
    """A model in training, with two heads for further tokens."""
    own = {"num_nextn_predict_layers": 2, "position_encoding": "rope", "logit_softcap": 2.0}
    return random_model(tiny_config(**own)).train()


def test_further_heads_add_the_gradients_of_their_losses_in_training_alone(further, ids) -> None:
    found, states = further(ids, labels=ids).loss, further.model(ids).last_hidden_state
    expected = of_next = further.eval()(ids, labels=ids).loss
    torch.testing.assert_close(found, of_next)
    torch.testing.assert_close(of_next, cross_entropy(further(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    for by, head in enumerate(further.mtp, 1):  # by tokens after the next
        came = rms_norm(further.model.embed_tokens(ids[:, by:]), (32,))
        states = states[:, : came.shape[1]]
        states = rms_norm(states + head(torch.cat((states, came), dim=-1)), (32,))
        logits = 2 * torch.tanh(further.lm_head(states[:, :-1]) / 2)
        expected += FURTHER_WEIGHT * cross_entropy(logits.flatten(0, 1), ids[:, by + 1 :].flatten())
    weights = list(further.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights))
    more = flops_per_token(further.config) - flops_per_token(tiny_config(position_encoding="rope"))
    assert more == 6 * 2 * (2 * 32 * 32 + 61 * 32)


def test_further_tokens_are_of_the_same_document(further, ids) -> None:
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    labels[:, 5] = -100  # the end of the first document
    alone = [further(ids[:, part], shift_labels=labels[:, part], num_items_in_batch=9).loss for part in
             (slice(0, 6), slice(6, None))]  # fmt: skip
    packed = torch.cat((torch.arange(6), torch.arange(ids.shape[1] - 6)))[None]
    found = further(ids, shift_labels=labels, position_ids=packed, num_items_in_batch=9).loss
    heads = list(further.mtp.parameters())
    torch.testing.assert_close(torch.autograd.grad(found, heads), torch.autograd.grad(sum(alone), heads))


def test_what_came_is_known_where_labels_do_not_count(further, ids) -> None:
    """At the border of a prompt, whose labels are left out, its heads read the token that came, not the first one."""
    ids = ids.clamp(min=1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 10, -100)
    heads, gradients = list(further.mtp.parameters()), []
    for _ in range(2):
        gradients.append(torch.autograd.grad(further(ids, labels=labels).loss, heads))
        with torch.no_grad():
            further.lm_head.weight = torch.nn.Parameter(further.lm_head.weight.clone())  # not tied any more
            further.model.embed_tokens.weight[0] += 1
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_further_heads_are_saved_and_dropped_where_nothing_trains_them(further, ids, tmp_path, capsys, monkeypatch):
    said, logits = [], further.eval()(ids).logits
    monkeypatch.setattr(modeling_gpt.logger, "warning_once", said.append)
    further.save_pretrained(tmp_path)
    whole = GPTForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.mtp.parameters(), further.mtp.parameters(), strict=True))
    _, report = GPTForCausalLM.from_pretrained(tmp_path, num_nextn_predict_layers=0, output_loading_info=True)
    assert not report["unexpected_keys"]
    answer = whole.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert said == ["num_nextn_predict_layers=2: these heads are for training; generate() drops them"]
    for _ in range(2):
        loaded = load_causal_lm(str(tmp_path))
    assert loaded.config.num_nextn_predict_layers == 0 and not any("mtp" in name for name in loaded.state_dict())
    assert capsys.readouterr().err.count("num_nextn_predict_layers=2: these heads are for pretraining; dropped") == 1
    assert torch.equal(loaded.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), answer)
    assert torch.equal(loaded(ids).logits, logits) and len(said) == 1
    assert torch.equal(GPTModel.from_pretrained(tmp_path)(ids)[0], further.model(ids)[0])
    assert Acorn().load(open_source(str(tmp_path))).mtp is None  # as exports read it
