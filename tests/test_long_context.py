"""Past the trained context: losses of long streams, `acorn lab window` and `acorn lab extend`."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from inference import lab
from inference.experiments.long_text import position_sums, read_whole, reread

from .tiny_runs import CONTEXT, grow, refused
from .variants import random_model, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where runs `rope`, of 16 tokens of context, and `learned` lie."""
    folder = tmp_path_factory.mktemp("long")
    flags = ("--max_steps", "4", "--max_new_tokens", "0", "--validation_fraction", "0.3")
    grow(folder, *flags, "--position_encoding", "rope", name="rope")
    grow(folder, *flags, name="learned")
    return folder


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@torch.no_grad()
def test_streams_are_read_whole_or_reread_from_the_last_half() -> None:
    model = random_model(tiny_config(position_encoding="rope", max_position_embeddings=8))
    ids = torch.randint(61, (3, 25), generator=torch.Generator().manual_seed(0))
    whole, again = read_whole(model, ids), reread(model, ids, 8)
    assert whole.shape == again.shape == (2, 3, 24)
    logits = model(ids[:, :-1]).logits
    nats = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(whole[0], nats, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole[1].bool(), logits.argmax(-1) == ids[:, 1:])
    torch.testing.assert_close(again[:, :, :8], whole[:, :, :8], rtol=1e-4, atol=1e-4)
    window = model(ids[:, 4:12]).logits[:, 4:]  # the tokens after the first context, from a window that begins in it
    nats = cross_entropy(window.transpose(1, 2), ids[:, 9:13], reduction="none")
    torch.testing.assert_close(again[0, :, 8:12], nats, rtol=1e-4, atol=1e-4)
    sums = position_sums(whole)
    assert sums.shape == (3, 24)
    assert sums[2].unique().item() == 3


def test_window_measures_four_ways_and_writes_on(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    lab.main(["window", "rope", "--smoke", "--cache_sinks", "2", "--output_dir", "window"])
    rows = results(folder / "window")[1:]
    losses = {(row["way"], row["to_context"]): row["loss"] for row in rows if "loss" in row}
    ways = ("all of it", "window", "window and sinks", "read again")
    for way in ways:  # within the context all read the same
        assert losses[way, CONTEXT // 2] == pytest.approx(losses["all of it", CONTEXT // 2], abs=1e-4)
        assert losses[way, 4 * CONTEXT] > 0
    assert len({round(losses[way, 4 * CONTEXT], 6) for way in ways}) == 4
    samples = {row["way"]: row["sample"] for row in rows if "sample" in row}
    assert set(samples) == set(ways)
    assert min(len(sample) for sample in samples.values()) > 2 * CONTEXT
    assert (folder / "window/loss-by-position.png").read_bytes().startswith(b"\x89PNG")
    assert samples["window"] in (folder / "window/samples.txt").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "acorn generate rope --cache window --cache_budget 15 --cache_sinks 2" in printed


def test_extend_trains_on_and_says_how_many_steps_are_enough(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    asked = ["extend", "rope", "--ways", "yarn", "unchanged", "--output_dir", "extend", "--learning_rate", "3e-3"]
    lab.main([*asked, "--steps", "4", "2"])
    rows = results(folder / "extend")[1:]
    assert [(row["way"], row["steps"]) for row in rows] == [
        (way, steps) for way in ("yarn", "unchanged") for steps in (0, 2, 4)
    ]
    by_way = {(row["way"], row["steps"]): row for row in rows}
    assert by_way["yarn", 0]["far"] != by_way["unchanged", 0]["far"]
    for way in ("yarn", "unchanged"):
        assert by_way[way, 4]["over_last"] == 0
        assert by_way[way, 4]["far"] != by_way[way, 2]["far"]
        assert by_way[way, 4]["by_position"][-1]["to_context"] == 4 * CONTEXT
    printed = capsys.readouterr().out
    assert "steps" in printed
    assert {path.name for path in (folder / "extend").glob("*.png")} == {"loss-by-position.png", "steps.png"}
    config = json.loads((folder / "extend/runs/yarn/config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 4 * CONTEXT
    assert config["rope_parameters"]["original_max_position_embeddings"] == CONTEXT


REFUSED = {
    "window learned": "learned positions end with the context of 16",
    "window rope --factor 1": "factor=1: must be at least 2",
    "window rope --cache_window 4": "cache_window=4: must be above cache_sinks=4 and below the context, 16",
    "window rope --cache_window 16": "below the context, 16",
    "window rope --cache_sinks -1": "cache_sinks=-1",
    "window rope --factor 400": "give a longer text",
    "window rope --streams 2": "streams",
    "window rope --temperature -1": "temperature=-1.0: must be",
    "window none/at/all": "there is no such directory",
    "extend learned": "its positions are learned",
    "extend rope --factor 1": "is extended, never cut",
    "extend rope --factor -4": "is extended, never cut",
    "extend rope --factor 400": "give a longer text",
    "extend rope --ways yarm": "unknown way 'yarm': did you mean 'yarn'?",
    "extend rope --ways yarn yarn": "ways=yarn: is given twice",
    "extend rope --steps 0 10": "steps=0: must be at least 1",
    "extend rope --steps ten": "steps",
    "extend rope --learning_rate -1": "learning_rate=-1.0: must be",
    "extend rope --tokens_per_step 0": "tokens_per_step=0: must be",
    "extend none/at/all": "none/at/all does not exist",
    "extend rope/checkpoint-4": "is no run; name the run",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_shows_nothing_is_refused_in_one_line(line: str, folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    message = refused(lab.main, *line.split(), "--output_dir", "never")
    assert REFUSED[line] in message
