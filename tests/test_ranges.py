"""Every number has a range: what is outside of it is one line that names the field, whatever way it is given."""

import math
import typing

import pytest
import yaml

from finetune.arguments import FinetuneRecipe, load_finetune_recipe
from inference import generate
from training.config.command_line import load_recipe
from training.config.recipe import Recipe, known_keys
from training.system.errors import UserError
from training.system.flags import RANGES, check_number

from .tiny_runs import latest, refused

BAD = ["-1", "0", "nan", "inf", "-inf", "1e400", "1e15", "", "x", "[]", "{}", "1.5", "1:30", "true"]


def numbers(kind: type[Recipe]) -> list[tuple[str, typing.Any]]:
    """(section, key) of all that can be a number."""
    keys = ((section, key, hint) for section, hints in known_keys(kind).items() for key, hint in hints.items())
    return sorted({(s, key) for s, key, hint in keys if {int, float} & {hint, *typing.get_args(hint)}})


def outcome(build, key: str, value: str) -> str:
    """ "taken", or the line that refuses a value; anything else is an error of its own."""
    try:
        build(key, value)
    except UserError as error:
        assert "\n" not in str(error), (key, value)
        return str(error)
    return "taken"


def pretraining(key: str, value: str) -> None:
    recipe = load_recipe("pretrain", latest("shakespeare-char-cpu", "--max_steps", "8", f"--{key}={value}"))
    recipe.model_config()
    recipe.training_arguments()


def finetuning(key: str, value: str) -> None:
    load_finetune_recipe(["gpt2", f"--{key}={value}"]).training_arguments()


@pytest.mark.parametrize(("kind", "build"), [(Recipe, pretraining), (FinetuneRecipe, finetuning)])
def test_no_number_ends_in_a_traceback(kind: type[Recipe], build, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = [key for section, key in numbers(kind) if kind is Recipe or section in ("adapter", "data", "model")]
    found = {(key, value): outcome(build, key, value) for key in keys for value in BAD}
    impossible = [(key, value) for (key, value), said in found.items() if said == "taken" and value in BAD[2:11]]
    assert [(key, value) for key, value in impossible if value != "1e15"] == []
    unnamed = [(key, value) for (key, value), said in found.items() if said != "taken" and not names(key, said)]
    assert unnamed == []
    assert list(tmp_path.iterdir()) == []


def names(key: str, message: str) -> bool:
    from modeling import GPTConfig

    return key in message or GPTConfig.attribute_map.get(key, key) in message or key == "dropout"


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "max_steps": ["0", "-5", "nan"],
        "early_stopping_patience": ["-1", "0"],
        "save_steps": ["nan", "0", "-3", "2.5"],
        "eval_steps": ["inf"],
        "learning_rate": ["-1", "nan"],
        "weight_decay": ["-1", "nan"],
        "adam_beta1": ["1", "-0.1"],
        "adam_beta2": ["1.5"],
        "adam_epsilon": ["-1"],
        "warmup_steps": ["nan", "inf", "-1"],
        "num_train_epochs": ["nan", "0"],
        "seed": ["-1", "4294967296"],
        "dataloader_num_workers": ["-1", "100000000"],
        "max_grad_norm": ["-1"],
        "tokens_per_step": ["0"],
        "validation_fraction": ["nan", "0", "1"],
        "shard_size": ["0"],
        "num_proc": ["0"],
    }.items(),
)
def test_from_flags_and_from_a_recipe(key: str, values: list[str], tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    for value in values:
        assert f"{key}=" in outcome(pretraining, key, value)
        section = "data" if key in ("validation_fraction", "shard_size", "num_proc") else "training"
        path.write_text(yaml.safe_dump({section: {key: value}}), encoding="utf-8")
        with pytest.raises(UserError, match=f"mine.*{key}="):
            load_recipe("pretrain", [str(path)])


def test_momentum_is_muons() -> None:
    assert "muon_momentum=" in outcome(pretraining, "muon_momentum", "1")
    assert "muon_momentum=" in outcome(pretraining, "muon_momentum", "-0.5")


@pytest.mark.parametrize(
    "flags",
    [
        "--temperature nan",
        "--temperature 1e-45",
        "--temperature -1",
        "--repetition_penalty nan",
        "--repetition_penalty 0",
        "--seed -1",
        "--seed 4294967296",
        "--top_p nan",
        "--top_k -1",
        "--num_samples 0",
        "--max_new_tokens 0",
        "--temperature 1 --temperature 2",
        "--prompt",
        "--prompt \udcff",
    ],
)
def test_generate_refuses_before_it_looks_for_the_model(flags: str) -> None:
    message = refused(generate.main, "nowhere", *flags.split(" "))
    assert "nowhere" not in message
    assert flags.split()[0].strip("-") in message or "UTF-8" in message


def test_the_words_of_a_range() -> None:
    most = "1,000,000,000,000"
    for name, value, words in (
        ("learning_rate", math.nan, "a finite number of at least 0"),
        ("tokens_per_step", 0, f"a whole number from 1 to {most}"),
        ("warmup_steps", -1, f"a share of the run between 0 and 1, or a whole number from 0 to {most}"),
        ("adam_beta1", 1.0, "at least 0 and below 1"),
    ):
        with pytest.raises(UserError) as caught:
            check_number(name, value)
        assert str(caught.value) == f"{name}={value}: must be {words}"


def test_every_range_holds_something() -> None:
    for name, range_ in RANGES.items():
        assert range_.holds(1) or range_.holds(0.5), name
        assert not range_.holds(float("nan")), name
        assert not range_.holds(float("inf")), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_field_without_a_range_still_takes_finite_numbers_only(value: float) -> None:
    with pytest.raises(UserError, match="must be a finite number"):
        check_number("initializer_range", value)
