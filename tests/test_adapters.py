"""Every adapter goes on every base, trains only what it should, is saved, loaded and merged to equal logits."""

import importlib.util
import warnings

import pytest
import torch
from peft import PeftModel

from finetune.adapters import (
    ADAPTERS,
    attach,
    build_loraplus,
    count_parameters,
    find_targets,
    linear_layers,
    quantization,
)
from finetune.arguments import AdapterArguments, FinetuneTrainingArguments, load_finetune_recipe
from finetune.trainer import refuse_checkpointing
from training.system.errors import UserError

from .tiny_bases import BASES, our_model, stock_model

GPT2_LAYERS = ["c_attn", "c_fc", "c_proj"]
OUR_LAYERS = ["down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
SMALL = {"r": 4, "num_virtual_tokens": 5}
WITH_PEFT = [name for name in ADAPTERS if name not in ("full", "qlora")]


def arguments(name: str, **settings) -> AdapterArguments:
    known = {key: value for key, value in SMALL.items() if key in ADAPTERS[name].options}
    return AdapterArguments(adapter=name, **known, **settings)


@pytest.fixture(params=BASES)
def base(request):
    """Stock GPT-2 and two of our own models."""
    return BASES[request.param]()


def ids() -> torch.Tensor:
    return torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=ids(), use_cache=False).logits


def moved(model):
    """The adapter after some training, made up: every trained parameter a little elsewhere."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


# each adapter on each base


@pytest.mark.parametrize("name", WITH_PEFT)
def test_saved_and_loaded_it_is_the_same(base, name: str, tmp_path) -> None:
    state = {key: value.clone() for key, value in base.state_dict().items()}
    adapted = moved(attach(base, arguments(name), "somewhere"))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    fresh = type(adapted.get_base_model())(base.config).eval()
    fresh.load_state_dict(state)
    assert not torch.allclose(logits(fresh), expected[:, -20:], atol=1e-3), "the adapter does something"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, tmp_path)), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in WITH_PEFT if name not in ("prompt", "prefix")])
def test_it_starts_as_the_base_and_merges(base, name: str) -> None:
    before = logits(base)
    adapted = attach(base, arguments(name), "somewhere")
    torch.testing.assert_close(logits(adapted), before, atol=2e-5, rtol=1e-4)
    expected = logits(moved(adapted))
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_PEFT)
def test_few_parameters_are_trained_and_all_of_them_learn(base, name: str) -> None:
    adapted = attach(base, arguments(name), "somewhere").train()
    trained, total = count_parameters(adapted)
    assert 0 < trained < total / 2
    output = adapted(input_ids=ids(), use_cache=False).logits[:, -20:]
    torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    gradients = {key: p.grad for key, p in adapted.named_parameters() if p.requires_grad}
    # of a fresh LoRA, A gets no gradient through the zero B, but it has one
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    assert [key for key, p in adapted.named_parameters() if not p.requires_grad and p.grad is not None] == []


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_virtual_tokens_come_without_a_warning(name: str) -> None:
    model = moved(attach(stock_model(), arguments(name), "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("name", ["prompt", "prefix", "lora", "ia3"])
def test_it_generates_with_the_cache_as_without(base, name: str) -> None:
    adapted = moved(attach(base, arguments(name), "somewhere")).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 256}
    prompt = ids()[:1, :6]
    grown = adapted.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    expected = prompt
    for _ in range(8):
        with torch.no_grad():
            following = adapted(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, following), dim=1)
        if following.item() == 256:
            break
    assert grown[0].tolist() == expected[0].tolist()


# what is adapted


@pytest.mark.parametrize(("name", "expected"), [("gpt2", GPT2_LAYERS), ("gpt", OUR_LAYERS)])
def test_every_linear_layer_of_the_blocks_without_being_told(name: str, expected: list[str]) -> None:
    model = BASES[name]()
    assert find_targets(None, model) == expected
    assert not any("lm_head" in layer for layer in linear_layers(model))
    adapted = attach(model, arguments("lora"), "somewhere")
    count = sum(layer.endswith("lora_A.default") for layer, _ in adapted.named_modules())
    assert count == len(linear_layers(BASES[name]()))


def test_targets_that_are_named() -> None:
    untied = stock_model(tie_word_embeddings=False)
    adapted = attach(untied, arguments("lora", target_modules=["c_attn", "wte"]), "somewhere")
    changed = {key.split(".lora")[0].split(".")[-1] for key, p in adapted.named_parameters() if p.requires_grad}
    assert changed == {"c_attn", "wte"}


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("target", ["c_atn", "q_proj", "attn"])
def test_targets_that_match_nothing_are_refused_with_what_there_is(name: str, target: str) -> None:
    with pytest.raises(UserError) as caught:
        attach(stock_model(), arguments(name, target_modules=[target]), "somewhere")
    assert f"target_modules='{target}'" in str(caught.value)
    assert "c_attn, c_fc, c_proj" in str(caught.value)


PAIRS = [("gpt2", "lm_head"), ("gpt2", "wte"), ("gpt2", "transformer.wte"), ("gpt", "embed_tokens"), ("gpt", "lm_head")]


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize(("base", "name"), PAIRS)
def test_either_name_trains_the_tied_pair(base: str, name: str, adapter: str, tmp_path) -> None:
    model = BASES[base]()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = moved(attach(model, arguments(adapter, modules_to_save=[name]), "somewhere"))
    head, embedding = adapted.get_output_embeddings(), adapted.get_input_embeddings()
    assert head.weight is embedding.weight
    assert not torch.equal(head.weight, state["lm_head.weight"]), "it is trained"
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(BASES[base](), tmp_path)), expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("lora", {"modules_to_save": ["head"]}, "modules_to_save='head'"),
        ("lora", {"modules_to_save": ["transformer"]}, "name parts of it"),
        ("ia3", {"modules_to_save": ["lm_head"]}, "are one tensor"),
        ("ia3", {"modules_to_save": ["wte"]}, "are one tensor"),
        ("ia3", {"target_modules": ["c_attn", "lm_head"], "feedforward_modules": []}, "are one tensor"),
        ("lora", {"target_modules": ["c_attn", "wte"]}, "--modules_to_save lm_head"),
        ("dora", {"target_modules": ["transformer.wte"]}, "--modules_to_save lm_head"),
        ("lora", {"target_modules": ["c_attn", "lm_head"]}, "--modules_to_save lm_head"),
    ],
)
def test_half_of_a_tied_pair_is_refused(name: str, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        attach(stock_model(), arguments(name, **settings), "somewhere")


@pytest.mark.parametrize("settings", [{"target_modules": ["c_attn", "wte"]}, {"modules_to_save": ["wte"]}])
def test_where_they_are_two_each_is_its_own(settings: dict) -> None:
    adapted = attach(stock_model(tie_word_embeddings=False), arguments("lora", **settings), "somewhere")
    trained = {key for key, p in adapted.named_parameters() if p.requires_grad}
    assert any("wte" in key for key in trained)
    assert not any("lm_head" in key for key in trained)
    expected = logits(moved(adapted))
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=2e-5, rtol=1e-4)


def test_ia3_on_an_unknown_model_asks_for_names() -> None:
    model = our_model()
    for layer in model.model.layers:
        layer.mlp.second = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(UserError, match=r"--feedforward_modules.*there are k_proj"):
        attach(model, arguments("ia3"), "somewhere")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kv_sharing_modes": ["store", "reuse"]}, "shared ones"),
        ({"position_encoding": "rope", "kv_lora_rank": 8}, "latents"),
        ({"kv_quantization": "int4"}, "kv_quantization='int4' needs .*choose prompt or lora"),
        ({"position_encoding": "rope", "memory_length": 16}, "memory_length=16 needs .*choose prompt or lora"),
    ],
)
def test_prefix_is_refused_where_no_plain_cache_holds_it(fields: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"adapter=prefix: .*{named}"):
        attach(our_model(**fields), arguments("prefix"), "somewhere")


def test_prefix_is_refused_where_fsdp_checkpoints(monkeypatch, tmp_path) -> None:
    args = FinetuneTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    refuse_checkpointing(args, arguments("prefix"))
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    refuse_checkpointing(args, arguments("prompt"))
    with pytest.raises(UserError, match=r"fsdp_activation_checkpointing=True: .*choose adapter=prompt or lora"):
        refuse_checkpointing(args, arguments("prefix"))


# settings


def test_loraplus_teaches_b_faster(tmp_path) -> None:
    adapted = attach(stock_model(), arguments("loraplus"), "somewhere")
    args = FinetuneTrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-3)
    optimizer = build_loraplus(adapted, args, 16.0)
    names = {id(parameter): name for name, parameter in adapted.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {16e-3}


@pytest.mark.parametrize(
    ("name", "setting"),
    [("rslora", "use_rslora"), ("dora", "use_dora"), ("pissa", "init_lora_weights"), ("loraplus", "r")],
)
def test_the_variants_are_switched_on(name: str, setting: str) -> None:
    plain = attach(stock_model(), AdapterArguments(adapter="lora"), "somewhere").peft_config["default"]
    chosen = attach(stock_model(), arguments(name), "somewhere").peft_config["default"]
    assert getattr(chosen, setting) != getattr(plain, setting)


@pytest.mark.parametrize("flag", ["adapter lorra", "r 0", "lora_dropout 1.0", "num_virtual_tokens 0", "lora_alpha -1"])
def test_wrong_settings_are_refused(flag: str) -> None:
    with pytest.raises(UserError, match=flag.split()[0]):
        load_finetune_recipe(["gpt2", *f"--{flag}".split()])


@pytest.mark.skipif(
    torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None, reason="here qlora works"
)
def test_qlora_says_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"needs a CUDA GPU and bitsandbytes"):
        quantization("qlora", "bf16")
    assert quantization("lora", "bf16") == {}
