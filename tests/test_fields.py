"""Every training argument takes effect, is refused with the place to use instead, or is transformers' business.

A field that is newer than the lists is treated as transformers' business, and noticed here.
"""

import json
from dataclasses import MISSING, fields

import pytest
import torch
from transformers import TrainingArguments

from finetune.arguments import FinetuneRecipe, FinetuneTrainingArguments
from training import pretrain
from training.config.arguments import GPTTrainingArguments
from training.config.checks import CHOICES, NEEDS, REFUSED, RISING
from training.config.command_line import load_recipe
from training.config.recipe import Recipe, load_run_recipe, read_section
from training.loop.evaluation import language_metrics
from training.model.optimizers import build_optimizer
from training.system.errors import UserError
from training.system.flags import RANGES

from .tiny_runs import checkpoints, grow, metrics, parse_flags, refused, same_weights, tiny_argv, write_text

KINDS = (GPTTrainingArguments, FinetuneTrainingArguments)
# What Acorn reads, or hands to a part of Trainer that its loop keeps.
TAKES_EFFECT = frozenset(
    """
    optimizer muon_learning_rate muon_momentum muon_momentum_warmup_steps muon_beta2
    average_decay average_start early_stopping_patience compile_scope peak_flops tokens_per_step
    output_dir max_steps num_train_epochs per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay adam_beta1
    adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor seed data_seed full_determinism
    precision force_precision bf16 fp16 tf32 use_cpu auto_find_batch_size
    average_tokens_across_devices activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    eval_strategy eval_steps eval_delay eval_on_start save_strategy save_steps save_total_limit save_only_model
    logging_strategy logging_steps logging_first_step metric_for_best_model greater_is_better disable_tqdm log_level
    log_level_replica report_to dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context ddp_timeout
    train_memory_length memory_reset_probability kv_quantization_start
    push_to_hub hub_model_id hub_strategy hub_private_repo hub_revision hub_always_push
    """.split()
)

# What Trainer and Accelerate do by themselves, as transformers documents it.
TRANSFORMERS = frozenset(
    """
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph debug deepspeed fsdp
    fsdp_config liger_kernel_config log_on_each_node project run_name save_on_each_node torch_empty_cache_steps
    trackio_bucket_id trackio_space_id trackio_static_space_id use_liger_kernel
    """.split()
)

LISTS = (TAKES_EFFECT, REFUSED.keys(), TRANSFORMERS)
OTHER = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 1.0}
# What a number is refused for elsewhere, or what is no number although it says so.
UNRANGED = {"local_rank", "eval_accumulation_steps", "neftune_noise_alpha"}


def other_value(field):
    """A value that is not the default of a field."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return OTHER[type(default)](default) if type(default) in OTHER else ["x"] if isinstance(default, list) else "x"


def arguments(**values) -> GPTTrainingArguments:
    return GPTTrainingArguments(**{"output_dir": "unused", "use_cpu": True, "max_steps": 8} | values)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_in_one_list(kind: type) -> None:
    names = {field.name for field in fields(kind) if field.init}
    assert {name: sum(name in part for part in LISTS) for name in names} == dict.fromkeys(names, 1)


def test_no_list_names_what_is_gone() -> None:
    names = {field.name for field in fields(GPTTrainingArguments)}
    known_everywhere = {name for part in LISTS for name in part} - {"trackio_bucket_id", "trackio_static_space_id"}
    assert known_everywhere <= names


def test_every_number_has_a_range() -> None:
    hints = {field.name: str(field.type) for kind in KINDS for field in fields(kind)}
    numbers = {name for name, hint in hints.items() if "int" in hint.split("Literal")[0] or "float" in hint}
    assert numbers - set(RANGES) - {name for name in hints if "print" in hints[name]} <= UNRANGED


@pytest.mark.parametrize("kind", [Recipe, FinetuneRecipe])
@pytest.mark.parametrize("name", REFUSED)
def test_another_value_is_refused_with_the_place(kind: type[Recipe], name: str) -> None:
    field = next(field for field in fields(kind.sections["training"]) if field.name == name)
    with pytest.raises(UserError, match=name) as caught:
        read_section("training", {name: other_value(field)}, kind)
    assert "\n" not in str(caught.value)
    assert REFUSED[name] in str(caught.value) or "expected" in str(caught.value)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    assert read_section("training", {name: default}, kind).keys() == {name}


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("optim: sgd", "optim='sgd' has no effect here; use optimizer"),
        ("ignore_data_skip: false", "ignore_data_skip=False"),
        ("bf16_full_eval: true", "bf16_full_eval=True"),
        ("dataloader_drop_last: false", "dataloader_drop_last=False"),
        ("do_train: no", "do_train=False"),
        ("use_cpu: false", "use_cpu=False"),
    ],
)
def test_refused_from_a_recipe_before_anything_is_written(line: str, named: str, tmp_path, monkeypatch) -> None:
    if torch.accelerator.is_available() and line.startswith("use_cpu"):
        pytest.skip("there is an accelerator")
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"training: {{{line}}}\n", encoding="utf-8")
    assert named in refused(pretrain.main, *tiny_argv(recipe="mine.yaml"))
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "mine.yaml"}


# names


@pytest.mark.parametrize("name", sorted(CHOICES.keys()))
def test_an_unknown_choice_is_refused(name: str) -> None:
    kind = FinetuneRecipe if name in ("data_format", "dtype") else Recipe
    with pytest.raises(UserError, match=f"unknown {name} 'foo'"):
        parse_flags([f"--{name}", "foo"], kind)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"report_to": ["comet_ml"]}, "report_to='comet_ml': comet_ml is not installed"),
        ({"report_to": ["none", "tensorboard"]}, "report_to 'none'"),
        ({"deepspeed": "nofile.json"}, "deepspeed"),
        ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"reentrant": True}}, "'use_reentrant'"),
        ({"greater_is_better": True}, "greater_is_better=True: of loss less is better"),
        ({"metric_for_best_model": "token_accuracy", "greater_is_better": False}, "of token_accuracy more is better"),
    ],
)
def test_what_is_not_there_or_contradicts_itself(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        arguments(**values)


@pytest.mark.parametrize("given", ["none", ["none"], None])
def test_no_tracker_by_any_name(given) -> None:
    assert arguments(report_to=given).report_to == []


def test_the_direction_follows_the_metric() -> None:
    assert RISING.keys() == language_metrics([1.0], [1.0], [1.0], 1).keys()
    for metric, is_rising in RISING.items():
        for name in (metric, f"eval_{metric}"):
            assert arguments(metric_for_best_model=name).greater_is_better is is_rising


@pytest.mark.parametrize("name", NEEDS)
def test_what_needs_another_argument(name: str) -> None:
    other = NEEDS[name].argument
    values = {"compile_scope": "model", "dataloader_multiprocessing_context": "fork", "hub_strategy": "end"}
    given = {name: values.get(name, {"a": 1} if "config" in name else True if "persistent" in name else 0.5)}
    given = {name: {"use_reentrant": False} for name in given} if "checkpointing" in name else given
    given = {name: 2 for name in given} if "prefetch" in name or "patience" in name else given
    with pytest.raises(UserError, match=f"{name}=.* has no effect without {other}"):
        arguments(**given, **({"eval_strategy": "no"} if other == "eval_strategy" else {}))


# the schedule


@pytest.mark.parametrize(
    ("kind", "kwargs", "named"),
    [
        ("warmup_stable_decay", None, "missing a required argument: 'num_decay_steps'; lr_scheduler_kwargs takes"),
        ("warmup_stable_decay", {"min_lr_rate": 0.1}, "lr_scheduler_kwargs={'min_lr_rate': 0.1}"),
        ("polynomial", {"min_lr_rate": 0.1}, "unexpected keyword argument 'min_lr_rate'; .* takes lr_end, power"),
        ("cosine_with_min_lr", {"min_lr_rate": "x"}, "lr_scheduler_kwargs"),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1, "min_lr": 0.1}, "lr_scheduler_kwargs"),
        ("polynomial", {"power": "abc"}, "lr_scheduler_kwargs.power='abc': must be a number"),
        ("constant", {"x": 1}, "takes no settings"),
    ],
)
def test_a_schedule_that_can_not_be(kind: str, kwargs, named: str) -> None:
    with pytest.raises(UserError, match=named):
        arguments(lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs)


def test_a_momentum_that_would_fall_in_its_rise() -> None:
    with pytest.raises(UserError, match=r"muon_momentum_warmup_steps=4: .* rises from 0.85 to muon_momentum=0.5"):
        arguments(optimizer="muon", muon_momentum=0.5, muon_momentum_warmup_steps=4)


# what takes effect: the objects that are built differ


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("learning_rate", 0.5, lambda group: group["lr"]),
        ("weight_decay", 0.25, lambda group: group["weight_decay"]),
        ("adam_beta1", 0.5, lambda group: group["betas"][0]),
        ("adam_beta2", 0.5, lambda group: group["betas"][1]),
        ("adam_epsilon", 0.5, lambda group: group["eps"]),
    ],
)
def test_the_optimizer_reads(name: str, value: float, read, tiny_model) -> None:
    assert read(build_optimizer(tiny_model(), arguments(**{name: value})).param_groups[0]) == value


def test_activation_checkpointing_by_either_name() -> None:
    old = {field.name for field in fields(TrainingArguments)}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        args = arguments(**{name: True})
        assert args.gradient_checkpointing and args.activation_checkpointing
    assert "gradient_checkpointing" in old


def test_epochs_become_steps() -> None:
    args = arguments(eval_strategy="epoch", save_strategy="epoch", max_steps=-1, num_train_epochs=3.0)
    args.count_steps(10)
    assert (args.max_steps, args.eval_steps, args.save_steps) == (30, 10, 10)
    assert (args.eval_strategy, args.save_strategy) == ("steps", "steps")
    with pytest.raises(UserError, match="a stream has no end"):
        arguments(eval_strategy="epoch").count_steps(0)


def test_an_average_begins_within_the_run() -> None:
    args = arguments(average_decay=1.0, average_start=0.75)
    args.count_steps(10)
    assert args.average_start == 6
    with pytest.raises(UserError, match="average_start=8: the run ends with step 8"):
        arguments(average_decay=0.9, average_start=8).count_steps(10)


def test_the_order_has_a_seed_of_its_own() -> None:
    assert (arguments(seed=3).order_seed, arguments(seed=3, data_seed=5).order_seed) == (3, 5)


# whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's run lies, with its text and its tokens."""
    return tmp_path_factory.mktemp("fields")


@pytest.fixture(scope="module")
def by_accuracy(folder):
    """A run whose best is the one with the highest accuracy, evaluated where the loss and it do not agree."""
    flags = "--metric_for_best_model token_accuracy --eval_steps 1 --save_total_limit 9 --learning_rate 0.3"
    return grow(folder, *flags.split(), name="by-accuracy")


def test_the_best_of_a_rising_metric_is_the_highest(by_accuracy) -> None:
    rows = metrics(by_accuracy)
    last = by_accuracy / f"checkpoint-{checkpoints(by_accuracy)[-1]}"
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_metric"] == max(row["token_accuracy"] for row in rows)
    best = load_run_recipe(by_accuracy).best(rows)
    assert best["token_accuracy"] == state["best_metric"]
    assert same_weights(by_accuracy, by_accuracy / f"checkpoint-{best['step']}")


@pytest.mark.parametrize(
    "flags", ["--validation_fraction 0.5", "--validation_seed 5", "--shard_size 5", "--streaming true", "--num_proc 2"]
)
def test_prepared_tokens_have_decided(by_accuracy, folder, monkeypatch, flags: str) -> None:
    monkeypatch.chdir(folder)
    tokens = str(next(folder.glob("corpora/*")))
    argv = [word for word in tiny_argv(*flags.split(), name="refused") if word not in ("--text_files", "text.txt")]
    message = refused(pretrain.main, *argv, "--data_dir", tokens)
    assert f"{flags.split()[0][2:]}=" in message and "prepared" in message
    assert not (folder / "refused").exists()


def test_flags_of_another_choice_leave_the_recipes_settings_behind() -> None:
    recipe = load_recipe("pretrain", ["quickstart", "--lr_scheduler_type", "linear", "--optimizer", "adamw"])
    assert recipe.training.keys().isdisjoint({"lr_scheduler_kwargs", "muon_learning_rate"})
    assert recipe.training_arguments().lr_scheduler_type == "linear"
    recipe.update({"training": {"push_to_hub": True, "hub_model_id": "me/run"}})
    recipe.update({"training": {"push_to_hub": False}})
    assert "hub_model_id" not in recipe.training
    same = load_recipe("pretrain", ["quickstart", "--lr_scheduler_type", "warmup_stable_decay"])
    assert same.training["lr_scheduler_kwargs"]["num_decay_steps"] == 0.75
