"""How fast and how good are the Tiny Shakespeare recipes, beside nanoGPT? Prints one JSON line.

    python benchmarks/shakespeare.py --text tinyshakespeare.txt [--nanogpt DIR] [--only PART …] [--rounds 3]

Parts: `cpu` is nanoGPT's CPU setting (training tokens/s in alternation, then our whole run's validation loss);
`cpu-seeds` is its loss after 2,000 steps with six seeds, on both sides;
`cpu-fast` and `fast` are our own recipes (loss, and wall time of the whole process); `fast-speed` is the training
tokens/s of the 10.7 M model at 16 x 256, in alternation. DIR is a checkout of karpathy/nanoGPT, which is copied, never
written to; without it our side alone runs. Losses are over the whole validation split in non-overlapping windows, for
both.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

CPU = "--device=cpu --compile=False"
SMALL = "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
BIG = "--block_size=256 --batch_size=16 --n_layer=6 --n_head=6 --n_embd=384 --dropout=0.2"


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
    """Our side: whole processes of `acorn pretrain` in a workspace of their own."""

    def __init__(self, text: Path, workspace: Path):
        self.text, self.workspace, self.runs = text, workspace, 0

    def pretrain(self, recipe: str, flags: str = "") -> tuple[list[dict], float]:
        """The lines of metrics.jsonl, and the seconds of the whole process."""
        self.runs += 1
        output = self.workspace / f"run-{self.runs}"
        command = [sys.executable, "-m", "training.pretrain", recipe, "--text_files", str(self.text)]
        _, seconds = run([*command, "--output_dir", str(output), *flags.split()], self.workspace)
        lines = (output / "metrics.jsonl").read_text().splitlines()
        shutil.rmtree(output)
        return [json.loads(line) for line in lines], seconds

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
    figures = [[contender() for contender in contenders] for _ in range(rounds)]
    return [list(column) for column in zip(*figures, strict=True)]


def speeds(
    acorn: Acorn, nanogpt: NanoGPT | None, rounds: int, recipe: str, steps: int, flags: str, tokens: int
) -> dict:
    """Median training tokens/s of both sides in alternation, and the ratio pair by pair."""
    contenders = [lambda: acorn.tokens_per_second(recipe, steps)]
    if nanogpt is not None:
        contenders.append(lambda: nanogpt.tokens_per_second(flags, tokens, steps))
    ours, *theirs = alternate(rounds, *contenders)
    figures = {"acorn_tokens_per_second": statistics.median(ours)}
    if theirs:
        ratios = [a / b for a, b in zip(ours, theirs[0], strict=True)]
        figures |= {"nanogpt_tokens_per_second": statistics.median(theirs[0]), "speed_ratio": statistics.median(ratios)}
    return figures


def measure_cpu(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """nanoGPT's CPU recipe: speed in alternation, then our whole run."""
    figures = speeds(acorn, nanogpt, rounds, "shakespeare-char-cpu", 300, SMALL, 12 * 64)
    rows, seconds = acorn.pretrain("shakespeare-char-cpu")
    return figures | {"acorn_loss": min(row["eval_loss"] for row in rows), "acorn_seconds": seconds}


def measure_cpu_seeds(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """Losses of the whole CPU recipe with six seeds, and of nanoGPT's own loop with the same; no times."""
    flags = f"{SMALL} --max_iters=2000 --lr_decay_iters=2000 --eval_iters=20 --log_interval=100"
    losses = {"acorn": [], "nanogpt": []}
    for seed in range(1337, 1343):
        rows, _ = acorn.pretrain("shakespeare-char-cpu", f"--seed {seed}")
        losses["acorn"].append(min(row["eval_loss"] for row in rows))
        if nanogpt is not None:
            nanogpt.train(flags, seed)
            losses["nanogpt"].append(nanogpt.validation_loss())
    figures = {f"{side}_losses": [round(loss, 4) for loss in found] for side, found in losses.items() if found}
    for side, found in losses.items():
        if found:
            figures |= {f"{side}_mean": statistics.mean(found), f"{side}_deviation": statistics.stdev(found)}
    return figures


def measure_cpu_fast(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """Whole processes to a good loss, nanoGPT's 2,000 iterations beside ours."""
    losses = []

    def ours() -> float:
        rows, seconds = acorn.pretrain("shakespeare-char-cpu-fast")
        losses.append(min(row["eval_loss"] for row in rows))
        return seconds

    contenders = [ours]
    if nanogpt is not None:
        flags = f"{SMALL} --max_iters=2000 --lr_decay_iters=2000 --eval_iters=20 --log_interval=100"
        contenders.append(lambda: nanogpt.train(flags)[1])
    seconds, *theirs = alternate(rounds, *contenders)
    figures = {"acorn_loss": losses[0], "acorn_seconds": statistics.median(seconds)}
    if theirs:
        ratios = [a / b for a, b in zip(seconds, theirs[0], strict=True)]
        figures |= {"nanogpt_loss": nanogpt.validation_loss(), "nanogpt_seconds": statistics.median(theirs[0])}
        figures |= {"time_ratio": statistics.median(ratios)}
    return figures


def measure_fast_speed(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """The 10.7 M model: training tokens/s at 16 x 256 in alternation."""
    return speeds(acorn, nanogpt, rounds, "shakespeare-char-fast", 24, BIG, 16 * 256)


def measure_fast(acorn: Acorn, nanogpt: NanoGPT | None, rounds: int) -> dict:
    """Our whole run of the 10.7 M recipe, once: nanoGPT's takes hours here."""
    rows, seconds = acorn.pretrain("shakespeare-char-fast")
    best = min(rows, key=lambda row: row["eval_loss"])
    return {"acorn_loss": best["eval_loss"], "acorn_tokens": best["tokens"], "acorn_seconds": seconds}


PARTS = {
    "cpu": measure_cpu,
    "cpu-seeds": measure_cpu_seeds,
    "cpu-fast": measure_cpu_fast,
    "fast-speed": measure_fast_speed,
    "fast": measure_fast,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workspace, text = Path(temporary), flags.text.absolute()
        nanogpt = NanoGPT(flags.nanogpt, text, workspace) if flags.nanogpt else None
        acorn = Acorn(text, workspace)
        results = {part: PARTS[part](acorn, nanogpt, flags.rounds) for part in flags.only}
    print(json.dumps({"benchmark": "shakespeare", "threads": torch.get_num_threads(), **results}))


if __name__ == "__main__":
    main()
