"""Several CPU processes for a test: a function run in each of them over gloo, or a verb in two by a real launcher."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

ROOT = Path(__file__).resolve().parent.parent
# Imported once, by the server that the processes of all tests are forked from.
PRELOADED = ["training.pretrain", "training.resume", "torch.distributed.checkpoint", "torch.distributed.fsdp"]


def in_processes(count: int, worker: Callable, *args) -> None:
    """Call `worker(rank, *args)`, a top-level function, in so many processes; an error of any is raised here."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(worker, args, nprocs=count, start_method="forkserver")


def in_two(function: Callable, folder: Path, *args) -> None:
    """Call `function(rank, *args)`, a top-level one, in two processes of one gloo group."""
    in_processes(2, _in_group, function, str(folder / "store"), args)


def _in_group(rank: int, function: Callable, store: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()


# ---- as a launcher would


def as_launched(count: int, sharding: str | None, folder: Path, function: Callable, *args) -> None:
    """Call `function(*args)` in so many processes as a launcher leaves them, with `folder` as the current one.

    One process without sharding is one that nobody launched. sharding: FULL_STATE_DICT or SHARDED_STATE_DICT for FSDP
    as training/launch/fsdp.yaml sets it up, None for DDP.
    """
    in_processes(count, _launched, count, free_port(), sharding, str(folder), function, args)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _launched(rank: int, count: int, port: int, sharding: str | None, folder: str, function: Callable, args: tuple):
    torch.set_num_threads(1)
    if count > 1 or sharding:
        os.environ.update(launcher_variables(rank, count, port), **(fsdp_variables(sharding) if sharding else {}))
    with contextlib.chdir(folder), fsdp_on_cpus() if sharding else contextlib.nullcontext():
        function(*args)


def launcher_variables(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun puts into the environment of a process."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in numbers.items()}}


def fsdp_variables(state_dict_type: str) -> dict[str, str]:
    """What `accelerate launch` puts there for fsdp.yaml."""
    config = yaml.safe_load((ROOT / "training/launch/fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    config["fsdp_state_dict_type"] = state_dict_type
    values = {key.upper(): str(value) for key, value in config.items()}
    flags = {key: value.lower() for key, value in values.items() if value in ("True", "False")}
    return {"ACCELERATE_USE_FSDP": "true", **values, **flags}


@contextlib.contextmanager
def fsdp_on_cpus():
    """Let Accelerate take its FSDP branch without a GPU, and Acorn let it: only tests may want that."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from training.config import recipe

    initialise, check = PartialState.__init__, recipe.check_launch

    def as_if_on_gpus(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__, recipe.check_launch = as_if_on_gpus, lambda *args, **kwargs: None
    try:
        yield
    finally:
        PartialState.__init__, recipe.check_launch = initialise, check


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
