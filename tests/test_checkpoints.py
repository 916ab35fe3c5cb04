"""A checkpoint is written whole or not at all; a damaged one is found out, named and skipped."""

import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as safetensors_bytes

from training import resume
from training.share.metrics_file import ROW, append_metrics, mend_metrics, read_metrics
from training.system.checkpoints import find_checkpoint, list_checkpoints, rotate, seal, sweep, write_beside
from training.system.errors import UserError
from training.system.run_files import MANIFEST, STATE, damage

from .foreign import Trap
from .tiny_runs import checkpoints, contents, go_on, grow, metrics, refused, same_weights


def pickled(content: object) -> bytes:
    """What torch.save would write."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


ALONE = SimpleNamespace(world_size=1, process_index=0, should_save=True)
FILES = {
    "model.safetensors": safetensors_bytes({"weights": torch.zeros(100)}),
    "optimizer.pt": pickled({"moments": torch.zeros(200)}),
    "part/0.bin": b"a shard",
}


def make_checkpoint(run_dir: Path, step: int, best: int | None = None) -> Path:
    """A sealed checkpoint of small files."""
    aside = run_dir / f".saving-checkpoint-{step}"
    for name, content in FILES.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).write_bytes(content)
    best_path = f"elsewhere/checkpoint-{best}" if best else None
    (aside / STATE).write_text(json.dumps({"global_step": step, "best_model_checkpoint": best_path}))
    checkpoint = run_dir / f"checkpoint-{step}"
    seal(aside, checkpoint)
    return checkpoint


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {"its sha256 differs": flip_a_byte, "bytes": cut_off, "is missing": Path.unlink}


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A finished run of 8 steps with checkpoints at 4 and 8; tests copy it."""
    return grow(tmp_path_factory.mktemp("checkpoints"), name="grown")


@pytest.fixture
def copy(grown):
    """A copy of the finished run beside it, removed afterwards."""
    path = grown.parent / "copy"
    shutil.copytree(grown, path)
    yield path
    shutil.rmtree(path)


# writing


def test_the_manifest_lists_every_file(copy) -> None:
    checkpoint = copy / "checkpoint-8"
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert {*listed, MANIFEST} == set(contents(checkpoint))
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE} <= set(listed)
    for name, facts in listed.items():
        assert facts == {"bytes": (checkpoint / name).stat().st_size, "sha256": contents(checkpoint)[name]}
    assert damage(checkpoint) is None


def test_nothing_half_written_is_left(grown) -> None:
    assert not [name for name in os.listdir(grown) if name.startswith(".")]
    assert (
        Path(json.loads((grown / "checkpoint-8" / STATE).read_text())["best_model_checkpoint"]).name == "checkpoint-8"
    )


def test_an_error_while_writing_leaves_what_was_there(tmp_path) -> None:
    whole = make_checkpoint(tmp_path, 4)
    before = contents(tmp_path)
    aside = tmp_path / ".saving-checkpoint-8"

    def fails() -> None:
        (aside / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_beside(aside, fails, lambda: seal(aside, tmp_path / "checkpoint-8"), ALONE)
    assert contents(tmp_path) == before
    assert damage(whole) is None


def test_an_error_while_sealing_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    make_checkpoint(tmp_path, 4)
    before, aside = contents(tmp_path), tmp_path / ".saving-checkpoint-8"
    monkeypatch.setattr("training.system.files.sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write_beside(
            aside, lambda: (aside / "a").write_bytes(b"a"), lambda: seal(aside, tmp_path / "checkpoint-8"), ALONE
        )
    assert contents(tmp_path) == before


def test_a_checkpoint_has_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch) -> None:
    synced = []
    monkeypatch.setattr("training.system.files.sync", lambda path: synced.append((path.name, aside.exists())))
    aside = tmp_path / ".saving-checkpoint-4"
    (aside / "part").mkdir(parents=True)
    for name in ("a", "part/b"):
        (aside / name).write_bytes(b"content")
    seal(aside, tmp_path / "checkpoint-4")
    assert {(name, True) for name in ("a", "b", "part", MANIFEST, aside.name)} <= set(synced)
    assert synced[-1] == (tmp_path.name, False)  # the new name too, after the rename


def test_the_same_step_is_saved_again(tmp_path) -> None:
    make_checkpoint(tmp_path, 4)
    again = make_checkpoint(tmp_path, 4, best=4)
    assert json.loads((again / STATE).read_text())["best_model_checkpoint"].endswith("checkpoint-4")
    assert os.listdir(tmp_path) == ["checkpoint-4"]
    assert damage(again) is None


# rotation and leftovers


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(2, None, [3, 4]), (2, 1, [1, 4]), (1, 2, [2, 4]), (1, 4, [4]), (3, 1, [1, 3, 4]), (None, 1, [1, 2, 3, 4])],
)
def test_rotation_keeps_the_best_and_the_last(tmp_path, limit: int | None, best: int | None, kept: list[int]) -> None:
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    rotate(tmp_path, limit, f"a/path/from/before/it/was/moved/checkpoint-{best}" if best else None)
    assert checkpoints(tmp_path) == kept
    assert len(os.listdir(tmp_path)) == len(kept)


def test_a_limit_of_one_keeps_the_last_at_the_end_too(grown) -> None:
    climbing = "--lr_scheduler_type constant_with_warmup --warmup_steps 20 --learning_rate 3 --max_grad_norm 0".split()
    run = grow(
        grown.parent, *climbing, "--max_steps", "20", "--eval_steps", "2", "--save_total_limit", "1", name="limit-1"
    )
    best = min(read_metrics(run), key=lambda row: row["eval_loss"])["step"]
    assert best < 20
    assert checkpoints(run) == [best, 20]


def test_what_a_killed_process_left_is_swept(tmp_path) -> None:
    make_checkpoint(tmp_path, 4)
    for name in (".saving", ".saving-checkpoint-8", ".removing-checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".recipe.yaml.123.tmp").write_bytes(b"half")
    (tmp_path / "checkpoint-4").rename(tmp_path / ".replaced-checkpoint-4")  # killed between the two renames
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-4"]
    assert damage(tmp_path / "checkpoint-4") is None


# verifying


@pytest.mark.parametrize("file", [*FILES, STATE])
@pytest.mark.parametrize("words", DAMAGES)
def test_damage_names_the_file(tmp_path, file: str, words: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    path = checkpoint / file
    path.write_bytes(path.read_bytes()[:-1]) if words == "bytes" else DAMAGES[words](path)
    assert file in damage(checkpoint)
    assert words in damage(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"a": 3}}', b"\xff\xfe"])
def test_a_damaged_manifest(tmp_path, content: bytes) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    (checkpoint / MANIFEST).write_bytes(content)
    assert MANIFEST in damage(checkpoint)


def test_a_file_that_somebody_added_is_no_damage(tmp_path) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    (checkpoint / "notes.txt").write_text("the good one")
    assert damage(checkpoint) is None


def test_a_checkpoint_of_an_earlier_acorn_is_taken_and_said(tmp_path, capsys) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    (checkpoint / MANIFEST).unlink()
    assert find_checkpoint(tmp_path, "last") == checkpoint
    assert "checkpoint-4 has no manifest.json" in capsys.readouterr().err
    (checkpoint / STATE).write_text('{"global_')
    assert STATE in damage(checkpoint)


def test_last_is_the_newest_that_is_whole(tmp_path, capsys) -> None:
    for step in (4, 8, 12):
        make_checkpoint(tmp_path, step, best=4)
    flip_a_byte(tmp_path / "checkpoint-12" / "optimizer.pt")
    (tmp_path / "checkpoint-8" / "model.safetensors").unlink()
    assert find_checkpoint(tmp_path, "last").name == "checkpoint-4"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "checkpoint-12 is skipped: optimizer.pt" in told[0]
    assert "checkpoint-8 is skipped: model.safetensors is missing" in told[1]
    assert find_checkpoint(tmp_path, "best").name == "checkpoint-4"


def test_no_checkpoint_is_whole(tmp_path) -> None:
    for step in (4, 8):
        flip_a_byte(make_checkpoint(tmp_path, step) / "optimizer.pt")
    with pytest.raises(UserError, match=r"no checkpoint is whole .*checkpoint-8: optimizer.*checkpoint-4: optimizer"):
        find_checkpoint(tmp_path, "last")


def test_a_run_without_checkpoints(tmp_path) -> None:
    assert find_checkpoint(tmp_path, "last") is None
    for named in ("best", "checkpoint-4"):
        with pytest.raises(UserError, match="no checkpoint yet"):
            find_checkpoint(tmp_path, named)


@pytest.mark.parametrize("damage_it", DAMAGES.values(), ids=["flipped", "cut", "missing"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_resume_passes_over_a_damaged_checkpoint(grown, copy, capsys, file: str, damage_it) -> None:
    damage_it(copy / "checkpoint-8" / file)
    (copy / "README.md").unlink()
    go_on(copy)
    told = capsys.readouterr()
    assert f"checkpoint-8 is skipped: {file} " in told.err
    assert "from checkpoint-4" in told.out
    assert same_weights(copy / "checkpoint-8", grown / "checkpoint-8")
    assert damage(copy / "checkpoint-8") is None
    assert [row["step"] for row in read_metrics(copy)] == [4, 8]


def test_a_named_checkpoint_that_is_damaged_is_refused(copy, monkeypatch) -> None:
    monkeypatch.chdir(copy.parent)
    flip_a_byte(copy / "checkpoint-4" / "optimizer.pt")
    before = contents(copy)
    message = refused(resume.main, "copy", "--checkpoint", "checkpoint-4", "--max_steps", "12")
    assert "checkpoint-4 is damaged: optimizer.pt is not what was written" in message
    assert contents(copy) == before


# metrics.jsonl


def test_a_half_written_line_is_cut_off(copy) -> None:
    whole = metrics(copy)
    with open(copy / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 12, "tok')
    assert read_metrics(copy) == whole
    go_on(copy, "--max_steps", "12")
    assert metrics(copy)[:2] == whole
    assert [row["step"] for row in metrics(copy)] == [4, 8, 12]


def test_mending_changes_nothing_that_is_whole(tmp_path) -> None:
    mend_metrics(tmp_path)
    assert list_checkpoints(tmp_path) == [] and os.listdir(tmp_path) == []
    append_metrics(tmp_path, dict.fromkeys(ROW, 1.0) | {"step": 4})
    before = (tmp_path / "metrics.jsonl").stat()
    mend_metrics(tmp_path)
    assert (tmp_path / "metrics.jsonl").stat() == before


# files that nobody vouches for


def _without_manifest(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()


def _with_a_manifest_of_its_own(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    checkpoint.rename(aside := checkpoint.with_name(".saving-again"))
    seal(aside, checkpoint)


@pytest.mark.parametrize("vouched", [_without_manifest, _with_a_manifest_of_its_own])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("kind", ["hostile", "cut off"])
def test_what_is_damaged_or_unsafe_is_one_line_and_nothing_runs(copy, name: str, kind: str, vouched) -> None:
    checkpoint, trap = copy / "checkpoint-8", copy.parent / "trap"
    raw = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(pickled({"state": Trap(trap)}) if kind == "hostile" else raw[: len(raw) // 2])
    vouched(checkpoint)
    before = contents(copy)
    message = refused(resume.main, str(copy), "--checkpoint", "checkpoint-8", "--max_steps", "12")
    assert name in message
    assert "--checkpoint last" in message
    assert contents(copy) == before
    assert not trap.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"global_step": 8}'])
def test_a_damaged_state_without_a_manifest(tmp_path, content: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 8)
    _without_manifest(checkpoint)
    (checkpoint / STATE).write_text(content)
    assert damage(checkpoint) == f"{STATE} cannot be read"


@pytest.mark.parametrize(
    ("name", "content"), [("optimizer.pt", {}), ("scheduler.pt", [1]), ("rng_state.pth", {"python": 3})]
)
def test_what_opens_and_is_no_state_is_one_line(copy, name: str, content) -> None:
    torch.save(content, copy / "checkpoint-8" / name)
    _without_manifest(copy / "checkpoint-8")
    message = refused(resume.main, str(copy), "--max_steps", "12")
    assert "checkpoint-8" in message
    assert "cannot be loaded" in message


def test_weights_of_another_shape_are_one_line(copy) -> None:
    path = copy / "checkpoint-8" / "model.safetensors"
    save_file({name: weight[..., :-1].contiguous() for name, weight in load_file(path).items()}, path, {"format": "pt"})
    _without_manifest(copy / "checkpoint-8")
    assert "checkpoint-8" in refused(resume.main, str(copy), "--max_steps", "12")
