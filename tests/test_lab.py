"""`acorn lab`: its door, its directories, and the experiments on caches from end to end; what is asked wrongly."""

import json
import math

import pytest
import torch
from peft import PromptTuningConfig
from PIL import Image

import acorn
from inference import lab
from inference.caches.lookup import looking_up
from inference.experiments import common, kv
from inference.measuring.kv_report import cut_streams, decode, own_cache
from training.model.loading import load_model_and_tokenizer
from training.system.errors import UserError

from .tiny_runs import refused, write_text
from .variants import VARIANTS, random_model, tiny_config

FEW = ("--smoke", "--streams", "8", "--length", "32", "--batch_size", "64")


@pytest.fixture
def asked(grown, tmp_path, monkeypatch):
    """`asked(experiment, *flags) -> list of results` of the session's tiny run, written into a directory `lab`."""
    monkeypatch.chdir(grown.parent)

    def call(experiment: str, *flags: str) -> list[dict]:
        acorn.call_verb(["lab", experiment, grown.name, *FEW, "--output_dir", str(tmp_path / "lab"), *flags])
        lines = (tmp_path / "lab" / "results.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    return call


def refusal(*argv: str) -> str:
    return refused(lab.main, *argv)


# ---- the door


def test_the_help_says_what_each_experiment_asks(capsys) -> None:
    lab.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in lab.EXPERIMENTS)
    assert "Type next:" in text


@pytest.mark.parametrize("name", lab.EXPERIMENTS)
def test_every_experiment_teaches(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        lab.main([name, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert f"acorn lab {name}" in text
    assert all(flag in text for flag in ("--smoke", "--seed", "--output_dir", "examples:"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["kvv"], "unknown experiment 'kvv': did you mean 'kv'?"),
        (["--smoke"], "unknown experiment '--smoke'"),
        (["kv"], "the following arguments are required: model"),
        (["kv", "nowhere/at/all"], "there is no such directory"),
        (["kv", "RUN", "--length", "65"], "length=65: must be between 4 and the model's context, 64"),
        (["kv", "RUN", "--length", "3"], "length=3"),
        (["kv", "RUN", "--text_files", "short.txt"], "8 streams of 64 need 513; give a longer text"),
        (["kv", "RUN", "--text_files", "gone.txt"], "gone.txt"),
        (["kv", "RUN", "--budgets", "1.5"], "budgets=1.5: must be shares of the tokens"),
        (["kv", "RUN", "--caches", "int5"], "unknown cache 'int5'"),
        (["kv", "RUN", "--caches", "window", "--budgets", "0.05"], "cache_budget=3: does not hold cache_sinks=4"),
        (["kv", "RUN", "--caches", "window+h2o"], "window+h2o"),
        (["kv", "RUN", "--split", "train"], "--split: has no effect without --data_dir"),
        (["floor", "RUN", "--text_column", "body"], "--text_column: has no effect without --text_files or"),
        (["floor", "RUN", "--data_dir", "d", "--dataset", "x"], "--data_dir: cannot be combined with --dataset"),
        (["kv", "RUN", "--streams", "0"], "streams=0: must be a whole number"),
        (["kv", "RUN", "--batch_size", "0"], "batch_size=0: must be a whole number"),
        (["kv", "RUN", "--seed", "-1"], "seed=-1: must be a whole number"),
        (["kv", "RUN", "--smaller", "gone/model/here"], "there is no such directory"),
        (["floor", "RUN", "--output_dir", "taken"], "output_dir=taken: is there already, and not empty"),
        (["floor", "RUN", "--output_dir", "short.txt"], "output_dir=short.txt"),
        (["floor", "RUN", "--output_dir", ""], "output_dir='.': name a new directory"),
        (["floor", "RUN", "--stream", "3"], "unknown flag '--stream': did you mean '--streams'?"),
    ],
)
def test_what_is_asked_wrongly_is_refused_in_a_line(argv, words, grown, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path, "a few words\n", "short.txt")
    (tmp_path / "taken").mkdir()
    write_text(tmp_path / "taken", "mine")
    argv = [str(grown) if word == "RUN" else word for word in argv]
    assert words in refusal(*argv)
    assert (tmp_path / "taken" / "text.txt").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) in (
        ["short.txt", "taken"],
        ["corpora", "short.txt", "taken"],
    )


def test_a_model_without_a_text_is_refused(tmp_path, monkeypatch, grown) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model_and_tokenizer(str(grown))
    for part in (model, tokenizer):
        part.save_pretrained("alone")
    assert "alone belongs to no run" in refusal("kv", "alone")
    assert not (tmp_path / "runs").exists()


def test_an_adapter_of_virtual_tokens_is_refused(grown, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model_and_tokenizer(str(grown))
    model.active_peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    monkeypatch.setattr(common, "load_model_and_tokenizer", lambda *args, **options: (model, tokenizer))
    assert "has virtual tokens" in refusal("kv", str(grown))
    assert "has virtual tokens" in refusal("floor", str(grown))


# ---- its directories


def test_what_was_stopped_goes_on_and_what_is_finished_stays(tmp_path) -> None:
    where = tmp_path / "lab"
    first = common.Output(where, {"experiment": "kv", "seed": 1}, "acorn lab kv a")
    first.row(cache="full")
    with pytest.raises(UserError, match="left unfinished, with another seed; choose another"):
        common.Output(where, {"experiment": "kv", "seed": 2}, "acorn lab kv b")
    again = common.Output(where, {"experiment": "kv", "seed": 1}, "acorn lab kv a")
    again.row(cache="full", bits=3)
    again.finish()
    begun, row = map(json.loads, (where / "results.jsonl").read_text(encoding="utf-8").splitlines())
    assert (begun["seed"], begun["command"], row) == (1, "acorn lab kv a", {"cache": "full", "bits": 3})
    with pytest.raises(UserError, match="holds the results of an experiment"):
        common.Output(where, {"experiment": "kv", "seed": 1}, "acorn lab kv a")


def test_a_run_is_grown_once_and_a_stopped_one_to_its_end(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    out = common.Output(tmp_path / "lab", {"experiment": "x"}, "acorn lab x")
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "block_size": 16}
    steps = {"max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 2, "tokens_per_step": "none"}

    def grow():
        sections = {"model": shape, "training": steps | {"bf16": False}, "data": {"text_files": ["text.txt"]}}
        return common.grow(out, "tiny", "shakespeare-char-cpu", **sections, sample={"max_new_tokens": 0})

    run = grow()
    assert run == tmp_path / "lab" / "runs" / "tiny"
    weights = (run / "model.safetensors").read_bytes()
    assert grow() == run
    (run / "README.md").unlink()  # as a run that was stopped between its last checkpoint and its end
    for path in (run / "checkpoint-2").iterdir():
        path.unlink()
    (run / "checkpoint-2").rmdir()
    grow()
    assert (run / "model.safetensors").read_bytes() == weights
    assert capsys.readouterr().out == ""  # stdout is for the table


def test_a_table_keeps_words_left_and_figures_right(capsys, tmp_path) -> None:
    out = common.Output(tmp_path / "lab", {}, "")
    out.table([{"cache": "full", "bits": 1234.0}, {"cache": "a longer one"}], {"cache": "", "bits": ",.0f"})
    assert capsys.readouterr().out.splitlines() == ["cache          bits", "full          1,234", "a longer one"]


# ---- kv


def test_kv_from_end_to_end(asked, tmp_path, capsys) -> None:
    begun, *rows = asked("kv", "--caches", "int8", "window", "window+int4", "random", "--budgets", "0.5", "0.25")
    by_name = {row["cache"]: row for row in rows}
    assert list(by_name) == ["full", "window 0.5", "window 0.25", "int8", "window+int4 0.5", "window+int4 0.25",
                             "random 0.5", "random 0.25"]  # fmt: skip
    assert (begun["experiment"], begun["seed"], begun["smoke"]) == ("kv", 1337, True)
    full, int8, half = by_name["full"], by_name["int8"], by_name["window 0.5"]
    assert (full["lost_percent"], full["low"], full["high"], full["smaller"]) == (0, 0, 0, 1)
    assert 1.6 < int8["smaller"] < 2
    assert abs(int8["lost_percent"]) < 0.5
    assert half["truncation"] == half["lost_percent"]  # it is on the line
    assert by_name["window+int4 0.25"]["truncation"] is None  # left of its end
    assert half["bits"] < by_name["window+int4 0.5"]["bits"] * 4
    assert all(row["low"] <= row["lost_percent"] <= row["high"] for row in rows)
    assert full["targets"] == 8 * 16
    with Image.open(tmp_path / "lab" / "kv.png") as picture:
        assert picture.size[0] > 1000
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in by_name)
    assert "Type next: acorn generate run --cache int8" in printed


def test_kv_sets_another_model_beside_them(asked, grown) -> None:
    _, *rows = asked("kv", "--caches", "int8", "--smaller", str(grown))
    assert rows[-1]["cache"] == str(grown)
    assert rows[-1]["lost_percent"] == pytest.approx(0, abs=0.05)  # itself, but for the baseline's 16 bits
    assert rows[-1]["smaller"] == pytest.approx(1, abs=0.01)


def test_between_points_a_line_is_straight_over_the_logarithm_of_the_bits() -> None:
    points = [(100.0, 8.0), (400.0, 2.0), (1600.0, 0.0)]
    assert kv.height_at(points, 50) is None
    assert kv.height_at(points, 100) == 8
    assert kv.height_at(points, 200) == pytest.approx(5)
    assert kv.height_at(points, 800) == pytest.approx(1)
    assert kv.height_at(points, 9999) == 0


# ---- floor


def test_floor_from_end_to_end(asked, tmp_path, capsys) -> None:
    _, *rows = asked("floor")
    positions = [row for row in rows if "after_tokens" in row]
    held = {row["held"]: row for row in rows if "held" in row}
    assert [row["after_tokens"] for row in positions] == [1, 2, 4, 8, 16]
    whole, without_first = held["keys and values, at 16 bits"], held["without the first layer's"]
    assert whole["bits"] / 2 < without_first["bits"] < 0.55 * whole["bits"]  # of two layers one, and ids of a byte
    assert abs(without_first["lost_percent"]) < 0.01
    assert abs(held["tokens, all read again"]["lost_percent"]) < 0.01
    assert held["tokens, all read again"]["bits"] == 16 * 9  # 257 entries of the byte tokenizer
    assert held["nothing"]["lost_percent"] > 0
    worth = held["what the past is worth"]
    total = sum((row["cold_loss"] - row["warm_loss"]) * n for row, n in zip(positions, (1, 1, 2, 4, 8), strict=True))
    assert worth["bits"] == pytest.approx(total / math.log(2), rel=1e-3)
    assert worth["low"] < worth["bits"] < worth["high"]
    assert (tmp_path / "lab" / "floor.png").is_file()
    assert "what the past is worth" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["modern", "grouped_query"])
def test_a_looked_up_layer_is_exact(variant: str) -> None:
    shape = VARIANTS[variant] | {"position_encoding": "rope"}
    model = random_model(tiny_config(**shape))
    ids = torch.randint(61, (8 * 16 + 1,), generator=torch.Generator().manual_seed(3))
    streams = cut_streams(ids, 16, 8, 1.0)
    plain = decode(model, streams.ids, streams.first, own_cache, 4)
    with looking_up(model) as new_cache:
        looked_up = decode(model, streams.ids, streams.first, new_cache, 4)
        assert new_cache().layers[0].store.table[0].shape[1] == model.config.vocab_size
    torch.testing.assert_close(looked_up.nats, plain.nats, atol=1e-5, rtol=1e-5)
    hooks = model.get_input_embeddings()._forward_pre_hooks
    assert not hooks


def test_positions_that_are_added_leave_nothing_to_look_up() -> None:
    model = random_model(tiny_config(position_encoding="learned"))
    with pytest.raises(UserError, match="position_encoding=learned"), looking_up(model):
        pass
