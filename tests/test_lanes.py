"""Rows in lanes, and runs that carry a memory along them: accumulated, on two processes, killed, evaluated, refused."""

import functools
import json
import math
import shutil
from shlex import split as words

import numpy as np
import pytest
import torch

import acorn
from finetune.arguments import load_finetune_recipe
from inference import generate
from inference.experiments import xl
from inference.measuring.kv_report import cut_streams, decode
from modeling import GPTForCausalLM
from modeling.segment_memory import SegmentMemory
from training import prepare, pretrain, resume
from training.data.dataset import EvaluationRows, TokenArray, collate_rows
from training.loop.evaluation import evaluate_rows
from training.loop.lanes import HeldOutLanes, LaneRows
from training.model.loading import load_model_and_tokenizer
from training.system.errors import UserError

from .test_resume import back_to
from .tiny_runs import CONTEXT, go_on, grow, metrics, refused, rows, same_weights, tiny_argv, weights, write_text
from .two_processes import as_launched
from .variants import random_model, tiny_config

MEMORY = words(
    "--position_encoding rope --memory_length 24 --sampling lanes --memory_reset_probability 0.2 --dropout 0"
)
MEMORY += ["--use_cpu", "true"]


def numbers(length: int) -> TokenArray:
    """The tokens 0, 1, 2, …"""
    return TokenArray(np.arange(length))


def lanes_of(rows: LaneRows, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(first tokens, begins) of each lane's rows: (steps, lanes) each."""
    batch = collate_rows(rows.__getitems__(range(steps * rows.lanes)))
    assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)
    shape = steps, rows.lanes
    return batch["input_ids"][:, 0].numpy().reshape(shape), batch["begins"].numpy().reshape(shape)


# ---- rows


def test_a_lanes_rows_follow_each_other_and_begin_anew_past_the_end() -> None:
    text, context, lanes, steps = 203, 8, 3, 60
    starts, begins = lanes_of(LaneRows(numbers(text), context, 5, steps * lanes, lanes), steps)
    goes_on = np.diff(starts, axis=0) == context
    assert (goes_on == (begins[1:] == 0)).all()
    assert begins[0].all()
    assert 4 <= begins[1:].sum() <= 8  # once a pass of each lane, of which there are two and a half
    assert len(set(starts[0])) == lanes
    assert set(starts.flatten()) > set(range(0, 195, 65))  # where a pass begins moves from one to the next


def test_resets_are_drawn_by_lane_and_step() -> None:
    rows = LaneRows(numbers(100_000), 8, 1, 10**9, lanes=4, reset_probability=0.25)
    starts, begins = lanes_of(rows, 400)
    assert abs(begins[1:].mean(0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 400)
    assert np.corrcoef(begins[1:].T)[0, 1] < 0.2
    assert (np.diff(starts, axis=0) == 8).all()  # the text goes on: it is the memory that is emptied
    assert (rows[1234]["begins"], rows[1234]["input_ids"][0]) == (begins[308, 2], starts[308, 2])
    calm = LaneRows(numbers(100_000), 8, 1, 10**9, lanes=4)
    assert lanes_of(calm, 400)[1].sum() == 4
    assert (lanes_of(LaneRows(numbers(100_000), 8, 2, 10**9, 4), 400)[0] != starts).all()


def test_a_text_that_is_too_short_for_its_lanes_is_refused() -> None:
    LaneRows(numbers(40), 8, 1, 1, lanes=4)
    with pytest.raises(UserError, match="4 lanes of 8 tokens at a time need a text of 40, and it has 39; lower tokens"):
        LaneRows(numbers(39), 8, 1, 1, lanes=4)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("length", "lanes", "warm_up"), [(2, 3, 1), (100, 3, 0), (100, 2, 3), (257, 4, 2), (90, 9, 99)]
)
def test_held_out_lanes_count_each_token_once(length: int, lanes: int, warm_up: int, processes: int) -> None:
    counted, sizes = [], set()
    for process in range(processes):
        rows = HeldOutLanes(EvaluationRows(numbers(length), 8), lanes, warm_up, process, processes)
        batch = collate_rows(rows.__getitems__(range(len(rows))))
        sizes.add(len(rows))
        counted += batch["shift_labels"][batch["shift_labels"] != -100].tolist()
        starts = batch["input_ids"][:, 0].reshape(-1, rows.lanes)
        assert ((starts.diff(dim=0) == 8) | (starts[1:] == 0) | (starts.diff(dim=0) == 0)).all()
        begins = batch["begins"].reshape(-1, rows.lanes) == 1
        assert (starts[begins] == 0).all() and (process or begins[0, 0])
    assert sorted(counted) == list(range(1, length))
    assert len(sizes) == 1  # so that all processes go through the same number of forwards


# ---- evaluation


@torch.no_grad()
def one_lane(model: GPTForCausalLM, ids: torch.Tensor, memory_length: int) -> float:
    """Nats a token of a text that is read from its beginning to its end, segment by segment."""
    memory, segment = SegmentMemory(model.config, memory_length), model.config.max_position_embeddings
    logits = torch.cat([model(piece[None], past_key_values=memory).logits[0] for piece in ids[:-1].split(segment)])
    return torch.nn.functional.cross_entropy(logits, ids[1:]).item()


@pytest.mark.parametrize(("memory_length", "lanes"), [(5, 1), (5, 4), (8, 3), (20, 2), (400, 3), (10**9, 2)])
def test_a_text_is_evaluated_as_if_it_were_read_from_its_beginning(memory_length: int, lanes: int) -> None:
    model = random_model(tiny_config(position_encoding="rope", max_position_embeddings=8))
    ids = torch.randint(61, (333,), generator=torch.Generator().manual_seed(3))
    held_out = EvaluationRows(TokenArray(ids.numpy()), 8)
    found = evaluate_rows(model, held_out, 333, lanes, memory_length=memory_length)["loss"]
    assert found == pytest.approx(one_lane(model, ids, memory_length), abs=1e-5)
    assert abs(found - evaluate_rows(model, held_out, 333, lanes)["loss"]) > 1e-3


# ---- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs lie, side by side."""
    return tmp_path_factory.mktemp("lanes")


@pytest.fixture(scope="module")
def grown(folder):
    """A run of 8 steps of four lanes; its memory is longer than its segments."""
    return grow(folder, *MEMORY, "--save_total_limit", "9", name="grown")


@pytest.fixture(scope="module")
def plain(folder):
    """The same without a memory."""
    return grow(folder, *MEMORY, "--memory_length", "0", "--memory_reset_probability", "0", name="plain")


def test_memory_changes_what_is_learned_and_measured(grown, plain) -> None:
    assert weights(plain).keys() == weights(grown).keys()
    assert metrics(plain)[-1]["eval_loss"] != metrics(grown)[-1]["eval_loss"]
    assert not (plain / "checkpoint-8" / "memory.pt").exists()
    held = torch.load(grown / "checkpoint-8" / "memory.pt")
    assert held["keys.0"].shape == (4, 2, 24, 16)
    assert held["known"].shape == (4,) and held["known"].max() <= 24 + CONTEXT


def test_training_and_evaluation_have_memories_of_their_own(folder, grown) -> None:
    """Trained without and evaluated with one, on any rows; and the other way round."""
    flags = [*MEMORY, "--memory_reset_probability", "0", "--train_memory_length"]
    cold = grow(folder, *flags, "0", "--sampling", "shuffled", "--max_steps", "4", name="cold")
    assert json.loads((cold / "config.json").read_text())["memory_length"] == 24
    assert not (cold / "checkpoint-4" / "memory.pt").exists()
    warm = grow(folder, *flags, "8", "--memory_length", "0", "--max_steps", "4", name="warm")
    assert torch.load(warm / "checkpoint-4" / "memory.pt")["keys.1"].shape[2] == 8
    assert json.loads((warm / "config.json").read_text())["memory_length"] == 0


def close(run, other, step: int = 8) -> bool:
    ours, theirs = (weights(path / f"checkpoint-{step}") for path in (run, other))
    return max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-5


def test_accumulated_lanes_are_the_same_lanes(folder, grown) -> None:
    flags = ["--per_device_train_batch_size", "1", "--tokens_per_step", "64"]
    run = grow(folder, *MEMORY, *flags, name="accumulated")
    assert close(run, grown)
    ours, theirs = (torch.load(path / "checkpoint-8" / "memory.pt") for path in (run, grown))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_killed_and_gone_on_with_it_is_the_same_to_the_bit(grown) -> None:
    copy = grown.with_name("copy")
    shutil.copytree(grown, copy)
    back_to(copy, 4)
    go_on(copy)
    assert rows(copy) == rows(grown)
    assert same_weights(copy / "checkpoint-8", grown / "checkpoint-8")
    ours, theirs = (torch.load(path / "checkpoint-8" / "memory.pt") for path in (copy, grown))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_share_the_lanes_and_go_on_from_one(folder, grown) -> None:
    argv = tiny_argv(*MEMORY, "--per_device_train_batch_size", "1", "--tokens_per_step", "64")
    argv[argv.index("run")] = "two"
    as_launched(2, None, folder, pretrain.main, argv)
    assert close(folder / "two", grown)
    assert metrics(folder / "two")[-1]["eval_loss"] == pytest.approx(metrics(grown)[-1]["eval_loss"], abs=1e-5)
    ours, theirs = (torch.load(path / "checkpoint-8" / "memory.pt") for path in (folder / "two", grown))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    shutil.copytree(grown, folder / "one-then-two")
    back_to(folder / "one-then-two", 4)
    as_launched(2, None, folder, resume.main, ["one-then-two"])
    assert close(folder / "one-then-two", grown)


def test_evaluate_takes_another_memory(grown, monkeypatch, capsys) -> None:
    monkeypatch.chdir(grown.parent)
    losses = {}
    for length in ("0", "24", None):
        acorn.call_verb(["evaluate", "grown", *(["--memory_length", length] if length else [])])
        losses[length] = json.loads(capsys.readouterr().out)["loss"]
    assert losses[None] == losses["24"] == pytest.approx(metrics(grown)[-1]["eval_loss"], abs=1e-6)
    assert losses["0"] != losses["24"]


def test_the_log_probabilities_are_those_of_the_memory(grown, monkeypatch, capsys) -> None:
    monkeypatch.chdir(grown.parent)
    acorn.call_verb(words("generate grown --prompt the --max_new_tokens 50 --json --logprobs --temperature 0"))
    line = json.loads(capsys.readouterr().out)
    assert len(line["tokens"]) == 50
    model, tokenizer = load_model_and_tokenizer("grown")
    ids = torch.tensor([tokenizer("the")["input_ids"] + line["tokens"]])
    with torch.no_grad():
        memory = SegmentMemory(model.config)
        logits = torch.cat([model(piece, past_key_values=memory).logits for piece in ids.split(CONTEXT, dim=1)], dim=1)
    best = logits[0, 2:-1].log_softmax(-1).max(-1)
    assert best.indices.tolist() == line["tokens"]
    assert line["logprobs"] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_drafts_past_the_context_are_refused(grown, monkeypatch) -> None:
    monkeypatch.chdir(grown.parent)
    flags = words("generate grown --prompt the --prompt_lookup_num_tokens 3 --temperature 0 --max_new_tokens")
    assert "drafts: not past the context of a model with a memory" in refused(generate.main, *flags[1:], "50")


def test_prepare_shows_the_lanes(folder, grown, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    argv = ["shakespeare-char-cpu", *words("--text_files text.txt --block_size 16 --tokens_per_step 64")]
    argv += ["--per_device_train_batch_size", "4"]
    prepare.main([*argv, "--sampling", "lanes", "--preview"])
    shown = capsys.readouterr().out
    assert "4 lanes" in shown and "lane 0" in shown
    prepare.main([*argv, "--sampling", "shuffled", "--preview"])
    assert "lane" not in capsys.readouterr().out


# ---- acorn lab xl


def test_the_experiment_measures_each_memory(folder, grown, plain, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    acorn.call_verb(words("lab xl grown --plain plain --length 64 --output_dir lab"))
    shown = capsys.readouterr().out
    assert "9 streams of 64 tokens" in shown and "Bits per byte" in shown
    asked, *found = [json.loads(line) for line in (folder / "lab" / "results.jsonl").read_text().splitlines()]
    assert asked["experiment"] == "xl"
    assert [row["memory"] for row in found] == [0, 12, 24, 48, 96] * 2
    assert all(row["low"] <= row["bits_per_byte"] <= row["high"] for row in found)
    assert found[2]["change"] == pytest.approx(found[2]["bits_per_byte"] - found[1]["bits_per_byte"], abs=1e-9)
    assert (folder / "lab" / "xl.png").read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
def test_it_reads_as_decoding_does() -> None:
    model = random_model(tiny_config(position_encoding="rope", max_position_embeddings=8))
    ids = torch.randint(61, (400,), generator=torch.Generator().manual_seed(3))
    streams = cut_streams(ids, 44, 8, 1.0)
    for memory_length in (0, 5, 30):
        new_memory = functools.partial(SegmentMemory, model.config, memory_length)
        decoded = decode(model, streams.ids, streams.first, new_memory, 8).nats
        torch.testing.assert_close(xl.read(model, streams, memory_length), decoded, rtol=1e-4, atol=1e-4)


def test_what_was_trained_without_a_memory_is_refused(plain, monkeypatch) -> None:
    monkeypatch.chdir(plain.parent)
    assert "plain: was trained without a memory" in refused(acorn.call_verb, *words("lab xl plain --output_dir none"))


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--sampling random", "memory_length=24: rows of sampling='random' do not go on"),
        ("--sampling shuffled --train_memory_length 8", "train_memory_length=8: rows of sampling='shuffled'"),
        ("--streaming true --sampling random --tokenizer byte", "memory_length=24: a stream's rows do not go on"),
        ("--streaming true --tokenizer byte", "sampling='lanes': a stream is read in one order"),
        ("--position_encoding learned", "memory_length=24: position_encoding='learned'"),
        (
            "--position_encoding learned --memory_length 0 --train_memory_length 8",
            "train_memory_length=8: position_encoding",
        ),
        ("--activation_checkpointing true", "memory_length=24: activation_checkpointing"),
        ("--torch_compile true", "memory_length=24: torch_compile"),
        ("--memory_length 0", "memory_reset_probability=0.2: has no effect without memory_length"),
        ("--memory_length -3", "memory_length=-3: must be a whole number from 0"),
        ("--memory_length 2.5", "memory_length"),
        ("--memory_reset_probability 1", "memory_reset_probability=1.0: must be at least 0 and below 1"),
        ("--tokens_per_step 16000 --per_device_train_batch_size 1000", "1000 lanes of 16 tokens"),
        ("--sampling lane", "did you mean 'lanes'"),
    ],
)
def test_what_does_not_go_with_a_memory(flags: str, named: str, folder, monkeypatch) -> None:
    write_text(folder)
    monkeypatch.chdir(folder)
    assert named in refused(pretrain.main, *tiny_argv(*MEMORY, *words(flags), name="refused"))
    assert not (folder / "refused").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--tokens_per_step 128", "tokens_per_step"),
        ("--block_size 32", "max_position_embeddings"),
        ("--memory_length 8", "memory_length"),
        ("--train_memory_length 8", "train_memory_length"),
    ],
)
def test_lanes_cannot_change_on_the_way(flags: str, named: str, grown, monkeypatch) -> None:
    monkeypatch.chdir(grown.parent)
    message = refused(resume.main, "grown", "--max_steps", "12", *words(flags))
    assert f"--{named} cannot change in a run that has begun" in message


def test_a_checkpoint_without_its_memory_is_refused(grown, monkeypatch) -> None:
    copy = grown.with_name("without")
    shutil.copytree(grown, copy)
    (copy / "checkpoint-8" / "memory.pt").unlink()
    monkeypatch.chdir(grown.parent)
    message = refused(resume.main, "without", "--max_steps", "12", "--checkpoint", "checkpoint-8")
    assert "memory.pt is missing" in message


def test_finetuning_has_none() -> None:
    for flags in ("--sampling lanes", "--train_memory_length 8"):
        with pytest.raises(UserError, match="without a memory"):
            load_finetune_recipe(["gpt2", *words(flags)]).check()
