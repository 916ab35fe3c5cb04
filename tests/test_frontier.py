"""The arithmetic of benchmarks/frontier.py, and a screen of one ingredient end to end."""

import json
import math
import sys

import pytest
import torch

from benchmarks import contenders, frontier
from training.system.errors import UserError

from .tiny_runs import TEXT, TINY, refused

FLAGS = " ".join(TINY).replace("--max_steps 8 ", "--max_steps 2 ")


def test_a_later_flag_takes_the_place_of_an_earlier_one() -> None:
    lines = "--a 1 --kwargs {x: 1, y: 2}", "", "--b true --a 2 3"
    assert frontier.merged(*lines) == "--a 2 3 --kwargs {x: 1, y: 2} --b true"


def test_p_is_students() -> None:
    """Against the tables: with 7 degrees of freedom t = -2.998 leaves 1 %, with 2 degrees t = -2.920 leaves 5 %."""
    for size, t, p in ((8, -2.998, 0.01), (3, -2.920, 0.05), (8, 0.0, 0.5), (8, 2.998, 0.99)):
        losses = [2.0 + (-1) ** i for i in range(size - size % 2)] + [2.0] * (size % 2)
        error = torch.tensor(losses).std().item() / size**0.5
        assert frontier.p_value(losses, 2.0 - t * error) == pytest.approx(p, abs=2e-4)


def test_steps_lie_on_a_line_over_their_logarithm() -> None:
    assert frontier.steps_to(1.5, [100, 400], [2.0, 1.0]) == 200
    assert frontier.steps_to(1.5, [100, 200, 400], [2.0, 1.6, 1.5]) == 400
    assert frontier.steps_to(0.9, [100, 400], [2.0, 1.0]) is None


def test_differences_are_taken_seed_by_seed() -> None:
    assert frontier.paired([1.0, 3.0], [1.1, 2.9]) == {"difference": 0.0, "standard_error": 0.1}
    assert frontier.paired([1.0, 3.0], [1.1, 3.1]) == {"difference": -0.1, "standard_error": 0.0}


def test_a_name_needs_flags() -> None:
    assert frontier.named(["a: --b 1"]) == {"a": "--b 1"}
    for line in ("a", "a:", "a: b", "--b 1"):
        with pytest.raises(UserError, match="give a name and flags"):
            frontier.named([line])


def test_a_screen_trains_on_the_training_part_and_each_run_once(tmp_path, capsys) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    argv = ["screen", "--text", str(tmp_path / "text.txt"), "--runs", str(tmp_path / "runs"), "--seeds", "2"]
    argv += ["--recipe", "shakespeare-char-cpu", "--flags", FLAGS]
    frontier.main([*argv, "--try", "average: --average_decay 0.5", "--try", "same: --seed 1"])
    line = json.loads(capsys.readouterr().out)
    found = line["ingredients"]
    assert found["same"]["difference"] == 0 != found["average"]["difference"]
    assert found["average"]["losses"] != line["base"]["losses"]
    assert (tmp_path / "runs" / "training-part-1.0.txt").read_text() == TEXT[: int(0.9 * len(TEXT))]
    runs = sorted(path for path in (tmp_path / "runs").glob("shakespeare-char-cpu-*"))
    assert len(runs) == 4, "a run of the same flags and seed is found, and not trained again"
    tokens = next((tmp_path / "runs").glob("tokens-*"))
    first, second, both = (frontier.ensemble_loss(chosen, tokens) for chosen in (runs[:1], runs[1:2], runs[:2]))
    assert math.isfinite(first) and both < max(first, second)


def test_contenders_take_the_common_flags_and_steps_in_any_order(tmp_path, capsys, monkeypatch) -> None:
    lines = []

    def losses(board: frontier.Board, flags: str) -> list[float]:
        lines.append(flags)
        return [8 / int(flags.split()[-1])] * len(board.seeds)

    monkeypatch.setattr(frontier.Board, "losses", losses)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    argv = ["optimizer", "--text", str(tmp_path / "text.txt"), "--runs", str(tmp_path / "runs"), "--mark", "1"]
    argv += ["--steps", "8", "4", "8", "--flags", "--weight_decay 0.3 --warmup_steps 1", "--only", "muon", "own"]
    frontier.main([*argv, "--contender", "own: --weight_decay 0.1"])
    muon, own = "--weight_decay 0.3 --warmup_steps 1 --optimizer muon", "--weight_decay 0.1 --warmup_steps 1"
    assert lines == [f"{line} --max_steps {steps}" for line in (muon, own) for steps in (4, 8)]
    assert json.loads(capsys.readouterr().out)["contenders"]["muon"]["steps_to_mark"] == [8.0] * 8


@pytest.mark.parametrize(
    ("track", "named"),
    [
        (["optimizer", "--mark", "1", "--steps", "8", "--only", "muon", "sgd"], "'sgd': choose from adamw, muon, nor"),
        (["optimizer", "--mark", "1", "--steps", "8", "--contender", "a --b 1"], "'a --b 1': give a name and flags"),
        (["data", "--flags", "tiny"], "flags='tiny': must begin with a flag"),
        (["screen", "--try", "even --optimizer normuon"], "'even --optimizer normuon': give a name and flags"),
    ],
)
def test_what_is_malformed_is_refused_before_a_run(tmp_path, monkeypatch, track: list[str], named: str) -> None:
    monkeypatch.setattr(frontier.Board, "run", lambda *_: pytest.fail("a run began"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    argv = [*track, "--text", str(tmp_path / "text.txt"), "--runs", str(tmp_path / "runs")]
    assert named in refused(frontier.main, *argv)


def test_rounds_show_their_progress_on_a_terminal(capsys, monkeypatch) -> None:
    assert contenders.alternate(2, lambda: 1.0, lambda: 2.0) == [[1.0, 1.0], [2.0, 2.0]]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    contenders.alternate(2, lambda: 1.0)
    assert "0/2" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "named"), [("--seeds 1", "seeds=1"), ("--text nowhere.txt", "text='nowhere.txt'")])
def test_bad_input_is_one_line(tmp_path, flags: str, named: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    argv = [] if "--text" in flags else ["--text", str(tmp_path / "text.txt")]
    assert named in refused(frontier.main, "time", *argv, *flags.split())
