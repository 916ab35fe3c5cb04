"""A run from a text file to a run directory that is a Hub model."""

import json
import math
from shlex import split as words

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from training import pretrain
from training.data.corpus import load_corpus

from .tiny_runs import (
    BATCH,
    CONTEXT,
    TEXT,
    checkpoints,
    grow,
    metrics,
    refused,
    same_weights,
    tiny_argv,
    weights,
    write_text,
)

METRICS_KEYS = words(
    "step tokens train_loss eval_loss bits_per_byte token_accuracy learning_rate grad_norm tokens_per_second "
    "mfu seconds"
)
MODEL_FILES = words("model.safetensors config.json generation_config.json configuration_gpt.py modeling_gpt.py")
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json"]
REPORT_FILES = words("README.md metrics.jsonl loss.png recipe.yaml sample.txt")
STATE_FILES = words("optimizer.pt scheduler.pt rng_state.pth trainer_state.json training_args.bin")
# The learning rate climbs until it destroys the model: the best evaluation is an early one.
WORSENING = words(
    "--max_steps 20 --eval_steps 2 --lr_scheduler_type constant_with_warmup --warmup_steps 20 --learning_rate 3 "
    "--max_grad_norm 0"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs lie, side by side."""
    return tmp_path_factory.mktemp("pretrain")


@pytest.fixture(scope="module")
def grown(folder):
    """The plain run: 8 steps, evaluated and saved at 4 and 8."""
    return grow(folder, name="grown")


@pytest.fixture(scope="module")
def worsened(folder):
    """A run whose best checkpoint is not its last, of which two are kept."""
    return grow(folder, *WORSENING, name="worsened")


def best_step(run_dir) -> int:
    return min(metrics(run_dir), key=lambda row: row["eval_loss"])["step"]


# the run directory


def test_run_directory_is_whole(grown) -> None:
    present = {path.name for path in grown.iterdir()}
    assert {*MODEL_FILES, *TOKENIZER_FILES, *REPORT_FILES, "checkpoint-4", "checkpoint-8"} <= present
    assert not [name for name in present if name.startswith(".")]
    for checkpoint in grown.glob("checkpoint-*"):
        assert {*MODEL_FILES, *TOKENIZER_FILES, *STATE_FILES} <= {path.name for path in checkpoint.iterdir()}


def test_metrics_have_a_line_an_evaluation(grown) -> None:
    rows = metrics(grown)
    assert [list(row) for row in rows] == [METRICS_KEYS] * 2
    assert [(row["step"], row["tokens"]) for row in rows] == [(4, 4 * BATCH * CONTEXT), (8, 8 * BATCH * CONTEXT)]
    for row in rows:
        assert all(math.isfinite(value) and value > 0 for value in row.values())  # a CPU's peak is measured


def test_mfu_from_a_given_peak(folder) -> None:
    run = grow(folder, "--peak_flops", "1e12", "--max_steps", "4", name="peak")
    assert 0 < metrics(run)[0]["mfu"] < 1


def test_the_loss_curve_is_a_picture(grown) -> None:
    height, width, _ = matplotlib.image.imread(grown / "loss.png", format="png").shape
    assert min(height, width) > 100


def test_the_model_card_says_what_was_grown(grown) -> None:
    text = (grown / "README.md").read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    assert yaml.safe_load(metadata)["library_name"] == "transformers"
    assert f"{best_eval_loss(grown):,.4f}" in body
    assert "acorn pretrain shakespeare-char-cpu --text_files text.txt" in body
    assert "text.txt" in body.split("## Data")[1]


def best_eval_loss(run_dir) -> float:
    return min(row["eval_loss"] for row in metrics(run_dir))


def test_the_sample_continues_the_prompt(grown, folder) -> None:
    assert (grown / "sample.txt").read_text(encoding="utf-8").startswith("\n")
    run = grow(folder, "--prompt", "the fox", "--temperature", "0", "--max_steps", "4", name="prompted")
    sample = (run / "sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("the fox") and len(sample) > len("the fox")


def test_no_sample_when_none_is_wanted(folder) -> None:
    run = grow(folder, "--max_new_tokens", "0", "--max_steps", "4", name="silent")
    assert (run / "sample.txt").read_text(encoding="utf-8") == ""


@pytest.mark.parametrize("where", [".", "checkpoint-4", "checkpoint-8"])
def test_each_directory_is_a_hub_model(grown, where: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(grown / where, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    assert model.config.use_cache is True
    assert GenerationConfig.from_pretrained(grown / where).use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(grown / where)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == CONTEXT
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])  # by version
    assert {value.dtype for value in weights(grown / where).values()} == {torch.float32}


def test_the_root_is_the_best_checkpoint(grown, worsened) -> None:
    assert best_step(grown) == 8
    assert same_weights(grown, grown / "checkpoint-8")
    assert best_step(worsened) < 20
    assert same_weights(worsened, worsened / f"checkpoint-{best_step(worsened)}")
    assert not same_weights(worsened, worsened / "checkpoint-20")


def test_best_and_last_checkpoint_are_kept(worsened) -> None:
    assert checkpoints(worsened) == [best_step(worsened), 20]


def test_the_last_step_is_evaluated_and_saved(folder) -> None:
    run = grow(folder, "--max_steps", "7", name="odd")
    assert [row["step"] for row in metrics(run)] == [4, 7]
    assert checkpoints(run) == [4, 7]
    assert same_weights(run, run / f"checkpoint-{best_step(run)}")


def test_the_recipe_is_kept_with_its_flags(grown) -> None:
    recipe = yaml.safe_load((grown / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["training"]["max_steps"] == 8
    assert recipe["model"]["hidden_size"] == 32
    assert recipe["data"]["text_files"] == ["text.txt"]
    assert load_corpus(recipe["data"]["data_dir"]).manifest["format"] == "acorn-corpus"


def test_one_seed_one_model(grown, folder) -> None:
    assert same_weights(grown, grow(folder, name="again"))
    assert not same_weights(grown, grow(folder, "--seed", "7", name="other"))


# what is measured


def test_evaluation_covers_the_whole_split(grown, folder) -> None:
    corpus = load_corpus(next((folder / "corpora").iterdir()))
    tokens = corpus.tokens("validation")
    ids = torch.from_numpy(tokens.sequence(0, len(tokens)))
    model = AutoModelForCausalLM.from_pretrained(grown / "checkpoint-8", trust_remote_code=True)
    nats = 0.0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = ids[start : start + CONTEXT + 1]
        logits = model(window[None, :-1]).logits[0].double()
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    row = metrics(grown)[-1]
    text = (folder / "text.txt").read_text(encoding="utf-8")
    validation_bytes = len(text) - int(len(text) * 0.9)  # the text is ASCII
    assert row["eval_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / validation_bytes, rel=1e-6)


def test_training_lowers_the_loss(folder) -> None:
    run = grow(folder, "--max_steps", "80", "--eval_steps", "40", name="longer")
    first, last = metrics(run)
    assert last["train_loss"] < first["train_loss"]
    assert last["eval_loss"] < first["eval_loss"] < 0.9 * math.log(30)


def test_accumulated_micro_batches_are_one_batch(grown, folder) -> None:
    halves = words("--per_device_train_batch_size 2 --gradient_accumulation_steps 2")
    run = grow(folder, *halves, name="halves")
    for whole, split in zip(metrics(grown), metrics(run), strict=True):
        assert whole["tokens"] == split["tokens"]
        for key in ("train_loss", "eval_loss", "grad_norm"):
            assert split[key] == pytest.approx(whole[key], rel=1e-5), key


def test_gradient_checkpointing_changes_nothing(grown, folder) -> None:
    run = grow(folder, "--gradient_checkpointing", "true", name="checkpointed")
    for plain, checkpointed in zip(metrics(grown), metrics(run), strict=True):
        assert checkpointed["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["use_cache"] is True
    assert json.loads((run / "checkpoint-4" / "config.json").read_text(encoding="utf-8"))["use_cache"] is True


def test_label_smoothing_is_for_training_only(folder) -> None:
    still = ["--learning_rate", "0", "--max_steps", "4", "--lr_scheduler_type", "constant_with_warmup"]
    plain = metrics(grow(folder, *still, name="sharp"))[0]
    smooth = metrics(grow(folder, *still, "--label_smoothing_factor", "0.3", name="smooth"))[0]
    assert smooth["eval_loss"] == plain["eval_loss"]
    assert smooth["train_loss"] != pytest.approx(plain["train_loss"], rel=1e-6)


# choices


def cosine(step: int) -> float:
    share = 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
    return step / 2 if step < 2 else 0.1 + 0.9 * share


def stable_decay(step: int) -> float:
    return step / 2 if step < 2 else 1.0 if step < 4 else 1 - (step - 4) / 4


def constant(step: int) -> float:
    return min(1.0, step / 2)


SCHEDULES = {
    "cosine_with_min_lr": (cosine, "{min_lr_rate: 0.1}"),
    "warmup_stable_decay": (stable_decay, "{num_decay_steps: 4, decay_type: linear, min_lr_ratio: 0.0}"),
    "constant_with_warmup": (constant, None),
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_under_both_optimizers(folder, schedule: str, optimizer: str) -> None:
    shape, keywords = SCHEDULES[schedule]
    flags = ["--lr_scheduler_type", schedule, "--optimizer", optimizer, "--eval_steps", "1"]
    flags += ["--lr_scheduler_kwargs", keywords] if keywords else []
    run = grow(folder, *flags, name=f"{schedule}-{optimizer}")
    peak = {"adamw": 1e-2, "muon": 0.02}[optimizer]  # of the first group: under muon, that of the hidden matrices
    assert [row["learning_rate"] for row in metrics(run)] == pytest.approx([peak * shape(step) for step in range(8)])
    assert metrics(run)[-1]["eval_loss"] < metrics(run)[0]["eval_loss"]


def test_muon_in_bf16_saves_float32(folder) -> None:
    schedule = ["--lr_scheduler_kwargs", "{num_decay_steps: 4, min_lr_ratio: 0.0}"]
    run = grow(folder, "--bf16", "true", "--force_precision", "true", *schedule, name="bf16", recipe="quickstart")
    assert metrics(run)[-1]["eval_loss"] < math.log(257)
    assert {value.dtype for value in weights(run).values()} == {torch.float32}


def test_early_stopping_stops(folder, worsened) -> None:
    run = grow(folder, *WORSENING, "--early_stopping_patience", "2", name="patient")
    best = best_step(worsened)
    assert [row["step"] for row in metrics(run)] == list(range(2, best + 5, 2))
    assert same_weights(run, worsened)


def test_epochs_become_steps(folder) -> None:
    run = grow(folder, "--max_steps", "-1", "--num_train_epochs", "0.5", "--eval_steps", "1000", name="epochs")
    tokens = load_corpus(next((folder / "corpora").iterdir())).manifest["splits"]["train"]["tokens"]
    steps = math.ceil(0.5 * tokens / (BATCH * CONTEXT))
    assert [row["step"] for row in metrics(run)] == [steps]
    assert checkpoints(run) == [steps]


def test_tensorboard_gets_events(folder) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = grow(folder, "--report_to", "tensorboard", name="board")
    files = list(run.rglob("events.out.tfevents*"))
    assert files, "the events belong to the run directory"
    events = EventAccumulator(str(files[0].parent)).Reload()
    assert [event.step for event in events.Scalars("eval/loss")] == [4, 8]


def test_samples_during_training(folder, grown, capsys) -> None:
    flags = ["--sample_during_training", "true", "--prompt", "the quick", "--temperature", "0"]
    run = grow(folder, *flags, name="sampled")
    assert capsys.readouterr().out.count("the quick") >= 3  # at steps 4 and 8, and at the end
    # drawing must not touch the random state of the training
    assert [row["eval_loss"] for row in metrics(run)] == [row["eval_loss"] for row in metrics(grown)]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_torch_compile(grown, folder, scope: str) -> None:
    run = grow(folder, "--torch_compile", "true", "--compile_scope", scope, name=f"compiled-{scope}")
    for plain, compiled in zip(metrics(grown), metrics(run), strict=True):
        assert compiled["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-4)
    assert weights(run).keys() == weights(grown).keys()


# a mistake about the sample costs no run


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (TEXT, ["--prompt", "ünknown"]),
        (TEXT, ["--prompt", "longer than the context"]),
        (TEXT.replace("\n", " "), []),  # the recipe's own prompt is a line break, which this tokenizer does not know
    ],
    ids=["unknown-character", "too-long", "unknown-default"],
)
def test_a_prompt_that_can_not_be_read_is_seen_before_training(tmp_path, monkeypatch, text: str, flags: list) -> None:
    write_text(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    assert "prompt" in refused(pretrain.main, *tiny_argv(*flags))
    assert not (tmp_path / "run").exists()


def test_validation_tokens_are_not_trained_on(folder, grown) -> None:
    corpus = load_corpus(next((folder / "corpora").iterdir()))
    train, validation = corpus.tokens("train"), corpus.tokens("validation")
    text = (folder / "text.txt").read_text(encoding="utf-8")
    ids = np.concatenate([train.sequence(0, len(train)), validation.sequence(0, len(validation) - 1)])
    assert corpus.tokenizer.decode(ids) == text
