"""Six traps that make no noise: each runs on, and runs wrongly."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling import GPTForCausalLM
from training.model.optimizers import decay_groups

from .variants import VARIANTS, random_model, tiny_config

KV_SHARING = [name for name, overrides in VARIANTS.items() if "kv_sharing_modes" in overrides]
SWITCHES = ["gradient_checkpointing_enable"]  # the name that every transformers knows
if hasattr(GPTForCausalLM, "activation_checkpointing_enable"):
    SWITCHES.append("activation_checkpointing_enable")
every_switch = pytest.mark.parametrize("switch", SWITCHES)


# 1. Initialisation that is asked for on a module without parameters of its own is never run.


@pytest.mark.parametrize("how", ["constructed", "from_config"])
@pytest.mark.parametrize(("residual_init", "factor"), [("scaled", 1 / 12**0.5), ("zero", 0.0), ("normal", 1.0)])
def test_residual_projections_are_initialised_as_asked(residual_init: str, factor: float, how: str) -> None:
    config = tiny_config(hidden_size=64, num_hidden_layers=6, residual_init=residual_init, initializer_range=0.05)
    build = GPTForCausalLM if how == "constructed" else GPTForCausalLM._from_config
    for layer in build(config).model.layers:
        for residual in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert residual.weight.std().item() == pytest.approx(0.05 * factor, rel=0.1)
        for other in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            assert other.weight.std().item() == pytest.approx(0.05, rel=0.1)


def test_embeddings_head_norms_and_biases_are_initialised_as_asked() -> None:
    untied = {"tie_word_embeddings": False, "lm_head_bias": True, "vocab_size": 500, "initializer_range": 0.05}
    model = GPTForCausalLM(tiny_config(**untied, embedding_initializer_range=1.0))
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert model.model.positions.embed.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert not GPTForCausalLM(tiny_config(**untied, zero_init_head=True)).lm_head.weight.any()
    tied = GPTForCausalLM(tiny_config(initializer_range=0.05))
    assert tied.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("name", ["sinusoidal", "rope", "rope_yarn", "rope_llama3"])
def test_position_buffers_survive_loading(name: str, tmp_path: Path) -> None:
    model = random_model(tiny_config(**VARIANTS[name]))
    model.save_pretrained(tmp_path)
    loaded = GPTForCausalLM.from_pretrained(tmp_path)
    buffers = dict(model.named_buffers())
    assert buffers
    for buffer_name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, buffers[buffer_name]), buffer_name


# 2. Trainer's label smoothing does not shift the labels of a class that it does not know.


def smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The formula: of the target, `smoothing` is spread evenly over the vocabulary; -100 counts nowhere."""
    log_probabilities, targets = logits[:, :-1].log_softmax(-1), labels[:, 1:]
    counts = targets != -100
    picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    losses = -(1 - smoothing) * picked - smoothing * log_probabilities.mean(-1)
    return losses[counts].mean()


@pytest.mark.parametrize("chunk_elements", [2**26, 61 * 5], ids=["whole", "chunked"])
def test_label_smoothing_is_of_the_shifted_labels(ids, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling.loss.CHUNK_ELEMENTS", chunk_elements)
    model, labels = random_model(tiny_config()), ids.clone()
    labels[0, 4:7] = -100
    logits = model(ids).logits
    for smoothing in (0.3, 0.0):
        loss = model(ids, labels=labels, label_smoothing=smoothing).loss
        torch.testing.assert_close(loss, smoothed_cross_entropy(logits, labels, smoothing))


# 3. Weight decay reaches every norm whose name transformers does not know.


def test_trainer_by_itself_decays_no_norm_and_no_bias(tmp_path: Path) -> None:
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    for norm in ("layer_norm", "rms_norm"):
        model = GPTForCausalLM(tiny_config(norm=norm, qk_norm=True, embedding_norm=True, lm_head_bias=True))
        decayed = set(Trainer(model, arguments).get_decay_parameter_names(model))
        parameters = model.named_parameters(remove_duplicate=False)  # the tied head goes by both of its names
        assert decayed == {name for name, parameter in parameters if parameter.ndim == 2}


@pytest.mark.parametrize("name", ["gpt2", "post_norm", "modern", "untied_head_bias", "qk_norm", "shared_kv_two_groups"])
def test_our_groups_decay_matrices_only(name: str) -> None:
    model = GPTForCausalLM(tiny_config(**VARIANTS[name]))
    decay_of = {id(p): group["weight_decay"] for group in decay_groups(model, 0.1) for p in group["params"]}
    grouped = sum(len(list(group["params"])) for group in decay_groups(model, 0.1))
    assert grouped == len(decay_of) == len(list(model.parameters()))  # each once, the tied head too
    for parameter_name, parameter in model.named_parameters():
        assert decay_of[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0), parameter_name


# 4. Documents packed into a row are kept apart by position_ids that start anew, but only where there is no cache.


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "rope", "sinusoidal", "mixed_layers", "shared_kv_mixed_layers", "modern"])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(name: str, backend: str, ids: torch.Tensor) -> None:
    model = random_model(tiny_config(**VARIANTS[name]))
    model.set_attn_implementation(backend)
    lengths = [7, 5, 4]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None].expand_as(ids)
    packed = model(ids, labels=ids, position_ids=position_ids).logits
    alone = torch.cat([model(document, labels=document).logits for document in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(model(ids, labels=ids).logits, alone, atol=1e-2)  # so it was the positions


def test_packed_documents_are_apart_in_training_too(ids: torch.Tensor) -> None:
    model = random_model(tiny_config(position_encoding="rope")).train()
    model.gradient_checkpointing_enable()
    position_ids = torch.cat([torch.arange(7), torch.arange(9)])[None].expand_as(ids)
    labels = ids.clone()
    labels[:, 7] = -100  # the last token of one document does not foretell the first of the next
    alone = sum(model(part, labels=part, num_items_in_batch=1).loss for part in ids.split([7, 9], dim=1))
    packed = model(ids, labels=labels, position_ids=position_ids, num_items_in_batch=1).loss
    torch.testing.assert_close(packed, alone)


# 5. Reentrant checkpointing of layers that share keys and values gives wrong gradients.


pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # its callers live on


@pytest.mark.parametrize("name", KV_SHARING)
@every_switch
def test_shared_keys_and_values_keep_their_gradients_under_checkpointing(name: str, switch: str, ids) -> None:
    grads = []
    for checkpointing in (False, True):
        model = random_model(tiny_config(**VARIANTS[name])).train()
        if checkpointing:
            getattr(model, switch)()
        model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


@every_switch
def test_reentrant_checkpointing_is_refused(switch: str) -> None:
    model = GPTForCausalLM(tiny_config(**VARIANTS["shared_kv"]))
    with pytest.raises(ValueError, match="use_reentrant"):
        getattr(model, switch)({"use_reentrant": True})
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


@every_switch
def test_reentrant_checkpointing_without_shared_keys_is_exact(switch: str, ids: torch.Tensor) -> None:
    grads = []
    for checkpointing in (False, True):
        model = random_model(tiny_config()).train()
        if checkpointing:
            getattr(model, switch)({"use_reentrant": True})
        model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


# 6. transformers' Trainer evaluates to no loss where rows lack any argument of the model that is called a label.


def test_trainer_by_itself_evaluates_rows_of_ids_and_labels(ids, tmp_path: Path) -> None:
    arguments, model = TrainingArguments(tmp_path, use_cpu=True, report_to="none"), random_model(tiny_config())
    rows = [{"input_ids": row, "labels": row} for row in ids]
    loss = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
    assert loss == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
