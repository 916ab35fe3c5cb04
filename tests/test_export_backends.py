"""`acorn export --format vllm-check`, and a model driven as vLLM's and SGLang's Transformers backends drive it."""

import json

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel

from inference import export
from inference.formats.backends import MISSING, Instance, attention, outside_attention
from modeling import GPTForCausalLM
from training.data.tokenizers import build_tokenizer

from .foreign import stock_gpt2
from .tiny_runs import refused
from .variants import HOLDS_LATENTS, VARIANTS, WITHOUT_KEYS, random_model, tiny_config


@pytest.fixture
def directory(tmp_path):
    """`directory(**config)`: a tiny model with its code and tokenizer."""

    def save(**fields):
        random_model(tiny_config(vocab_size=257, **fields)).save_pretrained(tmp_path / "model")
        build_tokenizer("byte").save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def statuses(printed: str) -> dict[str, list[str]]:
    """Status: what has it."""
    found: dict[str, list[str]] = {}
    for line in printed.splitlines():
        status, _, what = line.partition(" ")
        found.setdefault(status, []).append(what.strip())
    return found


@pytest.mark.parametrize("name", sorted(WITHOUT_KEYS))
def test_states_are_not_what_backends_hold(name: str) -> None:
    [(status, what)] = attention(random_model(tiny_config(**VARIANTS[name])))
    assert status == MISSING
    assert "linear_attention has a state" in what


@pytest.mark.parametrize("name", sorted(HOLDS_LATENTS))
def test_latents_are_not_what_backends_hold(name: str) -> None:
    [(status, what)] = attention(random_model(tiny_config(**VARIANTS[name])))
    assert status == MISSING
    assert what.startswith("kv_lora_rank=12: the layers hold latents")


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in WITHOUT_KEYS | HOLDS_LATENTS | {"bigrams"}])
def test_attention_from_outside(name: str) -> None:
    lines = list(attention(random_model(tiny_config(**VARIANTS[name]))))
    assert len(lines) == 3
    assert [what for status, what in lines if status == MISSING] == []


@torch.no_grad()
def test_as_a_backend_loads_it(directory) -> None:
    """The class comes from the directory, its linear layers and norms are replaced, its weights get another prefix."""
    path = directory(**VARIANTS["modern"], num_key_value_heads=2)
    ours = GPTForCausalLM.from_pretrained(path).eval()
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    AttentionInterface.register("theirs", outside_attention)
    config._attn_implementation = "theirs"
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    replaced = replace(model)
    assert replaced == {"Linear": 2 * 6, "RMSNorm": 2 * 4 + 2}
    assert all(any(matches(pattern, name) for pattern in model.tp_plan) for name in linear_names(model))
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in ours.model.state_dict().items()})
    ids = torch.randint(257, (1, 20))
    instances = {layer: Instance(config, layer, torch.zeros(20)) for layer in range(2)}
    options = {"use_cache": False, "return_dict": False, "attention_instances": instances}
    found = model(input_ids=ids, inputs_embeds=None, position_ids=torch.arange(20)[None], **options)[0]
    torch.testing.assert_close(found, ours.model(ids, use_cache=False).last_hidden_state, rtol=1e-5, atol=1e-5)


def matches(pattern: str, name: str) -> bool:
    """Whether a plan's pattern, where * is a number, means the module."""
    return [part for part in name.split(".") if not part.isdigit()] == [
        part for part in pattern.split(".") if part != "*"
    ]


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


class TheirLinear(nn.Linear):
    """In the place of a linear layer."""


class TheirRMSNorm(nn.RMSNorm):
    """In the place of a norm."""


def replace(module: nn.Module) -> dict[str, int]:
    """Put classes of a backend's own in the place of linear layers and RMS norms; how many of each."""
    counts: dict[str, int] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            new = TheirLinear(child.in_features, child.out_features, child.bias is not None)
        elif type(child).__name__.endswith("RMSNorm"):
            new = TheirRMSNorm(child.normalized_shape, child.eps, child.weight is not None)
        else:
            for kind, count in replace(child).items():
                counts[kind] = counts.get(kind, 0) + count
            continue
        setattr(module, name, new)
        kind = type(child).__name__
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def test_what_is_printed(directory, capsys) -> None:
    path = directory(position_encoding="rope", sliding_window=5)
    export.main([str(path), "--format", "vllm-check"])
    printed = capsys.readouterr().out
    found = statuses(printed.partition("Next")[0])
    assert "layer_types: sliding_attention, sliding_window=5" in found["ok"]
    assert any("modeling_gpt.py" in what for what in found["ok"])
    assert any("base_model_tp_plan has 6 entries" in what for what in found["ok"])
    assert [what.partition(":")[0] for what in found["limit"]] == ["pipeline parallel"]
    assert f"vllm serve {path} --model-impl transformers" in printed
    assert found.keys() == {"ok", "limit"}


def test_what_is_missing(directory, capsys) -> None:
    path = directory(logit_softcap=2.0, lm_head_bias=True, head_dim=6)
    (path / "positions.py").unlink()
    (path / "loss.py").write_bytes(b"\x80 (")
    (path / "tokenizer.json").unlink()
    config = json.loads((path / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (path / "config.json").write_text(json.dumps(config))
    line = refused(export.main, str(path), "--format", "vllm-check")
    found = statuses(capsys.readouterr().out)
    assert [what.partition("=")[0] for what in found["missing"]] == [
        "config.json: auto_map.AutoModel",
        "code: loss.py, positions.py not there, or damaged",
    ]
    assert any("logit_softcap=2.0: their heads read it as final_logit_softcapping" in what for what in found["ok"])
    assert all(what in line for what in found["missing"])
    kinds = {what.replace("=", ":").partition(":")[0] for what in found["limit"]}
    assert kinds == {"tokenizer.json", "head_dim", "lm_head_bias", "pipeline parallel"}


def test_refusals(directory, tmp_path) -> None:
    path = str(directory())
    assert "writes nothing" in refused(export.main, path, "x", "--format", "vllm-check")
    assert "no such file" in refused(export.main, str(tmp_path / "none"), "--format", "vllm-check")
    stock_gpt2().save_pretrained(tmp_path / "stock")
    assert "is stock GPT-2" in refused(export.main, str(tmp_path / "stock"), "--format", "vllm-check")
