"""Launching: the files for accelerate, what is refused, and two processes that train as one does."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from modeling import GPTForCausalLM
from training import pretrain, run
from training.config.arguments import DataArguments, GPTTrainingArguments, fitting_micro_batches
from training.data.corpus import corpus_at, whereabouts
from training.data.preparation import prepare
from training.loop.trainer import GPTTrainer
from training.run import empty_model
from training.system.distributed import check_launch, check_partitions, check_writer
from training.system.errors import UserError

from .tiny_runs import grow, metrics, short_of_memory, tiny_argv, write_text
from .two_processes import ROOT, as_launched, launch
from .variants import tiny_config

LAUNCH_FILES = [ROOT / "accelerate_config.yaml", *sorted((ROOT / "training" / "launch").glob("*.yaml"))]


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_accelerate_reads_the_file_and_its_header_says_the_command(path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file {path.relative_to(ROOT)}" in line for line in header)


def test_fsdp_is_the_second_version_as_the_launch_table_proves_it() -> None:
    config = yaml.safe_load((ROOT / "training/launch/fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    assert config["fsdp_version"] == 2
    assert config["fsdp_activation_checkpointing"] is True
    assert config["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"


def test_what_nobody_could_run_says_so_first() -> None:
    for name in ("zero.yaml", "multi-node.yaml", "multi-node.slurm"):
        lines = (ROOT / "training" / "launch" / name).read_text(encoding="utf-8").splitlines()
        assert any(line.startswith("# Untested: ") for line in lines[:2]), name


def test_the_slurm_script_is_sound_shell() -> None:
    script = ROOT / "training" / "launch" / "multi-node.slurm"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "training/launch/multi-node.yaml" in script.read_text(encoding="utf-8")


# --- what is refused --------------------------------------------------------------------------------------------------

LAUNCHED = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has a GPU")


@pytest.mark.parametrize(
    ("variables", "flags", "named"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, {}, "started one"),
        pytest.param({"ACCELERATE_USE_FSDP": "true", **LAUNCHED}, {"use_cpu": True}, "plain DDP"),
        pytest.param({}, {"fsdp": True}, "plain DDP", marks=NO_GPU),
        pytest.param(LAUNCHED, {}, "num_processes=2 on this machine, which has 0 GPUs", marks=NO_GPU),
    ],
)
def test_a_launch_that_would_be_another_is_refused(monkeypatch, variables, flags, named) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named) as caught:
        check_launch(**flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "optimizer", "named"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "muon", "optimizer='muon': DeepSpeed's ZeRO cuts flat pieces"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "normuon", "optimizer='normuon': DeepSpeed's ZeRO cuts flat pieces"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "muon", "fsdp_version=1: makes one flat row"),
        ({"ACCELERATE_USE_FSDP": "true"}, "adamw", "fsdp_version=1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "muon", None),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "adamw", None),
        ({}, "muon", None),
    ],
)
def test_flat_pieces_are_refused_where_matrices_are_needed(monkeypatch, variables, optimizer, named) -> None:
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    args = arguments_of(monkeypatch, optimizer=optimizer)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=named) if named else contextlib.nullcontext():
        check_partitions(args)


def test_zero_and_the_others_do_not_read_each_others_state(monkeypatch, tmp_path) -> None:
    args = arguments_of(monkeypatch)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert check_writer(tmp_path, args) is None
    (tmp_path / "latest").touch()
    with pytest.raises(UserError, match="go on under it"):
        check_writer(tmp_path, args)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert check_writer(tmp_path, args) is None
    (tmp_path / "latest").unlink()
    with pytest.raises(UserError, match="reads its own alone"):
        check_writer(tmp_path, args)


@pytest.mark.parametrize(
    "variables",
    [{}, {**LAUNCHED, "CUDA_VISIBLE_DEVICES": "-1,-1"}, {"ACCELERATE_USE_CPU": "True"}],
    ids=["alone", "two on CPUs", "one by accelerate"],
)
def test_a_launch_that_is_what_was_asked_for_passes(monkeypatch, variables) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert check_launch() is None


@pytest.mark.slow  # the variables that it sets: test_a_launch_that_would_be_another_is_refused
def test_asking_accelerate_for_two_cpu_processes_and_getting_one_is_an_error(tmp_path) -> None:
    write_text(tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--quiet"]
    command += ["-m", "training.pretrain", *tiny_argv()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "asked for several processes and started one" in done.stderr
    assert not (tmp_path / "run").exists()


# --- tokens a step ----------------------------------------------------------------------------------------------------


def arguments_of(monkeypatch, world_size: int = 1, **values) -> GPTTrainingArguments:
    monkeypatch.setattr(GPTTrainingArguments, "world_size", world_size)
    return GPTTrainingArguments(output_dir="unused", use_cpu=True, **values)


@pytest.mark.parametrize(
    ("world_size", "micro_batch", "accumulation"), [(1, 12, 40), (8, 12, 5), (8, 6, 10), (5, 8, 12), (8, 120, 1)]
)
def test_accumulation_follows_from_the_tokens_of_a_step(monkeypatch, world_size, micro_batch, accumulation) -> None:
    args = arguments_of(monkeypatch, world_size, tokens_per_step=491520, per_device_train_batch_size=micro_batch)
    assert args.share_out(1024) == 480
    assert args.gradient_accumulation_steps == accumulation


def test_without_it_the_batch_sizes_make_it(monkeypatch) -> None:
    args = arguments_of(monkeypatch, 2, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    assert args.share_out(10) == 24
    assert args.tokens_per_step == 240


@pytest.mark.parametrize(
    ("world_size", "values", "named"),
    [
        (8, {"per_device_train_batch_size": 16}, "per_device_train_batch_size=16: .* needs 15 or 20 on 8"),
        (7, {"per_device_train_batch_size": 12}, "does not divide among 7 processes; 6 or 8 would do"),
        (1, {"tokens_per_step": 1000}, "=1000: not a multiple of the context, 1024; the nearest is 1024"),
        (8, {"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3: .* makes it 5; leave one out"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(monkeypatch, world_size, values, named) -> None:
    with pytest.raises(UserError, match=named):
        values = {"tokens_per_step": 491520, "per_device_train_batch_size": 12, **values}
        arguments_of(monkeypatch, world_size, **values).share_out(1024)


def test_fitting_micro_batches_divide_evenly() -> None:
    assert fitting_micro_batches(12, 2) == [1, 2, 3, 6]
    assert fitting_micro_batches(12, 5) == []


def test_halving_the_micro_batch_after_running_out_of_memory_keeps_the_step(tmp_path, monkeypatch) -> None:
    whole = metrics(grow(tmp_path, name="whole"))
    monkeypatch.setattr(GPTTrainer, "training_step", short_of_memory(2))
    halved = metrics(grow(tmp_path, "--auto_find_batch_size", "true", name="halved"))
    assert [row["tokens"] for row in halved] == [row["tokens"] for row in whole]
    for a, b in zip(whole, halved, strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-6)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_the_loss_does_not_depend_on_how_a_step_is_shared_out(tmp_path, launcher) -> None:
    """1 process × 4 rows, 2 × 2 and accumulation 4: twenty steps, every loss to 1e-6."""
    steps = ["--max_steps", "20", "--eval_steps", "5", "--logging_steps", "1", "--tokens_per_step", "64"]
    whole = grow(tmp_path, *steps, name="whole")
    accumulated = grow(tmp_path, *steps, "--per_device_train_batch_size", "1", name="accumulated")
    shared = tiny_argv(*steps, "--per_device_train_batch_size", "2", "--use_cpu", "true", name="shared")
    done = launch("-m", "training.pretrain", *shared, cwd=tmp_path, launcher=launcher)
    assert "on 2 × cpu" in done.stdout
    assert done.stdout.count("tokens, vocabulary") == 1, "only the first process prints"
    for other in (accumulated, tmp_path / "shared"):
        for a, b in zip(metrics(whole), metrics(other), strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)
            assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-6)


def only_the_first_reads(*argv: str) -> None:
    """Pretrain; a process other than the first that hashes or prepares the text again ends with an error."""
    if os.environ["RANK"] != "0":
        run.prepare = lambda *args, **kwargs: pytest.fail("the sources were hashed again")
    pretrain.main([*argv])


def test_the_other_processes_take_the_first_ones_word_for_the_corpus(tmp_path) -> None:
    write_text(tmp_path)
    as_launched(2, None, tmp_path, only_the_first_reads, *tiny_argv("--max_steps", "1", "--use_cpu", "true"))
    assert (tmp_path / "run" / "README.md").is_file()


def test_a_corpus_is_taken_by_its_fingerprint(tmp_path) -> None:
    write_text(tmp_path)
    corpus = prepare(DataArguments(text_files=[str(tmp_path / "text.txt")], data_dir=str(tmp_path / "tokens")))
    directory, fingerprint = whereabouts(corpus)
    assert corpus_at((directory, fingerprint)) == corpus
    assert corpus_at((directory, "another")) is None
    assert corpus_at((str(tmp_path / "elsewhere"), fingerprint)) is None
    assert whereabouts(object()) is None


def test_a_model_whose_weights_another_process_sends_has_its_buffers() -> None:
    for encoding in ("rope", "sinusoidal", "learned"):
        config = tiny_config(position_encoding=encoding)
        empty, whole = empty_model(config), GPTForCausalLM(config)
        addresses = [p.data_ptr() for p in empty.parameters()]
        assert len({*addresses}) == len(list(whole.parameters())), "Accelerate knows weights by their addresses"
        for (name, a), (_, b) in zip(empty.named_buffers(), whole.named_buffers(), strict=True):
            assert torch.equal(a, b), name


def test_the_refusal_of_an_undividable_step_reaches_the_terminal(tmp_path) -> None:
    with pytest.raises(UserError, match=r"needs 2 or 4 on 1 process"):
        grow(tmp_path, "--per_device_train_batch_size", "3", "--tokens_per_step", "64")
