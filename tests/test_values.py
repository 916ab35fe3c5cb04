"""YAML without surprises: 1.2's plain values, no key twice, limits, and a text that comes back as it was."""

import time

import pytest
import yaml

from training.config.recipe import load_recipe_file
from training.config.values import dump, load
from training.system.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("[off, Yes, on]", ["off", "Yes", "on"]),
        ("true", True),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1e-3", 0.001),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        (".inf", float("inf")),
        ("~", None),
        ("", None),
        ("{a: &x {b: 1}, c: {<<: *x, b: 2}}", {"a": {"b": 1}, "c": {"b": 2}}),
    ],
)
def test_plain_values(text: str, value) -> None:
    assert load(text) == value


def bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 20):
        before, name = chr(96 + number), chr(97 + number)
        lines.append(f"{name}: &{name} [{', '.join(['*' + before] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\na: 2", "'a' is given twice"),
        ("x: {b: 1, b: 2}", "'b' is given twice"),
        (bomb(), "stands for more than"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 20_000, "nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [1]\n: 2", "unhashable"),
        ("a: !!int x", "invalid literal"),
        ("#" * 2_000_000, "longer than"),
    ],
    ids=["twice", "twice-inside", "bomb", "loop", "deep", "code", "list-as-key", "no-int", "long"],
)
def test_what_is_refused(text: str, named: str, tmp_path) -> None:
    before = time.process_time()
    with pytest.raises(yaml.YAMLError, match=named):
        load(text)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="mine") as caught:
        load_recipe_file(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)
    assert time.process_time() - before < 10, "a few lines hang nothing"


def test_what_is_dumped_comes_back() -> None:
    texts = ["no", "1e-3", "010", "0o7", "1:30", "~", ".5", "1.", "2024-01-01", "é\n", "true", "<<", "+1"]
    value = {"texts": texts, "numbers": [1e-5, 1e22, 3, float("inf")], "others": [True, None, {}]}
    assert load(dump(value)) == value
    assert yaml.safe_load(dump(value)) == value, "YAML 1.1 reads it as the same"


def recipe(tmp_path, text: str):
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return load_recipe_file(str(tmp_path / "mine.yaml"))


def test_words_that_yaml_1_1_takes_for_switches(tmp_path) -> None:
    read = recipe(tmp_path, "training: {eval_strategy: no, save_strategy: no, report_to: none, bf16: off}\n"
                            "card: {language: [no]}\ndata: {dataset_config: no}\n")  # fmt: skip
    assert read.training == {"eval_strategy": "no", "save_strategy": "no", "report_to": ["none"], "bf16": False}
    assert read.card == {"language": ["no"]}
    assert read.data == {"dataset_config": "no"}
    args = read.training_arguments()
    assert (args.eval_strategy, args.save_strategy, args.report_to) == ("no", "no", [])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("training: {max_steps: 1:30}", "max_steps='1:30': expected int"),
        ("training: false", "section training must hold"),
        ("model: {n_embd: 64, hidden_size: 32}", "n_embd and hidden_size are two names"),
        ("training: {gradient_checkpointing_kwargs: {use_reentrant: no}}", "use_reentrant='no': write true or false"),
        ("data: {text_files: [5]}", "text_files=5: expected str"),
        ("training: {lr_scheduler_kwargs: text}", "lr_scheduler_kwargs='text': expected dict"),
    ],
)
def test_what_a_recipe_can_not_say(text: str, named: str, tmp_path) -> None:
    with pytest.raises(UserError, match="mine") as caught:
        recipe(tmp_path, text)
    assert named in str(caught.value)


def test_a_count_with_a_leading_zero_is_decimal(tmp_path) -> None:
    assert recipe(tmp_path, "training: {max_steps: 010}").training == {"max_steps": 10}
