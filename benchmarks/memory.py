"""Is the memory that `acorn estimate` foretells what a training step takes? Prints one JSON line.

    python benchmarks/memory.py [--recipes RECIPE …] [--flag value …]

Each recipe's model is built and trained for two steps of one micro-batch (two where the recipe accumulates) in a
process of its own, and the most that torch's allocator had given out is put beside the estimate; on a CPU also what the
process held in all, libraries' scratch and fragments of the heap included. A batch of evaluation follows, measured the
same way. Flags after `--` go to the recipes, such as `-- --per_device_train_batch_size 4 --dropout 0
--attn_implementation sdpa`: the estimate assumes fused attention, which CPUs have without dropout only.
"""

import argparse
import json
import subprocess
import sys

from peak_memory import measure  # beside this script


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
