"""FSDP's shards, gathered for what people load, and cut anew for those who resume."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as shards
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME

from ..model.optimizers import shard_like

OPTIMIZER_SHARDS = "optimizer-shards"  # beside optimizer.pt, which then holds the groups alone


# ---- the model


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Give a sharded model back its own class, whose module is the code that is saved, and the names of its blocks.

    FSDP derived a class from it; Accelerate put each block into a wrapper, by whose name PEFT would look for weights.
    """
    given = type(model)
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, CheckpointWrapper)
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child._checkpoint_wrapped_module
    if isinstance(model, FSDPModule):
        model.__class__ = given.__mro__[2]  # torch: FSDP<name>, FSDPModule, <name>
    try:
        yield
    finally:
        model.__class__ = given
        for parent, name, child in wrapped:
            parent._modules[name] = child


def whole_weights(model: nn.Module, is_kept: bool) -> dict[str, torch.Tensor]:
    """The state dict of a sharded model in one piece, on the CPU; all processes gather, and who does not keep drops."""
    gathered: dict[int, torch.Tensor] = {}  # tied weights are one tensor under two names, and stay one
    weights = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) not in gathered:
            gathered[id(weight)] = _whole(weight.detach(), is_kept)
        weights[name] = gathered[id(weight)]
    return weights if is_kept else {}


def _whole(value, is_kept: bool):
    """A tensor's own memory on the CPU; None from a sharded one in a process that does not keep it."""
    if isinstance(value, DTensor):
        value = value.to(value.device_mesh.device_type).full_tensor()
        return value.cpu() if is_kept else None
    return value.cpu() if isinstance(value, torch.Tensor) else value


def is_finite(model: nn.Module) -> torch.Tensor:
    """Whether this process's weights are all numbers: a scalar, 1.0 or 0.0."""
    local = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return torch.stack([torch.isfinite(p).all() for p in local]).all().float()


# ---- the optimizer


def save_optimizer(optimizer, folder: Path, in_shards: bool, is_first: bool) -> None:
    """Write `optimizer.pt` as one process would; `in_shards` its tensors go to OPTIMIZER_SHARDS instead, from all."""
    saved = optimizer.state_dict()
    state = {(number, key): value for number, values in saved["state"].items() for key, value in values.items()}
    if in_shards:
        named = {f"{number}.{key}": value for (number, key), value in state.items()}
        shards.save(named, checkpoint_id=folder / OPTIMIZER_SHARDS)
        state = {}
    state = {place: _whole(value, is_first) for place, value in state.items()}
    if is_first:
        torch.save({**saved, "state": _nested(state)}, folder / OPTIMIZER_NAME)


def load_optimizer(optimizer, folder: Path) -> None:
    """Read what `save_optimizer` wrote, on however many processes; each takes its own part alone."""
    saved = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if (folder / OPTIMIZER_SHARDS).is_dir():
        saved["state"] = _read_shards(folder / OPTIMIZER_SHARDS, parameters)
    for number, values in saved["state"].items():
        for key, value in values.items():
            is_whole = isinstance(value, torch.Tensor) and value.shape == parameters[number].shape
            values[key] = shard_like(value, parameters[number]) if is_whole else value
    optimizer.load_state_dict(saved)


def _read_shards(folder: Path, parameters: list[nn.Parameter]) -> dict[int, dict]:
    """The tensors of all processes' files, cut as the parameters are."""
    described = shards.FileSystemReader(folder).read_metadata().state_dict_metadata
    room = {}
    for name, tensor in described.items():
        empty = torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        parameter = parameters[int(name.split(".")[0])]
        is_cut = isinstance(parameter, DTensor) and empty.shape == parameter.shape
        room[name] = torch.empty_like(parameter, dtype=empty.dtype) if is_cut else torch.empty_like(empty, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process only
        shards.load(room, checkpoint_id=folder, no_dist=not dist.is_initialized())
    places = {tuple(name.split(".", 1)): value for name, value in room.items()}
    return _nested({(int(number), key): value for (number, key), value in places.items()})


def _nested(state: dict[tuple[int, str], object]) -> dict[int, dict]:
    numbers = dict.fromkeys(number for number, _ in state)
    return {number: {key: value for (n, key), value in state.items() if n == number} for number in numbers}
