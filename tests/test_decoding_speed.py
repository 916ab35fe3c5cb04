"""The compiled step gives the same ids as the model without it; weights in eight bits, nearly the same logits."""

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from inference import generate
from inference.decoding.compiled import CompiledStep, StaticCaches, compiled, not_of_the_model, refuse_without_compiler
from inference.decoding.weights import HUGE_PAGE, Int8Linear, in_huge_pages, quantized
from training.model.sampling import continue_ids
from training.system.errors import UserError

from .tiny_runs import grow, refused
from .variants import TINY, VARIANTS, random_model, tiny_config

UNCOMPILABLE = {
    "rope_dynamic": r"rope_parameters\.rope_type=dynamic",
    "rope_dynamic_past_context": r"rope_parameters\.rope_type=dynamic",
    "memory": "memory_length=16: a memory has no fixed cache",
}
GREEDY = {"ends": [], "do_sample": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Each test compiles anew, as torch counts what it has compiled, and without a look for a compiler."""
    torch._dynamo.reset()
    monkeypatch.setattr("inference.decoding.compiled.refuse_without_compiler", lambda device: None)


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(0, TINY["vocab_size"], (2, 4), generator=torch.Generator().manual_seed(1))


def test_the_step_alone_is_compiled(tiny_model, prompt, monkeypatch) -> None:
    """One graph for a whole text that goes past the context: prompt and windows are read by the forward as it was."""
    model, graphs, steps, masks = tiny_model(), [], [], set()
    expected = continue_ids(model, prompt, 45, **GREEDY)
    options = compiled(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    call = CompiledStep.__call__
    monkeypatch.setattr(
        CompiledStep,
        "__call__",
        lambda self, **kwargs: (
            steps.append(kwargs["input_ids"].shape[1])
            or masks.add((steps[-1], kwargs.get("attention_mask") is None))
            or call(self, **kwargs)
        ),
    )
    assert torch.equal(continue_ids(model, prompt, 45, **GREEDY, **options), expected)
    assert len(graphs) in (1, 2)  # two where the mask of a window does not come ready, before transformers 5.24
    assert set(steps) == {4, 1, 16}
    assert {is_absent for tokens, is_absent in masks if tokens == 1} == {True}, "a step makes its mask itself"


def test_a_prompt_of_one_token_is_no_step(tiny_model) -> None:
    model, graphs, ids = tiny_model(), [], torch.tensor([[3]])
    expected = continue_ids(model, ids, 5, **GREEDY)
    options = compiled(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(2):  # each into a cache of its own
        assert torch.equal(continue_ids(model, ids, 5, **GREEDY, **options), expected)
    assert len(graphs) == 1


@pytest.mark.slow
def test_models_in_one_process_keep_their_steps(tiny_model, prompt) -> None:
    """Though a step's guards do not look at the model."""
    models = [tiny_model(), tiny_model(num_hidden_layers=3), tiny_model(hidden_act="relu")]
    expected = [continue_ids(model, prompt, 6, **GREEDY) for model in models]
    guarding = {"backend": "eager", "options": {"guard_filter_fn": not_of_the_model}}
    options = [compiled(model, **guarding | {"options": dict(guarding["options"])}) for model in models]
    for _ in range(2):
        for model, ids, own in zip(models, expected, options, strict=True):
            assert torch.equal(continue_ids(model, prompt, 6, **GREEDY, **own), ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_ids_are_those_of_the_model(name: str, prompt) -> None:
    """Traced as for torch's compiler, and run without it, which would take a minute each."""
    model = random_model(tiny_config(**VARIANTS[name]))
    expected = [continue_ids(model, prompt, length, **GREEDY) for length in (20, 45)]
    beams = continue_ids(model, prompt, 15, num_beams=3, **GREEDY)
    if name in UNCOMPILABLE:
        with pytest.raises(UserError, match=UNCOMPILABLE[name]):
            compiled(model, backend="eager")
        return
    options = compiled(model, backend="eager")
    for ids, length in zip(expected, (20, 45), strict=True):
        assert torch.equal(continue_ids(model, prompt, length, **GREEDY, **options), ids)
    assert torch.equal(continue_ids(model, prompt, 15, num_beams=3, **GREEDY, **options), beams)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "rope_by_layer", "shared_kv_two_groups", "modern"])
def test_ids_of_the_compiler_are_those_of_the_model(name: str, prompt) -> None:
    model = random_model(tiny_config(**VARIANTS[name]))
    expected = continue_ids(model, prompt, 45, **GREEDY)
    assert torch.equal(continue_ids(model, prompt, 45, **GREEDY, **compiled(model)), expected)


def test_padded_rows_are_compiled_too(tiny_model, prompt) -> None:
    model, mask = tiny_model(position_encoding="rope"), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = continue_ids(model, prompt, 9, attention_mask=mask, **GREEDY)
    options = compiled(model, backend="eager")
    assert torch.equal(continue_ids(model, prompt, 9, attention_mask=mask, **GREEDY, **options), expected)


@pytest.mark.slow
def test_an_adapter_and_a_stock_model_are_compiled_too(tiny_model, prompt) -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()
    for model in (adapted.eval(), stock):
        expected = continue_ids(model, prompt, 9, **GREEDY)
        assert torch.equal(continue_ids(model, prompt, 9, **GREEDY, **compiled(model, backend="eager")), expected)


def test_what_cannot_be_compiled_is_refused(tiny_model) -> None:
    with pytest.raises(UserError, match="peft_type=PROMPT_TUNING"):
        compiled(get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))
    with pytest.raises(UserError, match="memory_length=8: a memory has no fixed cache"):
        compiled(tiny_model(position_encoding="rope", memory_length=8))
    mamba = MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(UserError, match="MambaForCausalLM"):
        compiled(MambaForCausalLM(mamba))
    with pytest.raises(UserError, match=r"rope_parameters\.rope_type=dynamic"):
        compiled(random_model(tiny_config(**VARIANTS["rope_dynamic"])))


def test_caches_grow_and_do_not_shrink(tiny_model) -> None:
    caches = StaticCaches(tiny_model().config)
    assert [caches(length).get_max_length() for length in (5, 9, 7)] == [5, 9, 9]


def test_a_machine_without_a_compiler_is_told_so() -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "nowhere-g++"), "force_disable_caches": True}),
        pytest.raises(UserError, match="does not work here, it needs a C"),
    ):
        refuse_without_compiler(torch.device("cpu"))


# ---- weights in eight bits


def test_products_of_eight_bits_are_near() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 10)
    nn.init.normal_(linear.weight, generator=generator)
    states = torch.randn(3, 5, 64, generator=generator)
    small = Int8Linear(linear.weight.detach(), linear.bias)
    found, expected = small(states), linear(states)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert small.weight.dtype == torch.int8
    assert torch.equal(Int8Linear(torch.zeros(2, 32), None)(torch.ones(1, 32)), torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["gpt2", "modern", "odd_intermediate_size", "shared_kv_two_groups", "head_bias"])
def test_logits_of_eight_bits_are_near(name: str, ids) -> None:
    model = random_model(tiny_config(**VARIANTS[name]))
    with torch.no_grad():
        expected = model(ids).logits
        found = quantized(model, "int8")(ids).logits
    assert 0 < (found - expected).norm() < 0.04 * expected.norm()
    assert not isinstance(model.get_input_embeddings(), Int8Linear) and isinstance(model.lm_head, Int8Linear)


def test_a_layer_that_the_kernel_would_read_past_stays(ids) -> None:
    model = quantized(random_model(tiny_config(**VARIANTS["odd_intermediate_size"])), "int8")
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is Int8Linear


def test_a_stock_gpt2_is_quantized_whole(prompt) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()
    with torch.no_grad():
        expected = model(prompt).logits
        found = quantized(model, "int8")(prompt).logits
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 2 * 4 + 1
    assert (found - expected).norm() < 0.04 * expected.norm()


def test_what_cannot_be_quantized_is_refused(tiny_model) -> None:
    with pytest.raises(UserError, match="acorn merge"):
        quantized(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])), "int8")
    with pytest.raises(UserError, match="no linear layer of 32, 64"):
        quantized(tiny_model(hidden_size=20, intermediate_size=20), "int8")


# ---- where weights lie


def test_weights_in_huge_pages_are_the_same(tiny_model, ids, monkeypatch) -> None:
    model = quantized(tiny_model(tie_word_embeddings=True), "int8")
    with torch.no_grad():
        expected, weights = model(ids).logits, {name: each.clone() for name, each in model.state_dict().items()}
        before = [each.data_ptr() for each in model.parameters()]
        in_huge_pages(model)
        assert [each.data_ptr() for each in model.parameters()] == before, f"less than {HUGE_PAGE} bytes stay"
        monkeypatch.setattr("inference.decoding.weights.HUGE_PAGE", 1)
        in_huge_pages(model)
        assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    places = sorted((each.data_ptr(), each.nbytes) for each in (*model.parameters(), *model.buffers()) if each.numel())
    assert not set(before) & {place for place, _ in places}
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(places))
    model.model.final_norm.weight.data.add_(1)  # it can be written to


# ---- the flags


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return grow(tmp_path_factory.mktemp("decode"), "--max_steps", "20", "--eval_steps", "20")


def test_the_flags_reach_the_model(run, capsys, monkeypatch) -> None:
    flags = [str(run), "--prompt", "the fox", "--temperature", "0", "--max_new_tokens", "30"]
    generate.main(flags)
    plain = capsys.readouterr().out
    made = []
    monkeypatch.setattr(generate, "compiled", lambda model: made.append(model) or compiled(model, backend="eager"))
    generate.main([*flags, "--compile"])
    assert capsys.readouterr().out == plain
    generate.main([*flags, "--compile", "--quantization", "int8", "--num_return_sequences", "1"])
    assert capsys.readouterr().out.startswith("the fox")
    assert isinstance(made[0].forward, CompiledStep) and isinstance(made[1].lm_head, Int8Linear)


def test_flags_that_cannot_be_are_refused(run) -> None:
    assert "did you mean 'int8'?" in refused(generate.main, str(run), "--quantization", "int4")
    for draft in (["--prompt_lookup_num_tokens", "2"], ["--assistant_model", str(run), "--temperature", "0"]):
        assert "not with drafts" in refused(generate.main, str(run), "--compile", *draft)
