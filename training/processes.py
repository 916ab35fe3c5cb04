"""Several processes as one run: launches that would not be what was asked for are refused, and one works first."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import LostProcess, UserError, one_line

T = TypeVar("T")
CPU_CONFIG = "training/launch/cpu-2.yaml"


def check_launch(use_cpu: bool = False, fsdp: bool = False) -> None:
    """Refuse a launch that would run otherwise than asked, from what the launcher left in the environment.

    Accelerate starts ONE process, and runs plain DDP for FSDP, without a word when it is told to use CPUs.
    """
    environment = os.environ
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        why = "Accelerate was asked for several processes and started one, as it does on CPUs"
        raise UserError(f"num_processes: {why}; launch with --config_file {CPU_CONFIG}, or with torchrun")
    use_cpu = use_cpu or _hides_all_gpus(environment.get("CUDA_VISIBLE_DEVICES"))
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() and not use_cpu else 0
    if (fsdp or environment.get("ACCELERATE_USE_FSDP", "").lower() == "true") and not gpus:
        raise UserError("fsdp: there is no GPU, and on CPUs Accelerate runs plain DDP instead; use a DDP config")
    here = int(environment.get("LOCAL_WORLD_SIZE", 1))
    if here > 1 and here > gpus and not use_cpu:
        raise UserError(
            f"num_processes={here} on this machine, which has {gpus} GPUs: ask for at most as many (--num_processes), "
            f"or run on CPUs (--config_file {CPU_CONFIG}, or --use_cpu true)"
        )


def _hides_all_gpus(visible: str | None) -> bool:
    return visible is not None and all(entry.strip() in ("", "-1") for entry in visible.split(","))


def one_process_first(args, work: Callable[[], T], what: str) -> T:
    """Let process 0 do `work`, then the first process of every other machine, then all the rest, who find it done.

    args: TrainingArguments, whose `ddp_timeout` (seconds) limits the wait. Returns each process's own result. Raises
    LostProcess in those who waited in vain, and UserError in all when process 0 failed.
    """
    if args.world_size == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
    result = _in_turn(args, work, what, args.process_index == 0, group)
    if args.local_process_index == 0 and args.process_index != 0:
        result = work()  # a machine without the first one's disk has its own work to do; with it, nothing is left
    _wait(args, what, lambda: dist.barrier(group=group))
    return result if args.local_process_index == 0 else work()


def _in_turn(args, work: Callable[[], T], what: str, is_first: bool, group) -> T | None:
    """Do the work in the first process and tell the others how it went."""
    outcome: list[str | None] = [None]
    if is_first:
        try:
            return work()
        except BaseException as error:
            outcome = [one_line(error)]
            raise
        finally:
            dist.broadcast_object_list(outcome, src=0, group=group)
    _wait(args, what, lambda: dist.broadcast_object_list(outcome, src=0, group=group))
    if outcome[0] is not None:
        raise UserError(outcome[0])
    return None


def leave() -> None:
    """End this process's part in the group: its threads, left to the interpreter's exit, now and then abort there."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _wait(args, what: str, wait: Callable[[], object]) -> None:
    try:
        wait()
    except RuntimeError as error:  # gloo's only kind, for a silent process as for a dead one
        raise lost(
            args, f"{what}: waited for the other processes (at most ddp_timeout={args.ddp_timeout} s)"
        ) from error


def lost(args, what: str) -> LostProcess:
    """The one line of a process that is left alone."""
    return LostProcess(
        f"process {args.process_index} of {args.world_size}: {what}, and one of them is gone or silent; look above for "
        "the first error, then start again (acorn resume goes on from the last checkpoint)"
    )


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone or silent (gloo's and NCCL's words)."""
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Connection refused")
    known = any(word in str(error) for word in words)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and known)
