"""Several processes decide as one: what the first one found, whether any of them failed, which signal reached one."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from .errors import UserError, one_line

T = TypeVar("T")


def first_decides(args, decide: Callable[[], T]) -> T:
    """What `decide()` returns in the first process, in every process; its UserError is raised in all of them."""
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


def together(args, act: Callable[[], object]) -> None:
    """Let every process `act()`; where one fails all of them raise, each its own error or else another's words."""
    failure = None
    try:
        act()
    except Exception as error:
        if args.world_size == 1:
            raise
        failure = error
    if args.world_size == 1:
        return
    failures: list[str | None] = [None] * args.world_size
    dist.all_gather_object(failures, None if failure is None else one_line(failure))
    if failure is not None:
        raise failure
    for rank, words in enumerate(failures):
        if words is not None:
            raise RuntimeError(f"process {rank}: {words}")


def highest(number: int, group) -> int:
    """The highest of the numbers that the processes of a (gloo) group bring."""
    shared = torch.tensor(number)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
    return int(shared)
