"""`push_to_hub: true`: a run shows itself on a Hub on loopback as it goes, and outlives that Hub."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from threading import Thread

import pytest
from transformers import AutoModelForCausalLM

from training import resume
from training.loop.push_while_training import hold
from training.share.uploads import Upload
from training.system.errors import UserError

from .tiny_runs import checkpoints, grow

PUSH = ("--push_to_hub", "true", "--hub_model_id", "me/run")


def test_a_run_pushes_itself_as_it_goes(hub, tmp_path, capsys) -> None:
    grow(tmp_path, *PUSH, "--hub_always_push", "true", "--hub_private_repo", "true", "--eval_steps", "2")
    repo = hub.repos["me/run"]
    assert repo.private
    steps = [f"Training in progress, step {step}" for step in (2, 4, 6, 8)]
    assert repo.messages == ["initial commit", *steps, "End of training"]
    arrived = repo.files()
    for name in ("model.safetensors", "loss.png", "sample.txt"):
        assert arrived[name] == (tmp_path / "run" / name).read_bytes()
    assert not [name for name in arrived if "checkpoint" in name or name.endswith(".bin")]
    assert f"The run is at {hub.address}/me/run" in capsys.readouterr().out
    assert not (tmp_path / "run" / ".pushing").exists()


def test_a_run_outlives_the_hub(hub, tmp_path, capsys) -> None:
    """The Hub goes away after the first push: each failure is said once, and the run ends as if it were there."""
    hub.on_commit = lambda repo_id: Thread(target=hub.stop).start()
    run = grow(tmp_path, *PUSH, "--hub_always_push", "true", "--eval_steps", "2")
    said = capsys.readouterr().err
    failures = [line for line in said.splitlines() if line.startswith("push_to_hub (")]
    assert 1 <= len(failures) <= 4 and all("cannot be reached" in line for line in failures)
    assert "End of training" in failures[-1]
    assert "acorn push run me/run" in said
    assert "Traceback" not in said
    assert checkpoints(run)[-1] == 8 and (run / "README.md").is_file()
    assert not (run / ".pushing").exists()
    AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True)


def test_a_hub_that_was_never_there_stops_no_run(hub, tmp_path, capsys) -> None:
    hub.stop()
    run = grow(tmp_path, *PUSH)
    assert (run / "README.md").is_file()
    assert "push_to_hub (Training in progress, step 4)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "folders", "messages"),
    [
        ("end", set(), 1),
        ("checkpoint", {"last-checkpoint"}, 3),
        ("all_checkpoints", {"checkpoint-4", "checkpoint-8"}, 3),
    ],
)
def test_hub_strategies(hub, tmp_path, monkeypatch, strategy: str, folders: set[str], messages: int) -> None:
    run = grow(tmp_path, *PUSH, "--hub_strategy", strategy, "--hub_always_push", "true", "--hub_revision", "try")
    repo = hub.repos["me/run"]
    assert list(repo.files()) == [".gitattributes"], "the revision is another branch"
    arrived = repo.files("try")
    assert {name.split("/")[0] for name in arrived if "/" in name} == folders
    assert len(repo.messages) == 1 + messages
    for folder in folders:
        inside = {name.split("/")[1] for name in arrived if name.startswith(f"{folder}/")}
        assert {"optimizer.pt", "trainer_state.json", "model.safetensors"} <= inside
        assert "manifest.json" in inside and "training_args.bin" not in inside
    if strategy == "checkpoint":  # what arrived is enough to go on from
        copy = tmp_path / "fetched"
        for name, content in arrived.items():
            path = copy / name.replace("last-checkpoint", "checkpoint-8")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        hub.stop()
        alone = "--push_to_hub false --hub_model_id none --hub_strategy every_save --hub_always_push false"
        monkeypatch.chdir(tmp_path)
        resume.main(["fetched", "--max_steps", "10", *alone.split(), "--hub_revision", "none"])
        assert checkpoints(copy)[-1] == 10
    assert checkpoints(run) == [4, 8]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push_to_hub", "true", "--hub_token", "hf_x"], "hub_token"),
        (["--hub_model_id", "me/run"], "without push_to_hub"),
        (["--hub_private_repo", "true"], "without push_to_hub"),
        (["--push_to_hub", "true", "--hub_model_id", "a/b/c"], "a/b/c"),
        (["--push_to_hub", "true", "--hub_strategy", "sometimes"], "sometimes"),
    ],
)
def test_hub_arguments_that_cannot_be(hub, tmp_path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        grow(tmp_path, *flags)
    assert not (tmp_path / "run").exists() and not hub.log


def test_a_run_that_shall_push_needs_a_token_at_once(hub, no_token, tmp_path) -> None:
    with pytest.raises(UserError, match="HF_TOKEN"):
        grow(tmp_path, *PUSH)
    assert not (tmp_path / "run").exists()


def test_held_files_are_those_of_the_moment(tmp_path) -> None:
    large, small = tmp_path / "model.safetensors", tmp_path / "metrics.jsonl"
    for file in (large, small):
        file.write_text("then")
    held = hold([Upload(file.name, file, "") for file in (large, small)], tmp_path / ".pushing" / "1")
    (tmp_path / "new").write_text("now")
    (tmp_path / "new").replace(large)
    with small.open("a") as file:
        file.write(" and now")
    assert [Path(held[0].content).read_text(), held[1].content] == ["then", b"then"]


def test_the_last_checkpoint_is_the_one_of_the_last_step(hub, tmp_path) -> None:
    """Whatever the clock says: it may have been set back in between."""
    flags = ("--hub_strategy", "checkpoint", "--hub_always_push", "true", "--save_total_limit", "9")
    run = grow(tmp_path, *PUSH, *flags)
    os.utime(run / "checkpoint-4", (2e9, 2e9))
    shutil.copy(run / "recipe.yaml", run / "checkpoint-8" / "notes.txt")
    with contextlib.chdir(tmp_path):
        resume.main(["run", "--max_steps", "9"])
    os.utime(run / "checkpoint-4", (2e9, 2e9))
    state = json.loads(hub.repos["me/run"].files()["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 9
    assert "last-checkpoint/notes.txt" not in hub.repos["me/run"].files()
