"""Is the memory that `acorn estimate` foretells what a training step takes? Prints one JSON line.

    python benchmarks/memory.py [--recipes RECIPE …] [--flag value …]

Each recipe's model is built and trained for two steps of one micro-batch in a process of its own, and its peak memory
above what the imports took is put beside the estimate. Flags after `--` go to the recipes (`-- --block_size 512`). On a
CPU it is the operating system's account of the process, on a GPU the allocator's.
"""

import argparse
import json
import subprocess
import sys

import torch

from modeling import GPTForCausalLM
from training.costs import estimate_recipe
from training.optimizers import build_optimizer
from training.recipe import load_recipe


def resident(kind: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{kind}:"))


def measure(recipe: str, flags: list[str]) -> dict:
    """Peak bytes of two training steps, and the estimate's."""
    loaded = load_recipe("estimate", [recipe, *flags])
    args = loaded.training_arguments()
    device = args.device
    torch.ones(256, 256, device=device, requires_grad=True).square().sum().backward()  # libraries load their kernels
    before = resident("VmRSS")
    model = GPTForCausalLM(loaded.model_config()).to(device).train()
    if device.type == "cpu" and args.bf16:
        model.set_attn_implementation("eager")  # as training does
    optimizer = build_optimizer(model, args)
    shape = (args.per_device_train_batch_size, model.config.max_position_embeddings)
    for _ in range(2):
        ids = torch.randint(0, model.config.vocab_size, shape, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids, shift_labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before
    estimated = sum(estimate_recipe(loaded).memory.values())
    return {"measured_bytes": peak, "estimated_bytes": round(estimated), "ratio": estimated / peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["gpt2-openwebtext", "shakespeare-char"])
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one recipe
    parser.add_argument("flags", nargs="*", help="flags of the recipes, after --")
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(measure(flags.one, flags.flags)))
        return
    figures = {}
    for recipe in flags.recipes:
        command = [sys.executable, __file__, "--one", recipe, "--", *flags.flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures[recipe] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"benchmark": "memory", **figures}))


if __name__ == "__main__":
    main()
