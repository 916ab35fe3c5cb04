"""A mistake is one line that names the field, the value and the mend; nothing is written, and nothing is lost."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inference import evaluate, generate
from training import pretrain, resume
from training.share.metrics_file import read_metrics
from training.system.errors import run_main
from training.system.run_files import damage

from .tiny_runs import TEXT, checkpoints, contents, go_on, grow, refused, tiny_argv, weights, write_text

ACORN = str(Path(sys.executable).with_name("acorn"))
PRETRAIN = [sys.executable, "-m", "training.pretrain"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a text in it."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; tests copy it."""
    return grow(tmp_path_factory.mktemp("bad-input"))


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run and of its corpus, free to be damaged."""
    shutil.copytree(finished.parent, tmp_path, dirs_exist_ok=True)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace(str(finished.parent), str(tmp_path)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def refused_pretraining(*flags: str, recipe: str = "shakespeare-char-cpu") -> str:
    """The line with which pretraining is refused; no run directory may come of it."""
    message = refused(pretrain.main, *tiny_argv(*flags, recipe=recipe))
    assert not Path("run").exists()
    return message


# the door


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ([ACORN, "pretrain", "quikstart"], "did you mean 'quickstart'?"),
        ([ACORN, "generate", "runs/nowhere", "--prompt", "a"], "runs/nowhere"),
        # in this process: test_values_that_can_not_be
        pytest.param([*PRETRAIN, *tiny_argv("--n_embd", "33")], "hidden_size=33", marks=pytest.mark.slow),
    ],
    ids=["unknown-recipe", "no-model", "bad-architecture"],
)
def test_a_mistake_is_one_line_on_stderr(here, command: list[str], named: str) -> None:
    before = contents(here)
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("acorn: error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr
    assert contents(here) == before


# recipes and flags


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--learning_rte 1", "did you mean '--learning_rate'"),
        ("--n_embed 32", "did you mean '--n_embd'"),
        ("--max_steps many", "max_steps='many': expected int"),
        ("--bf16 perhaps", "bf16='perhaps': expected bool"),
        ("--n_embd 33", "hidden_size=33 is not divisible by num_attention_heads=2"),
        ("--n_head 4 --n_kv_head 3", "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ("--hidden_act gelo", "hidden_act='gelo'"),
        ("--position_encoding ropes", "position_encoding='ropes'"),
        ("--block_size 0", "max_position_embeddings=0"),
        ("--n_layer -1", "num_hidden_layers=-1"),
        ("--dropout 1.0", "dropout=1.0"),
        ("--preset gpt5", "unknown preset 'gpt5'"),
        ("--optimizer adamv", "optimizer 'adamv'"),
        ("--compile_scope all", "compile_scope 'all'"),
        ("--label_smoothing_factor 1", "label_smoothing_factor=1.0"),
        ("--sampling shufled", "sampling 'shufled'"),
        ("--validation_fraction 0", "validation_fraction=0.0"),
        ("--validation_fraction 1.5", "validation_fraction=1.5"),
        ("--validation_by place", "validation_by 'place'"),
        ("--tokenizer nowhere/tokenizer", "tokenizer='nowhere/tokenizer'"),
        ("--tokenizer_vocab_size 300", "tokenizer_vocab_size=300"),
        ("--prompt Ω", "'Ω' (U+03A9) at offset 0 of the prompt; give another --prompt"),
        ("--deepspeed {}", "the package deepspeed is not installed"),
        ("--lr_scheduler_type cosin", "lr_scheduler_type"),
        ("--report_to wandbb", "report_to"),
    ],
)
def test_values_that_can_not_be(here, flags: str, named: str) -> None:
    assert named in refused_pretraining(*shlex.split(flags))


@pytest.mark.parametrize(
    "flag",
    [
        "eval_steps",
        "save_steps",
        "logging_steps",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
    ],
)
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_must_be_positive(here, flag: str, value: str) -> None:
    epochs = ["--max_steps", "-1"] if flag == "num_train_epochs" else []
    assert f"{flag}={value}" in refused_pretraining(*epochs, f"--{flag}", value)


@pytest.mark.parametrize("flags", ["--temperature -1", "--top_k -1", "--top_p 1.5", "--max_new_tokens -1"])
def test_a_sample_that_can_not_be_drawn_is_seen_before_training(here, flags: str) -> None:
    assert flags.split()[0].removeprefix("--") in refused_pretraining(*flags.split())


# texts


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (None, "there is no such file"),
        (b"", "is empty"),
        (b"some\0text" * 50, "is binary (a NUL byte at offset 4)"),
        (b"caf\xe9 " * 50, "is not UTF-8 (byte 0xE9 at offset 3)"),
    ],
    ids=["missing", "empty", "binary", "latin-1"],
)
def test_a_file_that_is_no_text(here, raw: bytes | None, named: str) -> None:
    if raw is not None:
        (here / "bad.txt").write_bytes(raw)
    message = refused_pretraining("--text_files", "bad.txt")
    assert "text_files='bad.txt'" in message and named in message
    assert not Path("corpora").exists()


def test_a_text_shorter_than_a_window(here) -> None:
    write_text(here, "too short")
    message = refused_pretraining("--block_size", "64", "--prompt", "too")
    assert "context_length=64" in message and "--block_size" in message


@pytest.mark.parametrize("fraction", ["1e-17", "0.999999"])
def test_a_split_without_text(here, fraction: str) -> None:
    message = refused_pretraining("--validation_fraction", fraction)
    assert f"validation_fraction={float(fraction)}" in message
    assert list(Path("corpora").glob("*")) == []


# what is there already


def test_a_run_directory_is_not_overwritten(run) -> None:
    before = contents(run)
    message = refused(pretrain.main, *tiny_argv())
    assert "output_dir=run exists" in message and "acorn resume run" in message
    assert contents(run) == before


def test_an_output_directory_that_is_a_file(here) -> None:
    message = refused(pretrain.main, *tiny_argv("--output_dir", "text.txt"))
    assert "output_dir=text.txt" in message
    assert (here / "text.txt").read_text(encoding="utf-8") == TEXT


def test_what_is_no_run_is_not_resumed(run, tmp_path) -> None:
    before = contents(tmp_path)
    assert "name the run: run --checkpoint checkpoint-4" in refused(resume.main, "run/checkpoint-4", "--max_steps", "9")
    assert "no recipe.yaml" in refused(resume.main, "corpora", "--max_steps", "9")
    assert "does not exist" in refused(resume.main, "runs/nowhere")
    assert contents(tmp_path) == before


def test_truncated_shards_are_refused(run, tmp_path) -> None:
    shard = next(tmp_path.glob("corpora/*/validation-00000.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    for main, argv in ((resume.main, ["run", "--max_steps", "9"]), (evaluate.main, ["run"])):
        assert "validation-00000.bin: is " in refused(main, *argv)
    assert "validation-00000.bin: is " in refused(pretrain.main, *tiny_argv("--output_dir", "other"))
    assert not Path("other").exists()


def test_a_tokenizer_that_did_not_make_the_tokens(run, tmp_path) -> None:
    byte = grow(tmp_path, "--tokenizer", "byte", name="byte")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte / file, run / file)
    message = refused(generate.main, "run", "--prompt", "a")
    assert "the tokenizer has 257 entries" in message and "vocab_size is" in message
    tokenizer = next(tmp_path.glob("corpora/*/tokenizer"))
    shutil.rmtree(tokenizer)
    corpus_of_byte = [path for path in tmp_path.glob("corpora/*") if (path / "tokenizer").exists()]
    shutil.copytree(corpus_of_byte[0] / "tokenizer", tokenizer)
    assert "hash" in refused(resume.main, "run" if "char" in tokenizer.parent.name else "byte", "--max_steps", "9")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 200])
def test_damaged_model_files(run, file: str, keep: int) -> None:
    (run / file).write_bytes((run / file).read_bytes()[:keep])
    assert "run" in refused(generate.main, "run", "--prompt", "a")


def test_a_damaged_recipe(run) -> None:
    (run / "recipe.yaml").write_text("model: {n_layer: 2", encoding="utf-8")
    assert "recipe.yaml" in refused(resume.main, "run", "--max_steps", "9")


# inference


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["nowhere", "--prompt", "a"], "nowhere"),
        (["corpora", "--prompt", "a"], "config.json"),
        (["run", "--prompt", "the quick brown fox"], "prompt: 19 tokens do not fit the model's context of 16"),
        (["run", "--prompt", "jüst"], "'ü' (U+00FC) at offset 1 of the prompt"),
        (["run", "--prompt", "FILE:nowhere.txt"], "nowhere.txt"),
        (["run", "--promt", "a"], "--promt"),
        (["run", "--max_new_tokens", "many"], "many"),
    ],
)
def test_generate_refuses(run, argv: list[str], named: str) -> None:
    assert named in refused(generate.main, *argv)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["corpora"], "config.json"),
        (["run/checkpoint-99"], "there is no such directory"),
        (["run", "--text_files", "nowhere.txt"], "text_files='nowhere.txt'"),
        (["run", "--text_files", "other.txt"], "'Ω' (U+03A9) at offset 4"),
        (["run", "--per_device_eval_batch_size", "0"], "per_device_eval_batch_size=0"),
        (["run", "--text_file", "text.txt"], "did you mean '--text_files'"),
        (["run", "--dataset_config", "en"], "--dataset_config: has no effect without --text_files"),
        (["run", "--text_column", "body"], "--text_column: has no effect without --text_files"),
        (["run", "--text_files", "text.txt", "--on_bad_file", "ignore"], "choose from 'stop', 'skip'"),
    ],
)
def test_evaluate_refuses(run, tmp_path, argv: list[str], named: str) -> None:
    write_text(tmp_path, "the Ω", "other.txt")
    assert named in refused(evaluate.main, *argv)


# what goes wrong on the way


@pytest.fixture
def small_disk(finished, tmp_path):
    """A file system with room for a run and a half checkpoint less than the tiny run takes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    needed = sum(path.stat().st_size for path in finished.rglob("*") if path.is_file())
    size = ["-o", f"size={int(needed * 0.75)}"]
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", disk]).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)  # the shards of the corpus may still be mapped


def test_a_full_disk(small_disk, here, capsys) -> None:
    run = small_disk / "run"
    with pytest.raises(SystemExit) as left:
        run_main(pretrain.main, tiny_argv("--output_dir", str(run)))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert left.value.code == 1
    assert errors[-1].startswith("acorn: error: the disk is full")
    assert "Traceback" not in "".join(errors)
    assert f"step 8 is removed, and what was there before is whole: `acorn resume {run}`" in errors[-1]
    assert checkpoints(run) == [4]
    assert damage(run / "checkpoint-4") is None
    assert not list(run.glob(".saving*"))
    AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True)  # the root holds a whole model
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    os.chdir(here)
    resume.main([str(run)])
    assert (run / "README.md").is_file()
    assert [row["step"] for row in read_metrics(run)] == [4, 8]


def is_finite(directory: Path) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in weights(directory).values())


def no_number(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_no_number_stops_the_run(here, optimizer: str) -> None:
    flags = ["--optimizer", optimizer, "--max_steps", "20", "--eval_steps", "1", "--max_grad_norm", "0"]
    muon = ["--muon_learning_rate"] if optimizer == "muon" else []
    rates = ["--learning_rate", "1e30", *(word for name in muon for word in (name, "1e30"))]
    message = refused(pretrain.main, *tiny_argv(*flags, *rates))
    assert "loss is" in message and "at step " in message and "learning_rate" in message
    run = here / "run"
    assert checkpoints(run)
    assert is_finite(run)
    assert is_finite(run / f"checkpoint-{checkpoints(run)[-1]}"), "it is where a resumed run starts"
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line, parse_constant=no_number)["step"] <= 20
    AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True)
    cooler = [word for name in muon for word in (name, "1e-2")]
    go_on(run, "--max_steps", "6", "--learning_rate", "1e-3", *cooler)  # as the message advises
    assert is_finite(run / "checkpoint-6")
