"""What a device can do, and what a run makes of it: peak FLOP/s, memory, precision and compilation."""

import functools
import itertools
import os
import platform
import re
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..system.errors import UserError, unknown


class GPU(NamedTuple):
    """Peaks of dense matmuls in FLOP/s, and bytes of memory, from the makers' data sheets."""

    half: float  # inputs of 16 bits, summed in float32
    single: float  # float32 inputs: by the TF32 cores of those that have them, which is since they have bf16
    memory: float
    has_bf16: bool = True

    def peak(self, precision: str, tf32: bool = True) -> float | None:
        """The peak in fp32, bf16 or fp16; None where the device has no units for it, or only others were recorded."""
        if precision == "fp32":
            return self.single if tf32 or not self.has_bf16 else None
        return self.half if precision == "fp16" or (precision == "bf16" and self.has_bf16) else None


GPUS = {
    "v100-16gb": GPU(125e12, 15.7e12, 16e9, has_bf16=False),
    "v100-32gb": GPU(125e12, 15.7e12, 32e9, has_bf16=False),
    "v100-pcie-32gb": GPU(112e12, 14e12, 32e9, has_bf16=False),
    "t4": GPU(65e12, 8.1e12, 16e9, has_bf16=False),
    "a10": GPU(125e12, 62.5e12, 24e9),
    "a10g": GPU(70e12, 35e12, 24e9),
    "l4": GPU(121e12, 60.5e12, 24e9),
    "l40s": GPU(362e12, 181e12, 48e9),
    "rtx-3090": GPU(71e12, 35.5e12, 24e9),
    "rtx-4090": GPU(165e12, 82.6e12, 24e9),
    "rtx-5090": GPU(209.5e12, 104.8e12, 32e9),
    "a100-40gb": GPU(312e12, 156e12, 40e9),
    "a100-80gb": GPU(312e12, 156e12, 80e9),
    "h100": GPU(989e12, 494.5e12, 80e9),
    "h100-pcie": GPU(756e12, 378e12, 80e9),
    "h100-nvl": GPU(835e12, 417.5e12, 94e9),
    "h200": GPU(989e12, 494.5e12, 141e9),
    "h200-nvl": GPU(835e12, 417.5e12, 141e9),
    "b200": GPU(2250e12, 1125e12, 180e9),
}
# Words in a device's name that make it another than the one of the table: a part of it, or one with other clocks.
OTHERS = {"mig", "laptop", "d", "ti"}
ACCELERATE_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # Accelerate's names for what it trains in
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EAGER_CONTEXT = 512  # tokens: measured in bf16 on AMX, where 256 take 0.88 and 1,024 take 1.35 of the fused time
MEASURED_SECONDS = 0.2  # for what a device's matmuls reach
PRECISIONS = ("auto", *DTYPES)
PRECISION_KEYS = ("precision", "bf16", "fp16")  # of a recipe, for one thing: a flag for one replaces them all
ACCELERATE_PRECISIONS = {ours: theirs for theirs, ours in ACCELERATE_NAMES.items()}  # our names to its
# NVIDIA's compute capabilities whose tensor cores multiply the type: Volta and Ampere.
CUDA_FROM = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}
# torch.cpu's names for the instructions that multiply the type. oneDNN alone is no judge: it says yes for bf16 on every
# AVX-512 processor, and without these instructions reaches a fifth of fp32.
X86 = {
    torch.bfloat16: ("_is_amx_tile_supported", "_is_avx512_bf16_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


# ---- what a device can do


def best_device() -> torch.device:
    """The accelerator, where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def known_gpu(name: str) -> GPU | None:
    """The table's entry for a device by the name that its driver gives it, such as "NVIDIA A100-SXM4-40GB".

    Whole words are compared (an L40S is no L4), and the entry with the most of them is taken.
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    found = {key: set(re.sub(r"-\d+gb$", "", key).split("-")) for key in GPUS}
    matching = [key for key, needed in found.items() if needed <= words and not words & OTHERS]
    return GPUS[max(matching, key=lambda key: len(found[key]))] if matching else None


def device_peak_flops(device: torch.device, precision: str, tf32: bool = True) -> float | None:
    """Peak FLOP/s in fp32, bf16 or fp16: a listed GPU's, what a CPU's own matmuls reach, or None of other devices."""
    if device.type == "cpu":
        return measured("cpu", DTYPES[precision]) * 1e9 if precision in DTYPES else None
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak(precision, tf32) if gpu else None


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU, or else of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # the one system that counts in bytes


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
def measured(device_type: str, dtype: torch.dtype, clock=time.perf_counter) -> float:
    """GFLOP/s of square matmuls, the best of those that a fifth of a second has room for; a CPU's with its threads."""
    sizes = (256, 512, 1024) if device_type == "cpu" else (2048,)
    matrices = [torch.ones(size, size, dtype=dtype, device=device_type) for size in sizes]
    best, end = 0.0, clock() + MEASURED_SECONDS
    for matrix in itertools.cycle(matrices):  # from small to large: where the CPU emulates the type, one takes long
        started = clock()
        (matrix @ matrix)[0, 0].item()  # which waits for the device
        now = clock()
        best = max(best, 2 * len(matrix) ** 3 / (now - started) / 1e9)
        if now > end:
            return best


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


def choose_precision(args) -> tuple[str, str]:
    """(fp32, bf16 or fp16, why): what the arguments ask for, else what the launcher does, else what the device does.

    Raises UserError where two of them contradict each other, and where the device only emulates what is asked for,
    unless `force_precision`.
    """
    device_type = "cpu" if args.use_cpu else best_device().type  # as TrainingArguments will choose
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
        given = {key: getattr(args, key) for key in PRECISION_KEYS if getattr(args, key) not in (None, "auto")}
        raise UserError(
            f"{', '.join(f'{key}={value}' for key, value in given.items())}: contradict each other; give one of them"
        )
    return next(iter(wanted), "fp32" if "bf16" in unwanted else None)


def _launcher_asks() -> str | None:
    """bf16 or fp16 where `accelerate launch` was told so; its "no" is also what it says when it was told nothing."""
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if said not in ACCELERATE_PRECISIONS.values():
        raise UserError(f"mixed_precision={said}: Acorn trains in fp32, bf16 or fp16; launch with --mixed_precision no")
    return None if said == "no" else said


def fit_precision(training: dict, has_bf16: bool) -> None:
    """Make a recipe's training section what another device than this one would take, for figures alone."""
    asked = _asked(SimpleNamespace(**{"precision": "auto", "bf16": None, "fp16": None, **training}))
    if asked == "bf16" and not has_bf16:
        raise UserError("precision=bf16: that GPU has no units for it; take --precision auto, fp32 or fp16")
    is_half = has_bf16 if asked is None else asked != "fp32"
    training |= {"precision": "bf16" if is_half else "fp32", "bf16": None, "fp16": None, "force_precision": True}


def record_precision(training: dict, args) -> None:
    """Note in a recipe's training section what was chosen, so that a resume on another device keeps it."""
    for key in PRECISION_KEYS:
        training.pop(key, None)
    training["precision"] = args.precision


def allow_tf32(args) -> None:
    """Let CUDA multiply fp32 by its TF32 cores, unless `tf32: false`; called as a run begins.

    By torch's older setting: after the newer one alone, which transformers makes, torch.compile dies where it asks.
    """
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if args.tf32 is False else "high")


def describe_precision(trainer) -> str:
    """What trains, read from what Accelerate does, and why."""
    args = trainer.args
    actual = ACCELERATE_NAMES[trainer.accelerator.mixed_precision]
    tf32 = ", TF32 matmuls" if args.device.type == "cuda" and actual == "fp32" and args.tf32 is not False else ""
    return f"{actual} ({args.precision_reason if actual == args.precision else 'as DeepSpeed is set'}{tf32})"


def choose_attention(model, args, context_length: int, has_document_masks: bool = False) -> None:
    """Take the attention that trains fastest, by a rule, as a measurement would not choose alike again on a resume.

    On a CPU plain matmuls beat torch's fused attention where there is dropout, which it cannot fuse, and in bf16, in
    which its backward pass is slow, up to EAGER_CONTEXT tokens. On a GPU flex attention skips what document masks hide.
    """
    is_short = context_length <= EAGER_CONTEXT or has_document_masks  # a mask costs the fused one more
    has_dropout = getattr(model.config, "attention_dropout", 0.0) > 0
    if args.device.type == "cpu" and (has_dropout or (args.bf16 and is_short)):
        model.set_attn_implementation("eager")
    elif args.device.type == "cuda" and has_document_masks:
        model.set_attn_implementation("flex_attention")


def newton_schulz_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What Muon orthogonalises in: bf16 where the device multiplies it natively, unless the run is fp32."""
    return torch.bfloat16 if precision != "fp32" and is_native(device.type, torch.bfloat16) else torch.float32


def plan_compilation(args) -> dict | None:
    """What each block's `compile` is to be given, or None; then `args` leave nothing to Accelerate.

    `torch_compile_mode` and `torch_compile_backend` ask for compilation too, as in transformers.
    """
    mode, backend = args.torch_compile_mode, args.torch_compile_backend
    args.torch_compile = bool(args.torch_compile or mode or backend)
    if not args.torch_compile or args.compile_scope == "model":
        return None
    launcher = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if launcher != "no":
        raise UserError(
            f"torch_compile: accelerate launch compiles the whole model already (dynamo_backend={launcher}); "
            "leave it out there, or take --compile_scope model"
        )
    args.torch_compile, args.torch_compile_mode, args.torch_compile_backend = False, None, None
    return {"backend": backend or "inductor", "mode": mode}
