"""Does all of it run on this GPU, how fast, and in how much memory? One JSON line a part, eight minutes at most.

    python benchmarks/gpu.py [--only PART …] [--minutes 8]
    python benchmarks/gpu.py --device meta        without a GPU: the parts that need shapes and no numbers

Each part is a process of its own with its own share of the time: one that fails says why in its line, and the others
run on. What the libraries print goes to stderr. Needs torch, transformers, accelerate and peft; nothing else, no
network, and no installation of Acorn. Exit code 1 if a part failed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not start CUDA here

from benchmarks import gpu_parts, gpu_training

# name: (what it takes at most in seconds, whether meta will do)
PARTS = {
    "machine": (30, True),
    "placement": (240, True),
    "optimizers": (30, False),
    "attention": (60, False),
    "flex": (120, False),
    "pretrain-blocks": (90, False),
    "pretrain-model": (120, False),
    "fsdp": (90, False),
    "lora": (60, False),
    "qlora": (60, False),
    "generate": (90, False),
    "memory": (60, False),
    "speed-bare": (120, False),
    "speed-trainer": (120, False),
}


def run_part(name: str, device: str, seconds: float, method: str = "fork") -> dict:
    """The figures of a part, or the error that ended it; the process and what it started are gone then.

    method: fork has what was imported once, and lets CUDA begin in each child; spawn imports anew.
    """
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(name, device, sender))
    started = time.monotonic()
    process.start()
    sender.close()
    try:
        figures = receiver.recv() if receiver.poll(seconds) else {"error": f"took longer than {seconds:.0f} s"}
    except EOFError:
        process.join()
        figures = {"error": f"ended with exit code {process.exitcode}"}
    finally:
        if process.is_alive():
            process.join(5)
        _end(process.pid)
    return {"part": name, "device": device, "seconds": round(time.monotonic() - started, 1), **figures}


def _in_child(name: str, device: str, sender) -> None:
    os.setpgid(0, 0)  # the compiler's own processes end with it
    os.dup2(2, 1)
    try:
        part = name.replace("-", "_")
        figures = getattr(gpu_parts if hasattr(gpu_parts, part) else gpu_training, part)(device)
    except BaseException as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
        traceback.print_exc()
        figures = {"error": f"{type(error).__name__}: {error}"[:600], "at": frames}
    sender.send(figures)


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, meta, or cpu with tiny models to try the parts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8)
    flags = parser.parse_args(argv)
    end, has_failed, method = time.monotonic() + 60 * flags.minutes, False, "fork"
    if "error" in run_part("machine", flags.device, 60):  # something that was imported has begun CUDA: no forks then
        method = "spawn"
    for name in flags.only:
        seconds, meta_will_do = PARTS[name]
        left = end - time.monotonic()
        if flags.device == "meta" and not meta_will_do:
            figures = {"part": name, "device": "meta", "skipped": "needs a GPU"}
        elif left < 5:
            figures = {"part": name, "device": flags.device, "error": f"no time left of {flags.minutes:g} minutes"}
        else:
            figures = run_part(name, flags.device, min(seconds, left), method)
        has_failed |= "error" in figures
        print(json.dumps(figures), flush=True)
    raise SystemExit(has_failed)


if __name__ == "__main__":
    main()
