"""The best model at the root of a run is what was written, and the best of the course that the run is on."""

import json
import shutil
from pathlib import Path

import pytest

from inference import evaluate, generate, push
from training import resume
from training.model.loading import load_causal_lm
from training.share.metrics_file import read_metrics
from training.system.checkpoints import move_into_root
from training.system.run_files import MANIFEST, damage, read_file_manifest

from .tiny_runs import checkpoints, contents, go_on, grow, refused, same_weights


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    """A run of 8 steps whose best is the last, with checkpoints at 4 and 8; tests copy it."""
    return grow(tmp_path_factory.mktemp("root"))


@pytest.fixture
def run(grown, monkeypatch) -> Path:
    path = grown.parent / "copy"
    shutil.copytree(grown, path)
    monkeypatch.chdir(grown.parent)
    yield path
    shutil.rmtree(path)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_the_root_lists_its_files(grown) -> None:
    manifest = read_file_manifest(grown)
    assert manifest["step"] == 8 and "before" not in manifest
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_gpt.py"} <= manifest["files"].keys()
    assert damage(grown) is None


@pytest.mark.parametrize(
    ("main", "flags"), [(generate.main, []), (evaluate.main, []), (push.main, ["me/gpt", "--dry_run"])]
)
def test_a_flipped_byte_is_noticed(run, main, flags: list[str]) -> None:
    flip(run / "model.safetensors")
    assert "model.safetensors is damaged" in refused(main, str(run), *flags)


def test_a_changed_setting_is_said_and_taken(run, capsys) -> None:
    settings = run / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"temperature": 0.5}))
    load_causal_lm(str(run))
    assert "generation_config.json has changed" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {"model.safetensors": {}}}', '{"files": 1}'])
def test_a_damaged_manifest_is_one_line(run, content: str) -> None:
    (run / MANIFEST).write_text(content)
    assert f"{MANIFEST} is damaged" in refused(generate.main, str(run))


def test_a_kill_amid_the_move_is_no_damage(run, tmp_path, monkeypatch) -> None:
    aside = tmp_path / "aside"
    shutil.copytree(run / "checkpoint-4", aside, ignore=shutil.ignore_patterns("*.pt", "*.pth", "*.bin", MANIFEST))
    replace, moved = Path.replace, []

    def killed(self, target):
        if Path(target).parent == run and not Path(target).name.startswith((".", MANIFEST)):
            moved.append(target)
            if len(moved) == 5:
                raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        move_into_root(aside, run, 4)
    monkeypatch.undo()
    load_causal_lm(str(run))
    shutil.rmtree(aside)
    go_on(run, "--checkpoint", "checkpoint-8", "--max_steps", "9")
    assert damage(run) is None


def test_going_back_takes_the_root_along(run) -> None:
    """With a rate so high that nothing gets better, the best of the new course is where it began."""
    go_on(run, "--checkpoint", "checkpoint-4", "--learning_rate", "30", "--max_steps", "8")
    best = min(read_metrics(run), key=lambda row: row["eval_loss"])
    assert best["step"] == 4 and [row["step"] for row in read_metrics(run)] == [4, 8]
    assert same_weights(run, run / "checkpoint-4") and read_file_manifest(run)["step"] == 4
    assert f"{best['eval_loss']:.4f}" in (run / "README.md").read_text()


def test_where_the_best_of_that_time_is_gone_the_next_one_is_the_best(grown) -> None:
    """Evaluated at 3 and 6, saved at 4 and 8: back at 4, the root held the model of 6, and that of 3 is nowhere."""
    run = grow(grown.parent, *"--eval_steps 3 --save_steps 4 --save_total_limit 9".split(), name="odd")
    assert read_file_manifest(run)["step"] == 8
    go_on(run, "--checkpoint", "checkpoint-4", "--learning_rate", "30", "--max_steps", "7")
    steps = {row["step"]: row["eval_loss"] for row in read_metrics(run)}
    assert list(steps) == [3, 6, 7]
    assert read_file_manifest(run)["step"] == min((6, 7), key=steps.get)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_half_a_recipe_is_refused(run, share: float) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_bytes(recipe.read_bytes()[: int(recipe.stat().st_size * share)])
    before = contents(run)
    assert "recipe.yaml is cut off" in refused(resume.main, "copy", "--max_steps", "9")
    assert contents(run) == before


def test_a_changed_recipe_is_said_and_taken(run, capsys) -> None:
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 8", "max_steps: 9"))
    go_on(run)
    assert "recipe.yaml has changed" in capsys.readouterr().err
    assert checkpoints(run)[-1] == 9


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 4}', '"x"', "\xff"])
def test_damaged_metrics_are_refused_at_the_start(run, line: str) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(f"{line}\n".encode("latin-1") + path.read_bytes())
    before = contents(run)
    assert "metrics.jsonl is damaged in line 1" in refused(resume.main, "copy", "--max_steps", "9")
    assert contents(run) == before
