"""`acorn finetune` on tiny models: every adapter and kind of data ends in a run that loads, and resumes exactly."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

import acorn
from finetune import finetune
from finetune.adapters import ADAPTERS
from finetune.arguments import FinetuneRecipe
from training import pretrain, resume
from training.config.recipe import load_recipe_file
from training.data.tokenizers import build_tokenizer
from training.model.loading import load_model_and_tokenizer
from training.share.metrics_file import read_metrics
from training.system.errors import UserError

from .tiny_bases import TINY, save, stock_model
from .tiny_finetunes import CHAT, PAIRS, TEXT, facts, go_on, make_place, tune
from .tiny_runs import checkpoints, contents, latest, refused
from .two_processes import as_launched

RUN_FILES = {"README.md", "finetune.json", "loss.png", "metrics.jsonl", "recipe.yaml", "sample.txt", "tokenizer.json"}
TRAINED = [name for name in ADAPTERS if name != "qlora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs lie, side by side."""
    return make_place(tmp_path_factory.mktemp("finetune"))


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in read_metrics(run)}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (directory / "adapter_model.safetensors").exists() else "model.safetensors"
    return load_file(directory / name)


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def tuned(folder):
    """A finished LoRA run on a chat; tests copy it."""
    return tune(folder, "gpt2", *CHAT, name="tuned")


# every adapter, every kind of data, every base


@pytest.mark.parametrize(
    ("adapter", "base", "data"),
    [
        ("full", "gpt2", TEXT),
        ("lora", "gpt", TEXT),
        ("rslora", "gpt-rope-gqa", CHAT),
        ("dora", "gpt2", CHAT),
        ("pissa", "gpt", PAIRS),
        ("loraplus", "gpt2", PAIRS),
        ("ia3", "gpt-rope-gqa", TEXT),
        ("prompt", "gpt2", TEXT),
        ("prefix", "gpt", [*CHAT, "--learning_rate", "0.3"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_it_learns_and_is_reported(folder, adapter: str, base: str, data: list[str], capsys) -> None:
    run = tune(folder, base, *data, "--adapter", adapter, name=f"run-{adapter}")
    found = facts(run)
    assert found["perplexity_after"] < found["perplexity_before"]
    assert found["adapter"] == adapter
    assert (found["trained_parameters"] == found["parameters"]) == (adapter == "full")
    assert found["peak_memory_bytes"] > 0
    assert {path.name for path in run.iterdir()} >= RUN_FILES
    printed = capsys.readouterr().out
    use = "chat" if data[1] == "chat.txt" else "generate"
    for words in ("before, ", " after", "parameters trained", f"acorn {use} {run.name}"):
        assert words in printed
    assert "│" in printed, "the samples stand side by side"
    model, tokenizer = load_model_and_tokenizer(str(run))
    assert torch.isfinite(model(input_ids=torch.tensor([tokenizer("the quick")["input_ids"]])).logits).all()
    assert (tokenizer.chat_template is not None) == (data[1] == "chat.txt"), (
        "a chat's template is saved with the tokenizer"
    )


def test_every_adapter_is_tried() -> None:
    (crossed,) = test_it_learns_and_is_reported.pytestmark
    assert {adapter for adapter, _, _ in crossed.args[1]} == set(TRAINED)


def test_before_is_the_base_itself(folder) -> None:
    """Prompt tuning starts from other predictions than the base's; the figure before is the base's all the same."""
    flags = [*PAIRS, "--packing", "false", "--max_steps", "1"]
    runs = [tune(folder, "gpt2", *flags, "--adapter", name, name=f"before-{name}") for name in ("lora", "prompt")]
    first, second = (facts(run)["perplexity_before"] for run in runs)
    assert first == pytest.approx(second, rel=1e-5)


def test_the_card_says_both(tuned) -> None:
    text = (tuned / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in text
    assert "| before |" in text and "| after |" in text
    assert "The same prompt before and after" in text
    assert "answers alone" in text


def test_stopped_between_before_and_first_checkpoint_it_begins_again(folder, tuned) -> None:
    run = folder / "begun"
    run.mkdir()
    for name in ("recipe.yaml", "finetune.json"):
        shutil.copy(tuned / name, run)
    (run / ".finetune.json.123.tmp").write_text("half", encoding="utf-8")
    go_on(run)
    assert losses(run) == losses(tuned)
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("adapter", ["lora", "full", pytest.param("pissa", marks=pytest.mark.slow)])
def test_it_goes_on_bit_for_bit(folder, adapter: str) -> None:
    flags = [*CHAT, "--adapter", adapter, "--save_total_limit", "5"]
    flags += ["--lora_dropout", "0.1"] if adapter != "full" else []
    run = tune(folder, "gpt2-dropout", *flags, name=f"unbroken-{adapter}")
    broken = folder / f"broken-{adapter}"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoint-6")
    go_on(broken, "--checkpoint", "checkpoint-3")
    assert losses(broken) == losses(run)
    assert same(broken / "checkpoint-6", run / "checkpoint-6")
    assert same(broken, run)
    assert facts(broken)["perplexity_before"] == facts(run)["perplexity_before"]


def test_more_steps(folder, tuned) -> None:
    run = folder / "more"
    shutil.copytree(tuned, run)
    go_on(run, "--max_steps", "9")
    assert checkpoints(run)[-1] == 9
    assert list(losses(run)) == [0, 3, 6, 9]


def test_an_adapter_remembers_its_base_from_anywhere(folder, tuned, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = load_model_and_tokenizer(str(tuned / "checkpoint-6"))
    assert model.peft_config["default"].base_model_name_or_path == str(folder / "gpt2")


# labels that count: micro-batches and processes


def test_micro_batches_make_no_difference(folder) -> None:
    """The answers in a micro-batch are many or few; the loss of a step is that of its answers all the same."""
    flags = [*CHAT, "--max_steps", "3", "--eval_steps", "1", "--adapter", "full", "--logging_steps", "1"]
    whole = tune(folder, "gpt2", *flags, name="whole")
    quarters = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    shared = tune(folder, "gpt2", *flags, *quarters, name="quarters")
    for key in ("train_loss", "eval_loss"):
        first, second = ([row[key] for row in read_metrics(run) if row[key]] for run in (whole, shared))
        assert first == pytest.approx(second, abs=1e-6)


def test_two_processes_have_the_losses_of_one(folder) -> None:
    flags = [*CHAT, "--max_steps", "4", "--eval_steps", "1"]
    one = tune(folder, "gpt2", *flags, name="one")
    halves = ["--per_device_train_batch_size", "2", "--use_cpu", "true", "--output_dir", "two"]
    as_launched(2, None, folder, finetune.main, latest("gpt2", *TINY, *flags, *halves))
    assert len(list((folder / "two").glob("checkpoint-4/rng_state_*.pth"))) == 2, "one for each process"
    for key in ("train_loss", "eval_loss"):
        first, second = ([row[key] for row in read_metrics(run) if row[key]] for run in (one, folder / "two"))
        assert len(first) >= 4
        assert first == pytest.approx(second, abs=1e-6)


# looking first


def test_preview_shows_one_example_and_writes_nothing(folder, capsys) -> None:
    before = contents(folder)
    tune(folder, "gpt2", *CHAT, "--preview", name="never")
    printed = capsys.readouterr().out
    assert "chat.txt, line 1" in printed
    assert sum("●" in line for line in printed.splitlines()) > 5
    assert contents(folder) == before


def test_help_names_every_adapter_and_flag(capsys) -> None:
    with pytest.raises(SystemExit):
        finetune.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ADAPTERS)
    assert all(f"--{flag} " in printed for flag in ("r", "lora_alpha", "target_modules", "text_files", "packing"))


# what is refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "needs a RECIPE (first-chat, gpt2-full-text"),
        (["--adapter", "lora"], "needs a RECIPE"),
        (["nowhere/at/all", *TEXT], "there is no such directory"),
        (["gpt2", "--adaptor", "lora"], "did you mean '--adapter'"),
        (["gpt2", "--adapter", "lorra", *TEXT], "did you mean 'lora'"),
        (["gpt2", "--adapter", "full", "--r", "4", *TEXT], "--r: adapter=full does not read it"),
        (["gpt2", "--adapter", "lora", "--num_virtual_tokens", "4", *TEXT], "it takes r, lora_alpha"),
        (["gpt2", "--text_files", "nowhere.txt"], "nowhere.txt"),
        (["gpt2", *TEXT, "--target_modules", "c_atn"], "there are c_attn, c_fc, c_proj"),
        (["gpt2", *TEXT, "--block_size", "65"], "the model's context, 64"),
        (["gpt2", *TEXT, "--adapter", "prompt", "--block_size", "64"], "the model's context, 44"),
        (["gpt2", *TEXT, "--data_format", "chats"], "unknown data_format 'chats'"),
        (["gpt2", *TEXT, "--data_format", "pairs"], "pairs come from --data_files"),
        (["gpt2", *TEXT, "--data_format", "chat"], "begins with User:"),
        (["gpt2", *TEXT, "--per_device_train_batch_size", "100000000"], "per_device_train_batch_size=100000000"),
        (["gpt2", *TEXT, "--attn_implementation", "nonsense"], "unknown attn_implementation 'nonsense'"),
        (["gpt2", *TEXT, "--dtype", "float8"], "unknown dtype 'float8'"),
        (["gpt2", *TEXT, "--optim", "sgd"], "optim='sgd' has no effect here; use optimizer"),
        (["gpt2", *TEXT, "--max_steps", "0"], "max_steps=0"),
        (["gpt2", *TEXT, "--lora_alpha", "nan"], "lora_alpha=nan"),
        (["gpt2", *TEXT, "--optimizer", "muon"], "only for adapter=full on an Acorn model"),
        (["gpt2", *TEXT, "--adapter", "prefix", "--gradient_checkpointing", "true"], "activation_checkpointing=True:"),
        (["gpt2", *TEXT, "--tokenizer_vocab_size", "300"], "keeps the model's tokenizer"),
        (["gpt2", *TEXT, "--tokenizer", "char"], "keeps the model's tokenizer"),
        (["gpt2", *TEXT, "--max_new_tokens", "-1"], "max_new_tokens"),
        (["gpt2", *CHAT, "--output_dir", "tuned"], "acorn resume tuned"),
        (["gpt2", *TEXT, "--prompt", "x" * 70], "do not fit the model's context"),
        (["bert", *TEXT], "not a causal language model"),
        (["masked", *TEXT], "not a causal language model"),
        (["torn", *TEXT], "lacks transformer.h.0"),
        (["--resume", "tuned"], "`acorn resume RUN_DIR`"),
    ],
)
def test_mistakes_are_one_line(folder, tuned, monkeypatch, argv: list[str], words: str) -> None:
    monkeypatch.chdir(folder)
    others(folder)
    before = contents(tuned)
    flags = [] if not argv or argv[0].startswith("--") else TINY
    name = ["--output_dir", "refused"] if flags and "--output_dir" not in argv else []
    assert words in refused(finetune.main, *latest(*argv[:1], *flags, *name, *argv[1:]))
    assert contents(tuned) == before
    assert not list(folder.glob("refused/checkpoint-*"))
    shutil.rmtree(folder / "refused", ignore_errors=True)


def others(folder: Path) -> None:
    """Directories that hold no causal LM, or not all of one."""
    if (folder / "bert").exists():
        return
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "initializer_range": 0.3}
    config = BertConfig(vocab_size=257, hidden_size=16, **layers)
    save(BertLMHeadModel(config), folder / "bert")
    save(BertForMaskedLM(config), folder / "masked")
    config = json.loads((folder / "masked" / "config.json").read_text())
    (folder / "masked" / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    torn = stock_model()
    lost = "transformer.h.0.attn.c_attn"
    state = {key: value for key, value in torn.state_dict().items() if not key.startswith(lost)}
    torn.save_pretrained(folder / "torn", state_dict=state)
    build_tokenizer("byte").save_pretrained(folder / "torn")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "needs a RUN_DIR"),
        (["nowhere"], "does not exist"),
        (["tuned", "--r", "4"], "--r cannot change"),
        (["tuned", "--seed", "4"], "--seed cannot change"),
        (["tuned", "--text_files", "x"], "--text_files cannot change"),
        (["tuned", "--checkpoint"], "--checkpoint: expected one argument"),
        (["tuned", "--checkpoint", "checkpoint-4"], "unknown checkpoint"),
        (["tuned"], "larger --max_steps"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_line(folder, tuned, monkeypatch, argv: list[str], words: str) -> None:
    monkeypatch.chdir(folder)
    before = contents(tuned)
    assert words in refused(resume.main, *argv)
    assert contents(tuned) == before


def test_one_verb_goes_on_with_every_kind_of_run(folder, tuned, monkeypatch, capsys) -> None:
    shutil.copytree(tuned, folder / "by-the-door")
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        acorn.main(["resume", "by-the-door", "--help"])
    assert "--lora_alpha " in capsys.readouterr().out, "the flags of this kind of run"
    acorn.main(["resume", "by-the-door", "--max_steps", "9"])
    assert "acorn resume by-the-door --max_steps 18" in capsys.readouterr().out
    recipe = load_recipe_file(str(folder / "by-the-door" / "recipe.yaml"), FinetuneRecipe)
    assert recipe.command.endswith(" && acorn resume by-the-door --max_steps 9")


def test_pretraining_says_what_to_use_instead(tuned) -> None:
    assert "acorn resume RUN_DIR" in refused(pretrain.main, str(tuned / "recipe.yaml"))


def test_other_data_is_refused(folder, tuned) -> None:
    run = folder / "other-data"
    shutil.copytree(tuned, run)
    kept = (folder / "chat.txt").read_text(encoding="utf-8")
    try:
        (folder / "chat.txt").write_text(kept.replace("oak", "elm"), encoding="utf-8")
        with contextlib.chdir(folder), pytest.raises(UserError, match="the data changed since the run began"):
            resume.main([run.name, "--max_steps", "9"])
    finally:
        (folder / "chat.txt").write_text(kept, encoding="utf-8")
