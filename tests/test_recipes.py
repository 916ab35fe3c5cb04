"""Every shipped recipe fits its dataclasses, and flags lie over recipes in the way people expect."""

import itertools
import re
import shlex

import pytest
import torch
import yaml

from finetune.arguments import FinetuneRecipe
from modeling import GPTForCausalLM
from training.config.arguments import DataArguments
from training.config.command_line import load_recipe
from training.config.presets import PRESETS
from training.config.recipe import (
    RECIPES_DIR,
    Recipe,
    known_keys,
    load_recipe_file,
    shipped_recipes,
)
from training.config.values import coerce
from training.system.errors import UserError

from .tiny_runs import parse_flags

RECIPES = sorted(path.stem for path in RECIPES_DIR.glob("*.yaml"))
VOCABULARIES = {"byte": 257, "char": 66, "gpt2": 50257, "openai-community/gpt2": 50257}  # char: Shakespeare's


@pytest.fixture
def recipe_file(tmp_path):
    """The factory `recipe_file(text) -> str`: the path of a recipe with this text."""

    def make(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return make


def vocabulary_of(recipe) -> int:
    data = recipe.data_arguments()
    known = data.tokenizer_vocab_size or VOCABULARIES.get(data.tokenizer, 50257)
    return max(known, recipe.model.get("vocab_size", 0))


# the shipped ones


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_dataclasses(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe_file(name)
    assert recipe.name == name
    # what only a GPU can do is refused on a CPU by transformers itself
    recipe.training.update({"bf16": False, "fp16": False, "tf32": None})
    args = recipe.training_arguments()
    assert args.output_dir == f"runs/{name}"
    assert args.max_steps > 0 or args.num_train_epochs > 0
    assert recipe.sample_arguments().max_new_tokens >= 0
    data = recipe.data_arguments()
    assert data.text_files or data.data_files or data.dataset or data.mixture
    with torch.device("meta"):
        model = GPTForCausalLM(recipe.model_config(vocab_size=vocabulary_of(recipe)))
    assert model.num_parameters() > 1000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [Recipe, FinetuneRecipe], ids=["pretrain", "finetune"])
def test_every_recipe_says_what_it_reached_and_where_or_that_it_was_not_run(kind) -> None:
    for path in kind.directory.glob("*.yaml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
        assert re.search(r"\b[Nn]ot\b.*\brun\b|[Mm]easured.*(Xeon|EPYC|[AH]\d00)", comment), path


@pytest.mark.parametrize("kind", [Recipe, FinetuneRecipe], ids=["pretrain", "finetune"])
def test_every_recipe_names_its_tokens_a_step_and_two_processes_do_no_more(kind) -> None:
    for name in shipped_recipes(kind):
        recipe = load_recipe_file(name, kind)
        tokens = recipe.training["tokens_per_step"]
        assert "gradient_accumulation_steps" not in recipe.training, f"{name}: it follows from tokens_per_step"
        context = recipe.data["block_size"] if kind is FinetuneRecipe else recipe.model_config().max_position_embeddings
        for processes in (count for count in (1, 2, 4) if count * context <= tokens):  # a step may be one sequence
            recipe.training.update({"bf16": False, "fp16": False, "activation_checkpointing": False})
            args = recipe.training_arguments()
            given = args.per_device_train_batch_size
            rows = args.share_out(context, processes)
            assert args.tokens_per_step == tokens == rows * context
            assert rows == args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
            assert args.per_device_train_batch_size == min(given, rows // processes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_begins_with_a_comment(name: str) -> None:
    first = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# \S.{10,118}", first)


@pytest.mark.parametrize("name", RECIPES)
def test_warm_up_and_decay_fit_into_the_steps(name: str) -> None:
    recipe = load_recipe_file(name)
    steps = recipe.training.get("max_steps", -1)
    warmup = recipe.training.get("warmup_steps", 100)
    decay = (recipe.training.get("lr_scheduler_kwargs") or {}).get("num_decay_steps", 0)
    assert steps < 0 or (warmup * steps if warmup < 1 else warmup) + decay <= steps


def sized() -> list[tuple[str, float]]:
    """(recipe, millions of parameters) where the first comment or the name says how many."""
    pairs = []
    for name in RECIPES:
        comment = (RECIPES_DIR / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        said = re.search(r"(\d+(?:\.\d+)?) ?M\b", f"{comment} {name.replace('-', ' ').upper()}")
        pairs += [(name, float(said[1]))] if said else []
    return pairs


@pytest.mark.parametrize(("name", "millions"), sized())
def test_a_recipe_grows_what_it_says(name: str, millions: float) -> None:
    recipe = load_recipe_file(name)
    with torch.device("meta"):
        model = GPTForCausalLM(recipe.model_config(vocab_size=vocabulary_of(recipe)))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.02)


def test_some_recipe_says_its_size() -> None:
    assert {"quickstart", "shakespeare-char", "shakespeare-char-cpu"} <= dict(sized()).keys()


# keys


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: {n_layers: 2}", "did you mean 'n_layer'"),
        ("training: {learning_rat: 1}", "did you mean 'learning_rate'"),
        ("data: {text_file: [a]}", "did you mean 'text_files'"),
        ("sample: {promt: a}", "did you mean 'prompt'"),
        ("trainig: {}", "did you mean 'training'"),
        ("model: {preset: gpt2-midium}", "did you mean 'gpt2-medium'"),
        ("model: {n_layer: two}", "n_layer='two': expected int"),
        ("model: {n_layer: 2.5}", "n_layer=2.5: expected int"),
        ("model: {n_layer: true}", "n_layer=True: expected int"),
        ("model: {bias: maybe}", "bias='maybe': expected bool"),
        ("model: {n_layer: null}", "n_layer: needs a value"),
        ("training: {learning_rate: fast}", "learning_rate='fast': expected float"),
        ("model: [n_layer]", "section model"),
        ("- model", "mapping of sections"),
        ("model: {n_layer: 2", "not a YAML file"),
    ],
)
def test_what_a_recipe_can_not_hold(recipe_file, text: str, named: str) -> None:
    assert named in refused_file(recipe_file(text))


def refused_file(path: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe_file(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_error_in_a_recipe_names_the_file(recipe_file) -> None:
    for text in ("model: {n_layers: 2}", "model: {n_layer: two}", "trainig: {}"):
        assert "mine.yaml" in refused_file(recipe_file(text))


def test_sections_may_be_empty_or_absent(recipe_file) -> None:
    assert load_recipe_file(recipe_file("model:\ntraining:\n")).model == {}
    assert load_recipe_file(recipe_file("")).name == "mine"


def test_exponents_without_a_point_are_numbers(recipe_file) -> None:
    recipe = load_recipe_file(recipe_file("training: {learning_rate: 1e-3, max_steps: 1e3, weight_decay: 0}"))
    assert recipe.training == {"learning_rate": 0.001, "max_steps": 1000, "weight_decay": 0.0}
    assert parse_flags(["--learning_rate", "3e-4"]) == {"training": {"learning_rate": 0.0003}}


@pytest.mark.parametrize("value", ["nan", "inf", "1e400"])
def test_a_count_is_a_finite_number(value: str) -> None:
    with pytest.raises(UserError, match="max_steps"):
        coerce("max_steps", value, int)


# flags


def test_flags_take_every_form() -> None:
    flags = "--bf16 --n_layer=3 --text_files a.txt b.txt --layer_types '[full_attention, sliding_attention]'"
    flags += " --rope_parameters {rope_type: linear, factor: 2.0} --top_k none --prompt two words"
    flags += " --early_stopping_patience 3"
    assert parse_flags(shlex.split(flags)) == {
        "training": {"bf16": True, "early_stopping_patience": 3},
        "model": {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
        "data": {"text_files": ["a.txt", "b.txt"]},
        "sample": {"top_k": None, "prompt": "two words"},
    }


def test_negative_numbers_are_values() -> None:
    assert parse_flags(["--max_steps", "-1"]) == {"training": {"max_steps": -1}}
    assert parse_flags(["--prompt", "-x", "-y"]) == {"sample": {"prompt": "-x -y"}}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--learning_rte", "1"], "did you mean '--learning_rate'"),
        (["--n_layer", "deep"], "n_layer='deep': expected int"),
        (["--n_layer"], "--n_layer: needs a value"),
        (["--output_dir"], "--output_dir: needs a value"),
        (["--prompt"], "--prompt: needs a value"),
        (["--text_files"], "--text_files: needs a value"),
        (["--n_layer", "2", "--n_layer", "3"], "--n_layer is given twice"),
        (["--n_embd", "64", "--hidden_size", "64"], "n_embd and hidden_size are two names"),
        (["--lr_scheduler_kwargs", "[1"], "lr_scheduler_kwargs='[1': expected dict"),
        (["--lr_scheduler_kwargs", "{a: no}"], "lr_scheduler_kwargs.a='no': write true or false"),
        (["--lr_scheduler_kwargs", "{a: .nan}"], "lr_scheduler_kwargs.a=nan: must be a finite number"),
        (["--n_layer", "2", "3"], "n_layer='2 3': expected int"),
        (["stray"], "'stray' is not a flag"),
        (["--layer_types", "[full_attention"], "layer_types"),
        (["--rope_parameters", "{a: 1"], "rope_parameters"),
    ],
)
def test_flags_that_can_not_be(flags: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_flags(flags)
    assert named in str(caught.value)


@pytest.mark.parametrize("flag", ["n_embd", "hidden_size"])
@pytest.mark.parametrize("key", ["n_embd", "hidden_size", "preset"])
def test_a_flag_wins_whatever_name_either_uses(recipe_file, key: str, flag: str) -> None:
    path = recipe_file(f"model: {{{key}: {'gpt2' if key == 'preset' else 48}, n_head: 4}}")
    recipe = load_recipe("pretrain", [path, f"--{flag}", "64"])
    assert recipe.model_config().hidden_size == 64


def test_a_flag_wins_over_a_recipe_saved_after_a_flag(recipe_file, tmp_path) -> None:
    recipe = load_recipe("pretrain", [recipe_file("model: {block_size: 16}"), "--max_position_embeddings", "32"])
    recipe.save(tmp_path / "saved.yaml")
    again = load_recipe("pretrain", [str(tmp_path / "saved.yaml"), "--block_size", "64"])
    assert again.model_config().max_position_embeddings == 64


def test_dropout_is_all_three(recipe_file) -> None:
    config = load_recipe("pretrain", [recipe_file("model: {preset: gpt1}"), "--dropout", "0.3"]).model_config()
    assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == (0.3, 0.3, 0.3)


def test_one_dropout_of_the_three_is_heard(recipe_file) -> None:
    path = recipe_file("model: {dropout: 0.2, preset: gpt2}")
    config = load_recipe("pretrain", [path, "--attention_dropout", "0.1"]).model_config()
    assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == (0.2, 0.1, 0.2)
    path = recipe_file("model: {attention_dropout: 0.2, preset: gpt2}")
    config = load_recipe("pretrain", [path, "--dropout", "0.3"]).model_config()
    assert (config.embedding_dropout, config.attention_dropout, config.residual_dropout) == (0.3, 0.3, 0.3)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_may_come_by_flag(recipe_file, name: str) -> None:
    recipe = load_recipe("pretrain", [recipe_file("data: {tokenizer: byte}"), "--preset", name])
    assert recipe.model_config().hidden_size == PRESETS[name]["hidden_size"]


def test_a_source_replaces_the_recipes_source(recipe_file) -> None:
    path = recipe_file("data: {dataset: some/set, dataset_config: en, streaming: true, tokenizer: char}")
    assert load_recipe("pretrain", [path, "--text_files", "a.txt"]).data == {
        "tokenizer": "char",
        "text_files": ["a.txt"],
    }
    other = load_recipe("pretrain", [path, "--dataset", "other/set", "--dataset_split", "train[:1%]"])
    assert other.data_arguments() == DataArguments(dataset="other/set", dataset_split="train[:1%]", tokenizer="char")
    same = load_recipe("pretrain", [path, "--tokenizer", "byte"])
    assert same.data_arguments().dataset == "some/set"


def test_the_command_is_kept_as_typed() -> None:
    argv = ["quickstart", "--prompt", "two words", "--max_steps", "3"]
    assert shlex.split(load_recipe("pretrain", argv).command) == ["acorn", "pretrain", *argv]


def test_a_saved_recipe_is_the_same_recipe(tmp_path) -> None:
    recipe = load_recipe("pretrain", ["shakespeare-char-fast", "--learning_rate", "1e-4", "--text_files", "ä.txt"])
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe_file(str(tmp_path / "recipe.yaml")) == recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))["data"]["text_files"] == ["ä.txt"]


def test_every_key_has_a_type_that_can_be_read() -> None:
    unreadable = []
    for keys in known_keys().values():
        for key, hint in keys.items():
            try:
                coerce(key, "1", hint)
            except UserError:
                continue  # "1" is not of its type
            except Exception as error:
                unreadable.append((key, error))
    assert unreadable == []


def test_the_smoothing_of_an_older_recipe_is_training_s(tmp_path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("model: {n_layer: 1, label_smoothing: 0.1}\n", encoding="utf-8")
    recipe = load_recipe_file(str(path))
    assert (recipe.model, recipe.training) == ({"num_hidden_layers": 1}, {"label_smoothing_factor": 0.1})


def test_another_text_or_tokenizer_is_not_held_to_the_recipes_vocabulary() -> None:
    """Written in the recipe, the usual size is as many tokens as another text has pairs for; asked for, it is exact."""
    for flags, expected in (
        ("--text_files a.txt", None),
        ("--tokenizer byte", None),
        ("--num_proc 2", 4096),
        ("--text_files a.txt --tokenizer_vocab_size 4096", 4096),
    ):
        recipe = load_recipe_file("quickstart")
        recipe.update(parse_flags(flags.split()))
        assert recipe.data_arguments().tokenizer_vocab_size == expected


# of finetuning


@pytest.mark.parametrize("name", sorted(path.stem for path in FinetuneRecipe.directory.glob("*.yaml")))
def test_finetuning_recipes_are_whole(name: str) -> None:
    recipe = load_recipe_file(name, FinetuneRecipe)
    base = "runs/chat-base" if name == "first-chat" else "gpt2"
    adapters = {"full": "full", "lora": "lora", "xl": "qlora", "chat": "full"}
    assert recipe.model_arguments().model_name_or_path.startswith(base)
    assert recipe.adapter_arguments().adapter == adapters[name.split("-")[1]]
    assert recipe.data_arguments().block_size
    assert recipe.sample_arguments().max_new_tokens > 0
    if "activation" not in str(recipe.training) and "bf16" not in recipe.training:
        assert recipe.training_arguments().max_steps or recipe.training_arguments().num_train_epochs


def test_the_recipe_of_full_finetuning_is_nanogpts() -> None:
    """config/finetune_shakespeare.py and the defaults of train.py that it leaves."""
    recipe = load_recipe_file("gpt2-full-text", FinetuneRecipe)
    args = recipe.training_arguments()
    assert (args.learning_rate, args.max_steps, args.eval_steps) == (3e-5, 20, 5)
    assert (args.tokens_per_step, args.per_device_train_batch_size) == (32 * 1024, 1)
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.1, 0.9, 0.95, 1.0)
    assert (args.lr_scheduler_type, args.warmup_steps, args.save_strategy) == ("constant", 0, "best")


def test_the_five_finetuning_recipes() -> None:
    names = ["first-chat", "gpt2-full-text", "gpt2-lora-chat", "gpt2-lora-text", "gpt2-xl-qlora"]
    assert shipped_recipes(FinetuneRecipe) == names
