"""Does a run that was killed anywhere and resumed end as the run that was left alone? Prints one JSON line.

    python benchmarks/kill_resume.py --kills 20 --seed 0 [--processes 1 2] [--optimizer adamw] [--dropout 0.1]
    python benchmarks/kill_resume.py --kinds full lora dora chats prompt --processes 1 2     the same of finetuning

One run is left alone. Then so many runs are grown, killed by SIGKILL (each up to three times: at the start, anywhere,
while a checkpoint or the best model is written, or at the very end), resumed to the end, and held against the first one
bit by bit: weights, optimizer state, random state, every logged loss and every line of metrics.jsonl. After each kill
every checkpoint must be whole. The model is tiny, in fp32 on the CPU, with dropout (in finetuning the base's), within
accumulation cycles, and the text is passed through more than twice. Exit code 1 if any differs.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from training.data.tokenizers import build_tokenizer
from training.share.metrics_file import read_metrics
from training.system.checkpoints import is_finished, list_checkpoints
from training.system.errors import run_main
from training.system.run_files import damage

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore::UserWarning:multiprocessing.resource_tracker",  # a killed process frees no semaphores
}
# Saving, evaluating and logging at different steps, so that a kill falls between each two of them.
FLAGS = (
    "--block_size 32 --per_device_train_batch_size 2 --tokens_per_step 256 --eval_steps 6 --save_steps 4 "
    "--logging_steps 5 --warmup_steps 10 --learning_rate 1e-2 --bf16 false --use_cpu true --max_new_tokens 8"
)
PRETRAINING = "shakespeare-char-cpu --n_layer 2 --n_embd 32 --n_head 2 --sampling shuffled --text_files text.txt"
# what is killed: what follows the verb; all but the first are finetuned from a stock GPT-2 with dropout
KINDS = {
    "pretrain": PRETRAINING,
    "full": "base --text_files text.txt --adapter full",
    "lora": "base --text_files text.txt --adapter lora --r 4",
    "dora": "base --text_files text.txt --adapter dora --r 4 --lora_dropout 0.1",
    "chats": "base --text_files chat.txt --adapter lora --r 4 --packing false",
    "prompt": "base --text_files text.txt --adapter prompt --num_virtual_tokens 4",
}
RESUME = "training.resume"
MODULES = {"pretrain": "training.pretrain", "finetune": "finetune.finetune"}
PRELOADED = [*MODULES.values(), RESUME, "matplotlib.figure", "matplotlib.backends.backend_agg"]
TIMED = ("tokens_per_second", "mfu", "seconds")  # of a metrics row: the clock's, not the model's
LOGGED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")


# ---- starting and killing


class Forked:
    """`acorn VERB …` in processes forked from one that has imported everything, under torchrun's environment."""

    def __init__(self, workspace: Path, module: str, argv: list[str], processes: int, log: Path):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        several = {**shared, "LOCAL_WORLD_SIZE": str(processes)} if processes > 1 else {}
        fork = multiprocessing.get_context("forkserver")
        self.processes = []
        for rank in range(processes):
            environment = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if several else {}
            self.processes.append(fork.Process(target=work, args=(workspace, module, argv, environment, log)))
        for process in self.processes:
            process.start()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait()

    def wait(self) -> int:
        """The first exit code that is not 0, or 0."""
        for process in self.processes:
            process.join()
        return next((process.exitcode for process in self.processes if process.exitcode), 0)


def work(workspace: Path, module: str, argv: list[str], environment: dict[str, str], log: Path) -> None:
    """Become the process of a command."""
    os.chdir(workspace)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    run_main(importlib.import_module(module).main, argv)


class Commanded:
    """The same as a person starts it: `python -m …`, or torchrun for several processes."""

    def __init__(self, workspace: Path, module: str, argv: list[str], processes: int, log: Path):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), "-m", module, *argv]
        with open(log, "ab") as output:
            self.process = subprocess.Popen(command, cwd=workspace, stdout=output, stderr=output)

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        # torchrun gives its workers process groups of their own
        launcher = psutil.Process(self.process.pid)
        family = [launcher, *launcher.children(recursive=True)]
        for process in family:
            process.kill()
        self.wait()
        psutil.wait_procs(family)

    def wait(self) -> int:
        return self.process.wait()


LAUNCHERS = {"fork": Forked, "command": Commanded}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- when to kill: each waits for its moment, or until the processes have ended


class Moments:
    """The moments to kill at, in one run directory; `start` and `train` are the seconds of the run left alone."""

    def __init__(self, run_dir: Path, log: Path, attempt, chance: random.Random, timing: dict):
        self.run_dir, self.log, self.attempt, self.chance, self.timing = run_dir, log, attempt, chance, timing
        self.printed = log.stat().st_size if log.exists() else 0

    def at_the_start(self) -> None:
        time.sleep(self.chance.uniform(0, self.timing["start"]))

    def anywhere(self) -> None:
        self._until(lambda: has_begun(self.log, self.printed))
        time.sleep(self.chance.uniform(0, self.timing["train"]))

    def in_a_checkpoint(self) -> None:
        self._in_a_save(".saving-*", self.timing["steps"] // 4)

    def in_the_best_model(self) -> None:
        self._in_a_save(".saving", self.timing["steps"] // 6)

    def at_the_end(self) -> None:
        self._until(lambda: (self.run_dir / f"checkpoint-{self.timing['steps']}").exists())
        time.sleep(self.chance.uniform(0, self.timing["end"]))

    def _in_a_save(self, pattern: str, times: int) -> None:
        """Some way into one of the first saves, or later: as luck will have it."""
        for _ in range(self.chance.randint(1, max(1, times // 2))):
            self._until(lambda: not any(self.run_dir.glob(pattern)))
            self._until(lambda: any(self.run_dir.glob(pattern)))
        time.sleep(self.chance.uniform(0, 0.03))

    def _until(self, is_time) -> None:
        while not is_time() and self.attempt.is_alive():
            time.sleep(0.0005)


AIMS = {
    "at_the_start": Moments.at_the_start,
    "anywhere": Moments.anywhere,
    "in_a_checkpoint": Moments.in_a_checkpoint,
    "in_the_best_model": Moments.in_the_best_model,
    "at_the_end": Moments.at_the_end,
}


def has_begun(log: Path, after: int = 0) -> bool:
    """Whether the head of the table stands in the log."""
    return log.exists() and b"tok/s" in log.read_bytes()[after:]


# ---- the experiment


class Experiment:
    """Runs of one kind in one workspace, on so many processes."""

    def __init__(self, workspace: Path, processes: int, flags: argparse.Namespace, kind: str = "pretrain"):
        self.kind, self.workspace, self.processes, self.launcher = kind, workspace, processes, LAUNCHERS[flags.launcher]
        self.steps, self.chance = flags.steps, random.Random(f"{flags.seed} {processes}")
        self.argv = [*KINDS[kind].split(), *FLAGS.split(), "--max_steps", str(flags.steps)]
        self.modules = (MODULES["pretrain" if kind == "pretrain" else "finetune"], RESUME)
        workspace.mkdir(parents=True, exist_ok=True)
        (workspace / "text.txt").write_text(some_text(), encoding="utf-8")
        if kind == "pretrain":
            self.argv += ["--optimizer", flags.optimizer, "--dropout", str(flags.dropout)]
        else:
            make_base(workspace / "base", flags.dropout)
            (workspace / "chat.txt").write_text(some_chats(), encoding="utf-8")
        self.sigkills, self.half_written = Counter(), 0

    def start(self, name: str):
        """Grow the run, or go on with it where there is something to go on with."""
        begun = (self.workspace / name / "recipe.yaml").exists()
        argv = [name] if begun else [*self.argv, "--output_dir", name]
        return self.launcher(self.workspace, self.modules[begun], argv, self.processes, self.log(name))

    def log(self, name: str) -> Path:
        return self.workspace / f"{name}.log"

    def finish(self, name: str) -> None:
        """Start it once more and let it end."""
        self.expect_success(name, self.start(name).wait())

    def expect_success(self, name: str, code: int) -> None:
        if code:
            tail = self.log(name).read_text(encoding="utf-8", errors="replace")[-3000:]
            raise SystemExit(f"{name} ended with exit code {code}:\n{tail}")

    def leave_alone(self) -> dict:
        """Grow the run that the others are held against; its seconds aim the kills."""
        begin, marks = time.perf_counter(), {}
        attempt, last = self.start("unbroken"), self.workspace / "unbroken" / f"checkpoint-{self.steps}"
        for mark, is_there in {"start": lambda: has_begun(self.log("unbroken")), "train": last.exists}.items():
            while not is_there() and attempt.is_alive():
                time.sleep(0.001)
            marks[mark] = time.perf_counter() - begin
        self.expect_success("unbroken", attempt.wait())
        end = time.perf_counter() - begin - marks["train"]
        return {"start": marks["start"], "train": marks["train"] - marks["start"], "end": end, "steps": self.steps}

    def kill_some_times(self, name: str, timing: dict) -> list[str]:
        """Start, kill and start again, once to three times; returns where the kills were aimed."""
        killed = []
        for _ in range(self.chance.choice((1, 1, 2, 3))):
            aim = self.chance.choice(list(AIMS))
            attempt = self.start(name)
            AIMS[aim](Moments(self.workspace / name, self.log(name), attempt, self.chance, timing))
            if not attempt.is_alive():
                self.expect_success(name, attempt.wait())
                return killed
            attempt.kill()
            killed.append(aim)
            self.half_written += sum(damage(path) is not None for path in list_checkpoints(self.workspace / name))
            if is_finished(self.workspace / name):  # all that was left to do was to end
                return killed
        self.finish(name)
        return killed

    def trial(self, number: int, timing: dict) -> bool:
        """One run, killed at least once and resumed: does it end as the one that was left alone?"""
        name, killed = f"killed-{number}", []
        while not killed:  # a run may end before its moment has come
            shutil.rmtree(self.workspace / name, ignore_errors=True)
            killed = self.kill_some_times(name, timing)
        self.sigkills.update(killed)
        wrong = self.differences(name)
        said = f"differs in {wrong}" if wrong else "equal"
        print(
            f"{self.kind}, {self.processes} process(es), run {number}: killed {', '.join(killed)}: {said}",
            file=sys.stderr,
        )
        if not wrong:
            shutil.rmtree(self.workspace / name)
        return not wrong

    def differences(self, name: str) -> list[str]:
        """What of a finished run is not bit for bit that of the unbroken one."""
        ours, theirs = facts(self.workspace / name, self.steps), facts(self.workspace / "unbroken", self.steps)
        return [what for what in theirs if not same(ours[what], theirs[what])]


def facts(run_dir: Path, steps: int) -> dict:
    """All of a finished run that must not depend on how often it was killed."""
    last = run_dir / f"checkpoint-{steps}"
    state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
    return {
        "weights": weights_in(last),
        "best weights": weights_in(run_dir),
        "optimizer": torch.load(last / "optimizer.pt", weights_only=True),
        "random states": [torch.load(path, weights_only=False)["cpu"] for path in sorted(last.glob("rng_state*.pth"))],
        "losses": [{key: entry.get(key) for key in LOGGED} for entry in state["log_history"] if "loss" in entry],
        "metrics": [{key: value for key, value in row.items() if key not in TIMED} for row in read_metrics(run_dir)],
        "best step": state["best_global_step"],
    }


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    """A model's weights, or an adapter's."""
    return {name: weight for path in directory.glob("*.safetensors") for name, weight in load_file(path).items()}


def same(a, b) -> bool:
    """Whether two nests of dicts, lists, tensors and numbers are equal, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def some_text() -> str:
    """Some 12,000 characters: words in a fixed random order."""
    chance = random.Random(0)
    words = "the quick brown fox jumps over a lazy dog and how vexingly quick daft zebras jump\n".split(" ")
    return " ".join(chance.choice(words) for _ in range(2500))


def some_chats() -> str:
    """Sixty questions and answers of differing length."""
    words = some_text().split()
    turns = [(words[n : n + n % 5 + 2], words[n + 9 : n + 9 + n % 7 + 1]) for n in range(0, 600, 10)]
    return "\n\n".join(f"User: {' '.join(asked)}?\nAssistant: {' '.join(told)}." for asked, told in turns) + "\n"


def make_base(directory: Path, dropout: float) -> None:
    """A tiny random stock GPT-2 with a byte tokenizer."""
    torch.manual_seed(0)
    ends = {"eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}
    dropouts = {name: dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, **ends, **dropouts)
    GPT2LMHeadModel(config).save_pretrained(directory)
    build_tokenizer("byte").save_pretrained(directory)


def measure(kind: str, processes: int, flags: argparse.Namespace, workspace: Path) -> dict:
    """All the trials of a kind on so many processes."""
    experiment = Experiment(workspace / kind / str(processes), processes, flags, kind)
    timing = experiment.leave_alone()
    equal = sum(experiment.trial(number, timing) for number in range(1, flags.kills + 1))
    return {
        "kills": flags.kills, "equal": equal, "sigkills": sum(experiment.sigkills.values()),
        "aims": dict(experiment.sigkills), "half_written_checkpoints": experiment.half_written,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed, for each number of processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="how many: 1, 2, or both in turn (1 2)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["pretrain"], help="what is killed")
    parser.add_argument("--optimizer", default="muon", help="of pretraining; finetuning has adamw")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=120)
    launcher = "fork from a process that has imported all (quick), or start commands (torchrun for several processes)"
    parser.add_argument("--launcher", choices=LAUNCHERS, default="fork", help=launcher)
    parser.add_argument("--workspace", type=Path, help="keep the runs that differ here (default: a temporary folder)")
    flags = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    multiprocessing.set_forkserver_preload(PRELOADED)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_MODULES_CACHE"] = temporary
        workspace = (flags.workspace or Path(temporary)).absolute()
        results = {
            f"{kind}, {processes} process(es)": measure(kind, processes, flags, workspace)
            for kind in flags.kinds
            for processes in flags.processes
        }
    totals = {what: sum(result[what] for result in results.values()) for what in ("kills", "equal", "sigkills")}
    settings = {name: getattr(flags, name) for name in ("optimizer", "dropout", "steps", "seed", "launcher")}
    seconds = round(time.perf_counter() - begin, 1)
    line = {"benchmark": "kill_resume", **totals, **settings, "torch": torch.__version__, "seconds": seconds}
    print(json.dumps({**line, "by_kind": results}))
    sys.exit(totals["equal"] != totals["kills"])


if __name__ == "__main__":
    main()
