"""The two sides that benchmarks set beside each other on Tiny Shakespeare, as whole processes: nanoGPT, and Acorn."""

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from training.share.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[1]
CPU = "--device=cpu --compile=False"
SMALL = "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
BIG = "--block_size=256 --batch_size=16 --n_layer=6 --n_head=6 --n_embd=384 --dropout=0.2"
# nanoGPT's own CPU recipe, 2,000 steps
WHOLE = f"{SMALL} --max_iters=2000 --lr_decay_iters=2000 --eval_iters=20 --log_interval=100"


class NanoGPT:
    """A private copy of nanoGPT with the character data prepared."""

    def __init__(self, source: Path, text: Path, workspace: Path):
        self.directory = workspace / "nanoGPT"
        shutil.copytree(source, self.directory, ignore=shutil.ignore_patterns(".git", "out*"))
        self.data = self.directory / "data" / "shakespeare_char"
        shutil.copyfile(text, self.data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=self.data, check=True, capture_output=True)

    def train(self, flags: str, seed: int = 1337) -> tuple[str, float]:
        """What train.py printed, and the seconds of its whole process; its own seed stands in the code as 1337."""
        script = self.directory / f"train-{seed}.py"
        script.write_text((self.directory / "train.py").read_text().replace("manual_seed(1337", f"manual_seed({seed}"))
        command = [sys.executable, script.name, "config/train_shakespeare_char.py", *CPU.split(), *flags.split()]
        return run(command, self.directory)

    def tokens_per_second(self, flags: str, tokens: int, iterations: int) -> float:
        """Over the second half of a short run's iterations, as our own side is measured."""
        log, _ = self.train(f"{flags} --max_iters={iterations} --eval_iters=1 --eval_interval=100000 --log_interval=1")
        times = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", log)]
        return tokens / statistics.mean(times[len(times) // 2 :]) * 1000

    def validation_loss(self) -> float:
        """The loss of its saved checkpoint on the whole validation split."""
        code = (
            "import sys, torch; sys.path.insert(0, '.'); from model import GPT, GPTConfig; "
            "c = torch.load('out-shakespeare-char/ckpt.pt', map_location='cpu', weights_only=True); "
            "m = GPT(GPTConfig(**c['model_args'])); m.load_state_dict(c['model']); torch.save(m.eval(), sys.argv[1])"
        )
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            run([sys.executable, "-c", code, file.name], self.directory)
            sys.path.insert(0, str(self.directory))
            model = torch.load(file.name, weights_only=False)  # written by ourselves, a line above
        tokens = np.fromfile(self.data / "val.bin", dtype=np.uint16).astype(np.int64)
        size, total = model.config.block_size, 0.0
        for start in range(0, len(tokens) - 1, size):
            window = torch.from_numpy(tokens[start : start + size + 1])[None]
            with torch.no_grad():
                total += model(window[:, :-1], window[:, 1:].contiguous())[1].item() * (window.shape[1] - 1)
        return total / (len(tokens) - 1)


class Acorn:
    """Our side: whole processes of `acorn pretrain`, of the code beside this file, in a workspace of their own."""

    def __init__(self, text: Path, workspace: Path):
        self.text, self.workspace, self.runs = text, workspace, 0

    def prepare(self, recipe: str) -> None:
        """Write the recipe's characters as tokens, which its runs then find."""
        command = [sys.executable, str(ROOT / "acorn.py"), "prepare", recipe, "--text_files", str(self.text)]
        run(command, self.workspace)

    def pretrain(self, recipe: str, flags: str = "", kept: Path | None = None) -> tuple[list[dict], float]:
        """The lines of metrics.jsonl, and the seconds of the whole process.

        kept: the run directory, which stays; else it is removed.
        """
        self.runs += 1
        output = kept or self.workspace / f"run-{self.runs}"
        command = [sys.executable, str(ROOT / "acorn.py"), "pretrain", recipe, "--text_files", str(self.text)]
        _, seconds = run([*command, "--output_dir", str(output), *flags.split()], self.workspace)
        rows = read_metrics(output)
        if kept is None:
            shutil.rmtree(output)
        return rows, seconds

    def tokens_per_second(self, recipe: str, steps: int, flags: str = "") -> float:
        """Training tokens/s over the second half of a short run: the first warms up."""
        rows, _ = self.pretrain(recipe, f"--max_steps {steps} --eval_steps {steps // 2} --max_new_tokens 0 {flags}")
        return rows[-1]["tokens_per_second"]


def run(command: list[str], directory: Path) -> tuple[str, float]:
    """Standard output and wall seconds of a process; its own error output ends this one."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout, time.perf_counter() - start


def alternate(rounds: int, *contenders) -> list[list[float]]:
    """Each contender once a round, in turn; one list of figures a contender."""
    bar = tqdm(range(rounds), unit="round", leave=False, file=sys.stderr, disable=None)  # on a terminal alone
    figures = [[contender() for contender in contenders] for _ in bar]
    return [list(column) for column in zip(*figures, strict=True)]


def setting() -> dict:
    """Where figures were measured, and with what."""
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def processor() -> str:
    """Its name, as Linux tells it."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
