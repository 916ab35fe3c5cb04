"""Several processes as one: how they are launched, who works first, what they decide together, how they end."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import LostProcess, UserError, one_line

T = TypeVar("T")


def from_main_process(args, decide: Callable[[], T]) -> T:
    """What `decide()` returns on the main process, on every process; its UserError is raised on all of them."""
    if args.world_size == 1:
        return decide()
    answer: list = [None, None]
    if args.process_index == 0:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def on_all_processes(args, act: Callable[[], object]) -> None:
    """Let every process `act()`; where one fails all of them raise, each its own error or else another's words."""
    failure = None
    try:
        act()
    except Exception as error:
        failure = error
    if args.world_size > 1:
        failures = enumerate(gather(args, failure and one_line(failure)))
        elsewhere = next((f"process {rank}: {words}" for rank, words in failures if words), None)
        failure = failure or (elsewhere and RuntimeError(elsewhere))
    if failure is not None:
        raise failure


def gather(args, value: object, group=None) -> list:
    """What each process brings, by rank, on every process."""
    values: list = [None] * args.world_size
    dist.all_gather_object(values, value, group=group)
    return values


def max_over_processes(number: int, group) -> int:
    """The largest of the numbers that the processes of a (gloo) group bring."""
    shared = torch.tensor(number)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
    return int(shared)


LIFE_SIGN = 5.0  # seconds between the signs of life of a process that others wait for
CPU_CONFIG = "training/launch/cpu-2.yaml"


def check_launch(use_cpu: bool = False, fsdp: bool = False) -> None:
    """Refuse a launch that would run otherwise than asked, from what the launcher left in the environment.

    Accelerate starts ONE process, and runs plain DDP for FSDP, without a word when it is told to use CPUs.
    """
    environment = os.environ
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        why = "Accelerate was asked for several processes and started one, as it does on CPUs"
        raise UserError(f"num_processes: {why}; launch with --config_file {CPU_CONFIG}, or with torchrun")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")  # empty or -1: none
    use_cpu = use_cpu or all(entry.strip() in ("", "-1") for entry in visible)
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() and not use_cpu else 0
    if (fsdp or _launches("FSDP")) and not gpus:
        raise UserError("fsdp: there is no GPU, and on CPUs Accelerate runs plain DDP instead; use a DDP config")
    here = int(environment.get("LOCAL_WORLD_SIZE", 1))
    if here > 1 and here > gpus and not use_cpu:
        raise UserError(
            f"num_processes={here} on this machine, which has {gpus} GPUs: ask for at most as many (--num_processes), "
            f"or run on CPUs (--config_file {CPU_CONFIG}, or --use_cpu true)"
        )


def check_partitions(args) -> None:
    """Refuse to share out a model in flat pieces where its matrices are needed: FSDP1 always, ZeRO under Muon."""
    by_launcher = _launches("FSDP")
    version = os.environ.get("FSDP_VERSION", "1") if by_launcher else (args.fsdp_config or {}).get("version", 2)
    if (by_launcher or args.fsdp) and str(version) != "2":
        why = "makes one flat row of a block's weights, from which neither Muon nor a checkpoint has its matrices"
        raise UserError(f"fsdp_version={version}: {why}; use 2, as training/launch/fsdp.yaml does")
    if args.optimizer != "adamw" and _is_zero(args):
        why = "DeepSpeed's ZeRO cuts flat pieces of all weights, and Muon orthogonalises whole matrices"
        raise UserError(f"optimizer={args.optimizer!r}: {why}; use adamw, or shard by training/launch/fsdp.yaml")
    if args.average_decay is not None and _is_zero(args):
        mend = "leave it out, or shard by training/launch/fsdp.yaml"
        raise UserError(f"average_decay={args.average_decay}: ZeRO keeps the weights in flat pieces; {mend}")


def shares_weights_out(args) -> bool:
    """Whether no process will hold the whole model: under FSDP or DeepSpeed, by argument or by launcher."""
    return bool(args.fsdp or _launches("FSDP") or _is_zero(args))


def checkpoints_by_fsdp(args) -> bool:
    """Whether FSDP computes blocks twice, by argument or by launcher."""
    by_launcher = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true"
    return by_launcher or bool((args.fsdp_config or {}).get("activation_checkpointing"))


def check_writer(checkpoint: Path, args) -> None:
    """Refuse to go from DeepSpeed's own form of a state to ours, or back; all other launches read each other's."""
    by_zero, now_zero = (checkpoint / "latest").is_file(), _is_zero(args)
    if by_zero and not now_zero:
        raise UserError(f"{checkpoint} is DeepSpeed ZeRO's: go on under it (training/launch/zero.yaml)")
    if now_zero and not by_zero:
        raise UserError(f"{checkpoint} is not of DeepSpeed ZeRO, which reads its own alone: go on under another launch")


def _is_zero(args) -> bool:
    return bool(args.deepspeed) or _launches("DEEPSPEED")


def _launches(what: str) -> bool:
    """Whether `accelerate launch` was told to use FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "").lower() == "true"


def main_process_first(
    args,
    work: Callable[[], T],
    what: str,
    send: Callable[[T], object] = lambda result: None,
    receive: Callable[[object], T | None] = lambda sent: None,
) -> T:
    """Let process 0 do `work`, then the first process of every other machine, then all the rest, who find it done.

    send: what the others are told of the first one's result; receive: makes a result of that, or None where this
    machine has not what it speaks of, and so works itself. args: TrainingArguments; a process that shows no life for
    `ddp_timeout` seconds is lost, however long the work of one that does takes. Returns each process's own result.
    Raises LostProcess in those who waited in vain, and UserError in all when one failed.
    """
    if args.world_size == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
    own_turn = 0 if args.process_index == 0 else 1 if args.local_process_index == 0 else 2
    sent = result = None
    for turn in range(3):
        failure, done = None, Event()
        with ThreadPoolExecutor(1) as beside:
            signs = beside.submit(_show_life, done, group, args.ddp_timeout)
            try:
                if turn == own_turn:
                    received = None if sent is None else receive(sent)
                    result = work() if received is None else received
            except BaseException as error:
                failure = error
            done.set()
        if failure is not None and signs.exception() is not None:
            raise failure
        try:
            signs.result()
            told = send(result) if turn == args.process_index == 0 and failure is None else None
            answers = gather(args, (failure and one_line(failure), told), group)
        except RuntimeError as error:  # gloo's only kind, for a silent process as for a dead one
            why = f"waited for the other processes, without a sign of life for ddp_timeout={args.ddp_timeout} s"
            raise lost_process_error(args, f"{what}: {why}") from error
        if failure is not None:
            raise failure
        if words := next((words for words, _ in answers if words), None):
            raise UserError(words)
        sent = answers[0][1] if turn == 0 else sent
    return result


def _show_life(done: Event, group, ddp_timeout: float) -> None:
    """Return once every process is `done` with its work; until then all compare, every few seconds, who is not."""
    pause = 0.01
    while max_over_processes(0 if done.is_set() else 1, group):
        done.wait(pause)
        pause = min(2 * pause, LIFE_SIGN, ddp_timeout / 4)


def close_process_group() -> None:
    """End this process's part in the group: its threads, left to the interpreter's exit, now and then abort there."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def lost_process_error(args, what: str) -> LostProcess:
    """The one line of a process that is left alone."""
    return LostProcess(
        f"process {args.process_index} of {args.world_size}: {what}, and one of them is gone or silent; look above for "
        "the first error, then start again (acorn resume goes on from the last checkpoint)"
    )


def is_lost_process_error(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone or silent (gloo's and NCCL's words)."""
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Connection refused")
    known = any(word in str(error) for word in words)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and known)
