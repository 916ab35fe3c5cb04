"""A run that starts from another's weights: what it takes over, a longer context, and what is refused."""

import shutil

import pytest
import torch
import yaml

from modeling import GPTConfig
from training import estimate, pretrain
from training.config.command_line import load_recipe
from training.model.starting import architecture_to_start_from

from .tiny_runs import go_on, grow, refused, same_weights, tiny_argv, weights
from .variants import VARIANTS, tiny_config

ROPE = ("--position_encoding", "rope", "--tie_word_embeddings", "false")
STILL = ("--max_steps", "1", "--eval_steps", "1", "--learning_rate", "0", "--max_new_tokens", "0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of 16 tokens of context, with rotary positions."""
    return grow(tmp_path_factory.mktemp("starting"), *ROPE, name="base")


def started(*flags: str, name: str = "other") -> list[str]:
    """What comes after `acorn pretrain` for a run from `base`, with no word of the architecture but `flags`."""
    kept = [word for word in tiny_argv(*STILL, "--model_name_or_path", "base", name=name)]
    for shape in ("--n_layer", "--n_embd", "--n_head", "--block_size"):
        place = kept.index(shape)
        del kept[place : place + 2]
    return [*kept, *flags]


def test_a_run_begins_with_the_weights_architecture_and_tokenizer_of_another(base, monkeypatch) -> None:
    monkeypatch.chdir(base.parent)
    pretrain.main(started(name="same"))
    assert same_weights(base, base.parent / "same")
    ours, theirs = (GPTConfig.from_pretrained(place).to_dict() for place in (base, "same"))
    assert ours == theirs
    assert (base / "tokenizer.json").read_bytes() == (base.parent / "same/tokenizer.json").read_bytes()
    assert "from the weights of `base`" in (base.parent / "same/README.md").read_text(encoding="utf-8")


def test_its_context_is_extended_and_the_run_goes_on_without_the_base(base, tmp_path, monkeypatch) -> None:
    for name in ("base", "text.txt"):
        place = base.parent / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    pretrain.main(started("--block_size", "64", "--rope_parameters", "{rope_type: yarn, factor: 4}", name="long"))
    config = GPTConfig.from_pretrained("long")
    assert config.max_position_embeddings == 64
    assert config.rope_parameters["original_max_position_embeddings"] == 16
    assert config.rope_parameters["rope_theta"] == 10000.0
    shutil.rmtree("base")
    go_on(tmp_path / "long", "--max_steps", "2", "--learning_rate", "1e-2")
    assert not torch.equal(
        weights(tmp_path / "long/checkpoint-1")["lm_head.weight"],
        weights(tmp_path / "long/checkpoint-2")["lm_head.weight"],
    )


def test_what_follows_from_a_changed_key_follows_still(base, monkeypatch) -> None:
    monkeypatch.chdir(base.parent)
    recipe = load_recipe("pretrain", started("--sliding_window", "8"))
    assert recipe.model_config().layer_types == ["sliding_attention"] * 2
    assert recipe.model_config().max_position_embeddings == 16


def test_every_architecture_is_taken_over(tmp_path) -> None:
    for name, arguments in VARIANTS.items():
        tiny_config(**arguments).save_pretrained(tmp_path / name)
        taken = GPTConfig(**architecture_to_start_from(str(tmp_path / name), {})).to_dict()
        saved = GPTConfig.from_pretrained(tmp_path / name).to_dict()
        assert {key: saved[key] for key in taken} == taken, name


def test_the_recipe_of_such_a_run_is_a_recipe_again(base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(base.parent)
    recipe = load_recipe("pretrain", started("--block_size", "32"))
    recipe.save(tmp_path / "again.yaml")
    again = load_recipe("pretrain", [str(tmp_path / "again.yaml")])
    assert again.model_config().to_dict() == recipe.model_config().to_dict()
    assert yaml.safe_load((tmp_path / "again.yaml").read_text(encoding="utf-8"))["data"]["tokenizer"] == "base"


def test_an_estimate_knows_the_architecture(base, monkeypatch, capsys) -> None:
    monkeypatch.chdir(base.parent)
    estimate.main(started("--block_size", "64"))
    assert f"{sum(w.numel() for w in weights(base).values()):,}" in capsys.readouterr().out


REFUSED = {
    "a context below the trained one": (("--block_size", "8"), "block_size=8: base was trained with a context of 16"),
    "a preset": (("--preset", "gpt2"), "preset='gpt2': base has an architecture of its own"),
    "another tokenizer": (("--tokenizer", "byte"), "tokenizer='byte': base keeps its own tokenizer"),
    "another shape": (("--n_embd", "64"), "another shape of"),
    "fewer layers": (("--n_layer", "1"), "more than the model asks: model.layers.1"),
    "more layers": (("--n_layer", "3"), "no model.layers.2"),
    "a scaling without factor": (("--rope_parameters", "{rope_type: yarn}"), "rope_parameters.factor"),
    "an unknown scaling": (("--rope_parameters", "{rope_type: yarm, factor: 4}"), "rope_parameters.rope_type='yarm'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, base, monkeypatch) -> None:
    flags, words = REFUSED[case]
    monkeypatch.chdir(base.parent)
    assert words in refused(pretrain.main, *started(*flags, name="never"))
    assert not (base.parent / "never").exists()


def test_learned_positions_are_not_extended(tmp_path, monkeypatch) -> None:
    tiny_config().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    flags = ["quickstart", "--model_name_or_path", "base"]
    assert "learned positions are fixed at 32" in refused(pretrain.main, *flags, "--block_size", "64")
    parameters = ["--rope_parameters", "{rope_type: linear, factor: 2}"]
    assert "the positions of base are learned" in refused(pretrain.main, *flags, *parameters)


def test_what_is_no_model_of_ours_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no such directory" in refused(pretrain.main, "quickstart", "--model_name_or_path", "./none")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    message = refused(pretrain.main, "quickstart", "--model_name_or_path", "gpt2")
    assert "holds a model of gpt2; convert it first" in message
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}", encoding="utf-8")
    assert "acorn merge" in refused(pretrain.main, "quickstart", "--model_name_or_path", "adapter")
