"""Two CPU processes for a test: a function run in both over gloo, and a verb run in both by a launcher."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent


def in_two(function: Callable, folder: Path, *args) -> None:
    """Call `function(rank, *args)`, a top-level one, in two processes of one gloo group; its errors are raised here."""
    torch.multiprocessing.spawn(_worker, (function, str(folder / "store"), args), nprocs=2)


def _worker(rank: int, function: Callable, store: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


def launch(
    *command: str, cwd: Path, launcher: str = "accelerate", check: bool = True, **variables: str
) -> subprocess.CompletedProcess:
    """Run `-m MODULE …` in two processes, by `accelerate launch` with cpu-2.yaml or by torchrun."""
    config = ROOT / "training" / "launch" / "cpu-2.yaml"
    launchers = {
        "accelerate": ["accelerate.commands.launch", "--config_file", str(config)],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    line = [sys.executable, "-m", *launchers[launcher], *command]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
