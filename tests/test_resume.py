"""A stopped run goes on as if it had never stopped, bit for bit; what would make it another run is refused."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from shlex import split as words

import pytest
import torch

from training import pretrain, resume
from training.share.metrics_file import read_metrics

from .tiny_runs import checkpoints, contents, go_on, grow, metrics, refused, rows, same_weights, tiny_argv, write_text

DROPOUT = ["--dropout", "0.1"]
ACCUMULATED = [*DROPOUT, *words("--max_steps 12 --gradient_accumulation_steps 2 --save_total_limit 5")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs lie, side by side."""
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def grown(folder):
    """A finished run of 8 steps with checkpoints at 4 and 8; tests copy it."""
    return grow(folder, *DROPOUT, name="grown")


@pytest.fixture
def copy(grown):
    """A copy of the finished run beside it, removed afterwards."""
    path = grown.parent / "copy"
    shutil.copytree(grown, path)
    yield path
    shutil.rmtree(path)


def eval_losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in read_metrics(run_dir)}


def logged(run_dir: Path) -> list[dict]:
    """What Trainer logged up to the last step of 12, epochs and rates included."""
    history = json.loads((run_dir / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{key: entry.get(key) for key in keys} for entry in history if "loss" in entry or "eval_loss" in entry]


def back_to(run_dir: Path, step: int) -> None:
    """Take away all that a run wrote after a checkpoint, as if the machine had gone down there."""
    for later in [kept for kept in checkpoints(run_dir) if kept > step]:
        shutil.rmtree(run_dir / f"checkpoint-{later}")
    lines = [json.dumps(row) for row in metrics(run_dir) if row["step"] <= step]
    (run_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for name in ("model.safetensors", "README.md", "loss.png", "sample.txt"):
        (run_dir / name).unlink()


# bit for bit


@pytest.mark.parametrize(
    "choice",
    [
        words("--optimizer adamw"),
        words("--optimizer muon"),
        words("--optimizer muon --bf16 true --force_precision true --sampling shuffled --max_grad_norm 0"),
        words("--optimizer normuon --muon_momentum_warmup_steps 6 --average_decay 0.9 --average_start 2"),
        words("--eval_steps 3 --save_steps 4 --average_decay 1 --average_start 0.5 --num_nextn_predict_layers 2"),
        words("--eval_steps 6 --save_steps 4 --logging_steps 5"),
        words("--lr_scheduler_type reduce_lr_on_plateau --lr_scheduler_kwargs '{patience: 0}' --learning_rate 1"),
    ],
    ids=" ".join,
)
def test_a_checkpoint_goes_on_bit_for_bit(folder, choice: list[str]) -> None:
    run = grow(folder, *ACCUMULATED, *choice, name="".join(c for c in "-".join(choice) if c.isalnum()))
    broken = folder / f"{run.name}-broken"
    shutil.copytree(run, broken)
    back_to(broken, 4)
    go_on(broken)
    assert rows(broken) == rows(run)
    assert same_weights(broken / "checkpoint-12", run / "checkpoint-12")
    assert same_weights(broken, run)
    assert logged(broken) == logged(run)
    assert metrics(broken)[-1]["seconds"] > metrics(broken)[0]["seconds"] > 0


def test_a_run_may_be_moved_and_its_corpus_be_gone(folder, tmp_path) -> None:
    write_text(tmp_path)
    there = grow(tmp_path, *DROPOUT, name="there")
    moved = tmp_path / "elsewhere" / "here"
    moved.parent.mkdir()
    shutil.copytree(there, moved)
    back_to(moved, 4)
    shutil.rmtree(tmp_path / "corpora")
    with contextlib.chdir(tmp_path):
        resume.main([str(moved)])
    assert same_weights(moved, there)


# from where


def test_from_a_named_checkpoint(copy, grown, capsys) -> None:
    go_on(copy, "--checkpoint", "checkpoint-4", "--max_steps", "10")
    assert "resuming copy from checkpoint-4" in capsys.readouterr().out
    assert list(eval_losses(copy)) == [4, 8, 10]
    assert eval_losses(copy)[8] != eval_losses(grown)[8]  # the schedule is now ten steps long


def test_from_the_best_checkpoint(folder, capsys) -> None:
    climbing = words("--lr_scheduler_type constant_with_warmup --warmup_steps 20 --learning_rate 3 --max_grad_norm 0")
    run = grow(folder, *climbing, "--max_steps", "20", "--eval_steps", "2", name="climbing")
    losses = eval_losses(run)
    best = min(losses, key=losses.get)
    assert best < 20
    capsys.readouterr()
    go_on(run, "--checkpoint", "best", "--max_steps", str(best + 2))
    assert f"from checkpoint-{best}\n" in capsys.readouterr().out
    assert f"checkpoint-{best}" in os.listdir(run)
    assert same_weights(run, run / f"checkpoint-{best}")


def test_last_is_where_the_run_was_last(copy, capsys) -> None:
    """After going back to 4 and stopping at 6, the abandoned checkpoint-8 is not the one to go on from."""
    go_on(copy, "--checkpoint", "checkpoint-4", "--max_steps", "6")
    assert 6 in checkpoints(copy), "what was just saved is never what makes room"
    capsys.readouterr()
    go_on(copy, "--max_steps", "10")
    assert "from checkpoint-6" in capsys.readouterr().out


# what may change


def test_more_steps(copy) -> None:
    go_on(copy, "--max_steps", "12")
    assert [row["step"] for row in metrics(copy)] == [4, 8, 12]
    assert eval_losses(copy)[12] < eval_losses(copy)[8]
    text = (copy / "README.md").read_text(encoding="utf-8")
    assert "&& acorn resume copy --max_steps 12" in text


def test_an_average_of_the_last_steps_is_that_in_a_longer_run_too(folder) -> None:
    flags = words("--average_decay 1 --average_start 0.75 --lr_scheduler_type constant_with_warmup")
    longer, once = grow(folder, *flags, name="longer"), grow(folder, *flags, "--max_steps", "12", name="once")
    go_on(longer, "--max_steps", "12")  # the average had begun at 6, and begins anew at 9
    raw = [torch.load(run / "checkpoint-12" / "raw_weights.pt") for run in (longer, once)]
    assert [state["taken"] for state in raw] == [3, 3]
    assert all(torch.equal(weight, raw[1]["weights"][name]) for name, weight in raw[0]["weights"].items())
    assert same_weights(longer, once)


def test_other_evaluation_steps(copy) -> None:
    go_on(copy, "--max_steps", "12", "--eval_steps", "2")
    assert [row["step"] for row in metrics(copy)] == [4, 8, 10, 12]
    assert json.loads((copy / "checkpoint-12" / "trainer_state.json").read_text())["max_steps"] == 12


def test_another_learning_rate(copy) -> None:
    """It is what a run whose loss stopped being a number is advised to change."""
    go_on(copy, "--max_steps", "12", "--learning_rate", "1e-5")
    assert 0 < metrics(copy)[-1]["learning_rate"] <= 1e-5


def test_another_weight_decay(copy) -> None:
    go_on(copy, "--max_steps", "12", "--weight_decay", "0.7")
    groups = torch.load(copy / "checkpoint-12" / "optimizer.pt")["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.7]


@pytest.mark.parametrize("flag", ["block_size", "max_position_embeddings"])
@pytest.mark.parametrize("recipe_key", ["block_size", "max_position_embeddings"])
def test_another_context(folder, recipe_key: str, flag: str) -> None:
    run = grow(folder, "--position_encoding", "rope", f"--{recipe_key}", "8", name=f"rope-{recipe_key}-{flag}")
    go_on(run, f"--{flag}", "32", "--max_steps", "12")
    for where in (run, run / "checkpoint-12"):
        assert json.loads((where / "config.json").read_text())["max_position_embeddings"] == 32
    assert metrics(run)[-1]["tokens"] - metrics(run)[-2]["tokens"] != metrics(run)[0]["tokens"]


# what is refused


@pytest.mark.parametrize(
    "flags",
    [
        "--block_size 32",  # the recipe's positions are learned
        "--block_size 8",  # and it was trained with more
        "--hidden_size 64",
        "--num_hidden_layers 3",
        "--position_encoding rope",
        "--preset gpt2",
        "--dropout 0.5",
        "--tokenizer byte",
        "--text_files other.txt",
        "--validation_fraction 0.2",
        "--sampling shuffled",
        "--optimizer muon",
        "--seed 3",
        "--average_decay 0.9",
        "--output_dir other",
    ],
)
def test_what_would_be_another_run_is_refused(grown, monkeypatch, flags: str) -> None:
    monkeypatch.chdir(grown.parent)
    before = contents(grown)
    message = refused(resume.main, "grown", "--max_steps", "12", *flags.split())
    assert flags.split()[0].removeprefix("--") in message
    assert contents(grown) == before


@pytest.mark.parametrize("flags", ["", "--max_steps 8", "--max_steps 5", "--checkpoint checkpoint-8"])
def test_a_finished_run_is_refused(grown, monkeypatch, flags: str) -> None:
    monkeypatch.chdir(grown.parent)
    before = contents(grown)
    message = refused(resume.main, "grown", *flags.split())
    assert "max_steps=" in message and "checkpoint-8" in message and "larger --max_steps" in message
    assert contents(grown) == before


def test_a_run_that_finished_its_epochs_is_refused(folder, monkeypatch) -> None:
    grow(folder, "--max_steps", "-1", "--num_train_epochs", "0.1", "--eval_steps", "1000", name="epochs")
    monkeypatch.chdir(folder)
    before = contents(folder / "epochs")
    assert "num_train_epochs" in refused(resume.main, "epochs")
    assert contents(folder / "epochs") == before


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "RUN_DIR"),
        (["--max_steps", "9"], "RUN_DIR"),
        (["nowhere"], "does not exist"),
        (["."], "no recipe.yaml"),
        (["grown", "--checkpoint", "checkpoint-5"], "did you mean 'checkpoint-"),
        (["grown", "--checkpoint", "bset"], "did you mean 'best'"),
        (["grown", "--max_step", "12"], "did you mean '--max_steps'"),
    ],
)
def test_wrong_names_are_refused(grown, monkeypatch, argv: list[str], named: str) -> None:
    monkeypatch.chdir(grown.parent)
    assert named in refused(resume.main, *argv)


def test_a_run_without_checkpoint_starts_again(grown, folder, capsys) -> None:
    """Killed before its first checkpoint, whether or not it had shown anything yet."""
    for number, kept in enumerate((["recipe.yaml"], ["recipe.yaml", "metrics.jsonl", "model.safetensors"])):
        young = folder / f"young-{number}"
        young.mkdir()
        for name in kept:
            shutil.copy(grown / name, young)
        go_on(young)
        assert "from its beginning: it has no checkpoint yet" in capsys.readouterr().out
        assert rows(young) == rows(grown)
        assert same_weights(young / "checkpoint-8", grown / "checkpoint-8")
        assert same_weights(young, grown)


def test_a_finished_run_without_checkpoints_keeps_its_model(folder, monkeypatch, capsys) -> None:
    run = grow(folder, "--save_strategy", "no", name="unsaved")
    assert "acorn resume" not in capsys.readouterr().out
    before = contents(run)
    for more in ([], ["--max_steps", "12"]):
        assert "is finished and has no checkpoint to go on from" in refused(resume.main, str(run), *more)
    assert contents(run) == before


def test_pretrain_too_starts_again_over_what_a_kill_left(folder) -> None:
    (folder / "killed-at-once").mkdir()
    (folder / "killed-at-once" / ".recipe.yaml.123.tmp").write_text("name: ru")
    run = grow(folder, name="killed-at-once")
    assert checkpoints(run) == [4, 8]
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_killed_while_it_reported(grown, copy, step: int) -> None:
    back_to(copy, step)
    shutil.copy(grown / "model.safetensors", copy)
    go_on(copy)
    assert rows(copy) == rows(grown)
    assert metrics(copy) == read_metrics(copy)  # nothing was evaluated twice
    assert (copy / "README.md").is_file()


def test_a_longer_run_killed_while_it_reported(copy, monkeypatch) -> None:
    """The card of the shorter run does not count as the report of the longer one."""
    with monkeypatch.context() as patch:
        patch.setattr("training.run.Run.finish", lambda self: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            go_on(copy, "--max_steps", "12")
    go_on(copy)
    assert checkpoints(copy)[-1] == 12
    assert "--max_steps 12" in (copy / "README.md").read_text(encoding="utf-8")


def test_a_checkpoint_that_was_not_written_whole_is_passed_over(copy, capsys) -> None:
    (copy / "checkpoint-8" / "trainer_state.json").unlink()
    go_on(copy, "--max_steps", "6")
    printed = capsys.readouterr()
    assert "from checkpoint-4" in printed.out
    assert "checkpoint-8 is skipped: trainer_state.json is missing" in printed.err


def test_a_folder_of_another_name_is_no_checkpoint(copy, capsys) -> None:
    (copy / "checkpoint-old").mkdir()
    go_on(copy, "--max_steps", "9")
    assert "from checkpoint-8" in capsys.readouterr().out


def test_a_checkpoint_without_state_is_no_way_to_go_on_exactly(folder, capsys, monkeypatch) -> None:
    """It is refused, or with a flag begun afresh, on the schedule's own step."""
    monkeypatch.chdir(folder)
    run = grow(folder, "--save_only_model", "true", name="weights-only")
    message = refused(resume.main, run.name, "--max_steps", "10")
    assert "no optimizer state and no schedule and no random state" in message and "--fresh_state true" in message
    go_on(run, "--max_steps", "10", "--fresh_state", "true", "--save_only_model", "false")
    assert "starting afresh" in capsys.readouterr().err
    unbroken = grow(folder, "--max_steps", "10", name="ten")
    last = [metrics(path)[-1] for path in (run, unbroken)]
    assert last[0]["step"] == last[1]["step"] == 10 and last[0]["learning_rate"] == last[1]["learning_rate"]
    go_on(run, "--max_steps", "11")


def test_replaying_the_data_is_refused(folder) -> None:
    assert "ignore_data_skip" in refused(pretrain.main, *tiny_argv("--ignore_data_skip", "false", name="replayed"))
