"""The launch table: one process, DDP and FSDP2 with whole and with sharded states do the same, each after any other.

Each launch trains, evaluates (batches that do not come out even), samples, saves, is killed, is gone on with by every
launch, and leaves directories that load without Acorn. FSDP runs through the real Trainer; that it runs on CPUs is the
tests' doing (two_processes.fsdp_on_cpus).
"""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import acorn
from training.loop import evaluation
from training.loop.callbacks import ConsoleTable

from .test_hub_copy import run_without_acorn
from .tiny_bases import TINY, our_model, save
from .tiny_runs import checkpoints, latest, metrics, same_weights, tiny_argv, write_text
from .two_processes import as_launched

LAUNCHES = {
    "one": (1, None),
    "ddp": (2, None),
    "fsdp-full": (2, "FULL_STATE_DICT"),
    "fsdp-sharded": (2, "SHARDED_STATE_DICT"),
}
# Five batches validate, the last one smaller: of two processes one has three and the other two.
STEPS, SAVED, KILLED = 8, 4, 6
FLAGS = ["--tokens_per_step", "64", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "9"]
FLAGS += ["--use_cpu", "true", "--sample_during_training", "true", "--save_total_limit", "9", "--temperature", "0"]
# What else a step changes, all of it at once: it is kept, shared out and gone on with as the weights are.
CHANGING = "--muon_momentum_warmup_steps 3 --average_decay 0.8 --average_start 1 --num_nextn_predict_layers 1".split()


def pretrained(optimizer: str, name: str) -> list[str]:
    more = CHANGING if optimizer != "adamw" else []
    return ["pretrain", *tiny_argv(*FLAGS, "--optimizer", optimizer, *more, name=name)]


def finetuned(adapter: str, name: str) -> list[str]:
    flags = ["--text_files", "text.txt", "--data_dir", "tokens", *TINY, *FLAGS, "--tokens_per_step", "160"]
    flags += ["--max_steps", str(STEPS), "--eval_steps", "4"]
    return ["finetune", "base", *latest(*flags, "--adapter", adapter, "--output_dir", name)]


KINDS = {"adamw": pretrained, "normuon": pretrained, "full": finetuned, "lora": finetuned}


def train(kind: str, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:  # as for a large vocabulary: the head runs apart, chunk by chunk
        patch.setattr(evaluation, "CHUNK_ELEMENTS", 8 * 1000)
        acorn.main(KINDS[kind](kind, name))


def train_until_killed(kind: str, name: str) -> None:
    """As by `kill -9`, in every process, between a checkpoint and the next."""
    on_step_end = ConsoleTable.on_step_end

    def die(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    ConsoleTable.on_step_end = die
    train(kind, name)


def go_on(name: str) -> None:
    acorn.main(["resume", name])


class Table:
    """Runs of a kind by launch, each made once: `whole` ones, and those that were killed and gone on with."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        write_text(folder)
        if KINDS[kind] is finetuned:
            save(our_model(), folder / "base")

    def launched(self, launch: str, function, *args) -> None:
        if launch == "one" and function is not train_until_killed:
            with contextlib.chdir(self.folder):
                return function(*args)
        as_launched(*LAUNCHES[launch], self.folder, function, *args)

    def whole(self, launch: str) -> Path:
        run_dir = self.folder / f"{launch}-whole"
        if not run_dir.exists():
            self.launched(launch, train, self.kind, run_dir.name)
        return run_dir

    def killed(self, launch: str) -> Path:
        run_dir = self.folder / f"{launch}-killed"
        if not run_dir.exists():
            with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
                self.launched(launch, train_until_killed, self.kind, run_dir.name)
        return run_dir

    def resumed(self, before: str, after: str) -> Path:
        run_dir = self.folder / f"{before}-then-{after}"
        if not run_dir.exists():
            shutil.copytree(self.killed(before), run_dir)
            self.launched(after, go_on, run_dir.name)
        return run_dir


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    return Table(tmp_path_factory.mktemp("adamw"), "adamw")


@pytest.fixture(scope="module")
def muon(tmp_path_factory) -> Table:
    return Table(tmp_path_factory.mktemp("normuon"), "normuon")


@pytest.fixture(scope="module", params=["full", "lora"])
def tuned(request, tmp_path_factory) -> Table:
    return Table(tmp_path_factory.mktemp(request.param), request.param)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    """The tensors at the root: a model's or an adapter's."""
    (file,) = run_dir.glob("*model.safetensors")
    return load_file(file)


def assert_the_same_run(one: Path, other: Path, tolerance: float) -> None:
    """The same losses, weights and sample, but for the order in which numbers were added up."""
    assert [row["step"] for row in metrics(one) if row["step"]] == [SAVED, STEPS]
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a["step"] == b["step"]
        for key in ("train_loss", "eval_loss", "token_accuracy", "learning_rate", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=tolerance), key
    first, second = weights_of(one), weights_of(other)
    assert len(first) > 10
    assert first.keys() == second.keys()
    # A bias of the keys moves no softmax: its gradient is rounding alone, which Adam makes as large as any other.
    differences = {name: (first[name] - second[name]).abs().max() for name in first if not name.endswith("k_proj.bias")}
    assert max(differences.values()) <= 10 * tolerance, differences
    assert (one / "sample.txt").read_text() == (other / "sample.txt").read_text()


def test_shards_of_two_processes_go_on_in_one(muon) -> None:
    """The core of the table: a sharded run that was killed, its files, and one process that goes on with them."""
    killed = muon.killed("fsdp-sharded")
    assert checkpoints(killed) == [SAVED]
    checkpoint = killed / "checkpoint-4"
    assert len(list((checkpoint / "optimizer-shards").glob("*.distcp"))) == 2, "each process writes its own part"
    for folder in (killed, checkpoint):
        assert {"modeling_gpt.py", "attention.py"} <= {path.name for path in folder.glob("*.py")}
        assert not list(folder.glob("_fsdp*.py")), "torch's code instead of ours"
        assert "modeling_gpt.GPTForCausalLM" in (folder / "config.json").read_text(encoding="utf-8")
    assert_the_same_run(muon.whole("one"), muon.resumed("fsdp-sharded", "one"), tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [launch for launch in LAUNCHES if launch != "one"])
def test_every_launch_trains_as_one_process(table, launch) -> None:
    assert_the_same_run(table.whole("one"), table.whole(launch), tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("after", LAUNCHES)
@pytest.mark.parametrize("before", LAUNCHES)
def test_every_launch_goes_on_where_another_was_killed(table, before, after) -> None:
    run_dir = table.resumed(before, after)
    assert_the_same_run(table.whole("one"), run_dir, tolerance=1e-5)
    if before == after:
        assert same_weights(run_dir, table.whole(before)), "the same launch goes on bit for bit"


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_muon_goes_on_bit_for_bit(muon, launch) -> None:
    assert same_weights(muon.resumed(launch, launch), muon.whole(launch))


@pytest.mark.slow
@pytest.mark.parametrize("after", ["one", "ddp", "fsdp-sharded"])
@pytest.mark.parametrize("before", ["ddp", "fsdp-full", "fsdp-sharded"])
def test_finetuning_goes_on_where_another_launch_was_killed(tuned, before, after) -> None:
    assert_the_same_run(tuned.whole("one"), tuned.resumed(before, after), tolerance=1e-5)


LOAD = """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
loaded = []
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer("the ", return_tensors="pt"), max_new_tokens=4)
    loaded.append([type(model).__name__, model.num_parameters(), not any(report.values())])
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_every_directory_loads_without_acorn(table, tmp_path) -> None:
    runs = [table.whole(launch) for launch in LAUNCHES] + [table.killed(launch) for launch in LAUNCHES]
    folders = [*runs, *(path for run in runs for path in run.glob("checkpoint-*"))]
    assert len(folders) == 4 * 3 + 4 * 2
    assert run_without_acorn(LOAD, *folders, cwd=tmp_path) == [["GPTForCausalLM", 26208, True]] * len(folders)
