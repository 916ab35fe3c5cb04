"""Precision is the device's: bf16 where it multiplies natively, else fp32; what a device only emulates is refused."""

import functools
import os
import platform
import time
from types import SimpleNamespace

import torch

from ..system.errors import UserError, unknown
from .hardware import ACCELERATE_NAMES, best_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("auto", *DTYPES)
KEYS = ("precision", "bf16", "fp16")  # of a recipe, all about one thing: a flag that names one replaces them all
ACCELERATE = {ours: theirs for theirs, ours in ACCELERATE_NAMES.items()}  # our names to its
# NVIDIA's compute capabilities whose tensor cores multiply the type: Volta and Ampere.
CUDA_FROM = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}
# torch.cpu's names for the instructions that multiply the type. oneDNN alone is no judge: it says yes for bf16 on every
# AVX-512 processor, and without these instructions reaches a fifth of fp32.
X86 = {
    torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


# ---- what a device can do


@functools.cache
def is_native(device_type: str, dtype: torch.dtype) -> bool:
    """Whether all devices of this type multiply matrices of `dtype` by hardware of its own, faster than fp32.

    An x86 CPU is known by its instructions, so that a busy machine answers as an idle one; other devices are measured.
    """
    if dtype not in CUDA_FROM:
        return True
    if device_type == "cuda" and torch.version.cuda:
        return all(torch.cuda.get_device_capability(n) >= CUDA_FROM[dtype] for n in range(torch.cuda.device_count()))
    if device_type == "cpu" and not _torch_says_so(dtype):
        return False
    if device_type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        known = [getattr(torch.cpu, name)() for name in X86[dtype] if hasattr(torch.cpu, name)]
        if known:
            return any(known)
    return measured(device_type, dtype) > 1.2 * measured(device_type, torch.float32)


def _torch_says_so(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matmuls of `dtype` for this CPU; a torch that does not know lets us measure."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is None or supported()


@functools.cache
def measured(device_type: str, dtype: torch.dtype) -> float:
    """GFLOP/s of a square matmul, the best of a few: a fifth of a second where the CPU emulates it, else far less."""
    size = 256 if device_type == "cpu" else 2048
    matrix = torch.ones(size, size, dtype=dtype, device=device_type)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        started = time.perf_counter()
        (matrix @ matrix).sum().item()  # the item waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def device_name(device_type: str) -> str:
    """How messages call it: a GPU by its name, a CPU by its vector instructions."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    return f"this CPU ({torch.backends.cpu.get_cpu_capability()})" if device_type == "cpu" else device_type


def refuse_emulated(what: str, device_type: str, dtype: torch.dtype, mend: str) -> None:
    """Refuse a dtype that the device only emulates, with the speed that was measured."""
    if not is_native(device_type, dtype):
        slow, fast = (measured(device_type, kind) for kind in (dtype, torch.float32))
        raise UserError(
            f"{what}: {device_name(device_type)} only emulates it: measured {slow:,.1f} GFLOP/s, and {fast:,.1f} in "
            f"fp32; {mend}"
        )


# ---- what a run takes


def device_of(args) -> str:
    """The type of device that TrainingArguments will choose, without choosing it."""
    return "cpu" if args.use_cpu else best_device().type


def choose(args) -> tuple[str, str]:
    """(fp32, bf16 or fp16, why): what the arguments ask for, else what the launcher does, else what the device does.

    Raises UserError where two of them contradict each other, and where the device only emulates what is asked for,
    unless `force_precision`.
    """
    device_type = device_of(args)
    asked, why = _asked(args), "as asked"
    if asked is None:
        asked, why = _launcher_asks(), "as accelerate launch says"
    if asked is None:
        if is_native(device_type, torch.bfloat16):
            return "bf16", f"native on {device_name(device_type)}"
        return "fp32", f"bf16 is not native on {device_name(device_type)}"
    if asked == "fp16" and device_type == "cpu":
        raise UserError("precision=fp16: training in fp16 is for GPUs alone; use --precision auto, which fits this CPU")
    if not args.force_precision:
        mend = "go on in fp32 (--precision fp32; auto takes it for a new run), or override with --force_precision true"
        refuse_emulated(f"precision={asked}", device_type, DTYPES[asked], mend)
    return asked, why


def _asked(args) -> str | None:
    """What `precision`, `bf16` and `fp16` say together; None leaves the choice to Acorn."""
    if args.precision not in PRECISIONS:
        raise unknown("precision", args.precision, PRECISIONS)
    wanted = {args.precision} - {"auto"} | {name for name in ("bf16", "fp16") if getattr(args, name)}
    unwanted = {name for name in ("bf16", "fp16") if getattr(args, name) is False}
    if len(wanted) > 1 or wanted & unwanted:
        given = {key: getattr(args, key) for key in KEYS if getattr(args, key) not in (None, "auto")}
        raise UserError(
            f"{', '.join(f'{key}={value}' for key, value in given.items())}: contradict each other; give one of them"
        )
    return next(iter(wanted), "fp32" if "bf16" in unwanted else None)


def _launcher_asks() -> str | None:
    """bf16 or fp16 where `accelerate launch` was told so; its "no" is also what it says when it was told nothing."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if said not in ACCELERATE.values():
        raise UserError(f"mixed_precision={said}: Acorn trains in fp32, bf16 or fp16; launch with --mixed_precision no")
    return None if said == "no" else said


def fit_precision(training: dict, has_bf16: bool) -> None:
    """Make a recipe's training section what another device than this one would take, for figures alone."""
    asked = _asked(SimpleNamespace(**{"precision": "auto", "bf16": None, "fp16": None, **training}))
    if asked == "bf16" and not has_bf16:
        raise UserError("precision=bf16: that GPU has no units for it; take --precision auto, fp32 or fp16")
    is_half = has_bf16 if asked is None else asked != "fp32"
    training |= {"precision": "bf16" if is_half else "fp32", "bf16": None, "fp16": None, "force_precision": True}


def record(training: dict, args) -> None:
    """Note in a recipe's training section what was chosen, so that a resume on another device keeps it."""
    for key in KEYS:
        training.pop(key, None)
    training["precision"] = args.precision


def allow_tf32(args) -> None:
    """Let CUDA multiply fp32 by its TF32 cores, unless `tf32: false`; called as a run begins.

    By torch's older setting: after the newer one alone, which transformers makes, torch.compile dies where it asks.
    """
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if args.tf32 is False else "high")


def trained_in(trainer) -> str:
    """What trains, read from what Accelerate does, and why."""
    args = trainer.args
    actual = ACCELERATE_NAMES[trainer.accelerator.mixed_precision]
    tf32 = ", TF32 matmuls" if args.device.type == "cuda" and actual == "fp32" and args.tf32 is not False else ""
    return f"{actual} ({args.precision_reason if actual == args.precision else 'as DeepSpeed is set'}{tf32})"


def newton_schulz_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What Muon orthogonalises in: bf16 where the device multiplies it natively, unless the run is fp32."""
    return torch.bfloat16 if precision != "fp32" and is_native(device.type, torch.bfloat16) else torch.float32
