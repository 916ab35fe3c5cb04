"""What share of the CPU's matmul peak does a training step reach, and where does the rest go? Prints one JSON line.

    python benchmarks/cpu_share.py [--recipe RECIPE] [--kinds KIND …] [--rounds N] [--threads N] [-- --flag …]

A kind is an attention, eager or sdpa, as it is trained; with -plain after it, without the norms and activations that
are cheap on a CPU; with -compiled, with compiled blocks. In each round the peak is measured anew, and then a few steps
of each kind, so that a busy machine slows both sides of the ratio; the medians of the rounds are printed. `share` is by
the clock, `share_of_cpu_time` by the time that this process had the processor for, which other processes disturb less
(with one thread, that is: idle ones wait by counting). parts: milliseconds a step by the clock. operations: the share
of a step's CPU time by torch's profiler, by kind, and the largest others by name. Flags after `--` go to the recipe.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import setting
from modeling import GPTForCausalLM
from training.config.command_line import load_recipe
from training.costs import config_of
from training.loop.fast_on_cpu import use_fast_dropout, use_fast_norms
from training.model.devices import DTYPES, measured
from training.model.optimizers import build_optimizer
from training.model.sizes import flops_per_token

KINDS = {  # a kind of work: names of operations that begin so
    "matmuls": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn"),
    "fused attention": ("aten::_scaled_dot_product",),
    "softmax": ("aten::_softmax",),
    "norms": ("aten::_fused_rms_norm", "aten::rsqrt", "aten::native_layer_norm", "aten::mean", "aten::pow"),
    "copies": ("aten::copy_", "aten::cat", "aten::stack", "aten::contiguous", "aten::clone", "aten::fill_"),
    "random numbers": ("aten::random_", "aten::bernoulli_"),
    "optimizer": ("aten::_foreach", "aten::_fused_adam"),
}


class Steps:
    """A model of the recipe of one kind, and its training steps on random tokens."""

    def __init__(self, recipe, args, kind: str):
        torch.manual_seed(0)
        attention, _, how = kind.partition("-")
        self.args, self.model = args, GPTForCausalLM(config_of(recipe)).train()
        self.model.set_attn_implementation(attention)
        use_fast_dropout(self.model)
        if not how:
            use_fast_norms(self.model)
        for layer in self.model.model.layers if how == "compiled" else []:
            layer.compile()
        self.optimizer = build_optimizer(self.model, args)
        shape = (args.per_device_train_batch_size, self.model.config.max_position_embeddings)
        self.ids = torch.randint(0, self.model.config.vocab_size, shape)
        self.seconds = Counter()
        self.step()  # warms up, and makes the optimizer's state

    def step(self) -> None:
        marks = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            loss = self.model(input_ids=self.ids, shift_labels=self.ids, return_logits=False).loss
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(time.perf_counter())
        for part, begin, end in zip(("forward", "backward", "optimizer"), marks, marks[1:], strict=False):
            self.seconds[part] += end - begin

    def timed(self, count: int) -> tuple[float, float]:
        """Seconds of a step by the clock, and of the processor."""
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(count):
            self.step()
        return (time.perf_counter() - clock) / count, (time.process_time() - processor) / count

    def operations(self) -> dict[str, float]:
        """The share of each kind of operation, and of the largest others, in a step's CPU time."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.step()
        times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        kinds = Counter()
        for name, spent in times.items():
            kinds[next((kind for kind, starts in KINDS.items() if name.startswith(starts)), name)] += spent
        return {name: round(spent / sum(times.values()), 4) for name, spent in kinds.most_common(16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shakespeare-char-fast")
    parser.add_argument("--kinds", nargs="+", default=["eager", "eager-plain", "sdpa"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each kind in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("flags", nargs="*", help="flags of the recipe, after --")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    recipe = load_recipe("estimate", [flags.recipe, *flags.flags])
    args, dtype = (made := recipe.training_arguments()), DTYPES[made.precision]
    kinds = {kind: Steps(recipe, args, kind) for kind in flags.kinds}
    tokens = args.per_device_train_batch_size * recipe.model_config().max_position_embeddings
    flops = tokens * flops_per_token(config_of(recipe))
    rounds = {kind: [] for kind in kinds}
    for steps in kinds.values():
        steps.seconds.clear()
    for _ in range(flags.rounds):
        peak = measured.__wrapped__("cpu", dtype) * 1e9
        peak_of_cpu = measured.__wrapped__("cpu", dtype, time.process_time) * 1e9  # FLOP a second of one thread
        for kind, steps in kinds.items():
            clock, processor = steps.timed(flags.steps)
            rounds[kind].append((peak, clock, flops / clock / peak, flops / processor / peak_of_cpu))
    figures = {"benchmark": "cpu_share", "recipe": flags.recipe} | setting()
    figures |= {"precision": args.precision, "tflop_a_step": round(flops / 1e12, 4)}
    for kind, steps in kinds.items():
        peak, clock, share, share_of_cpu = map(statistics.median, zip(*rounds[kind], strict=True))
        count = flags.rounds * flags.steps
        figures[kind] = {
            "peak_gflops": round(peak / 1e9),
            "seconds_a_step": round(clock, 4),
            "tokens_per_second": round(tokens / clock),
            "share": round(share, 3),
            "share_of_cpu_time": round(share_of_cpu, 3),
            "parts": {part: round(1000 * spent / count, 1) for part, spent in steps.seconds.items()},
            "operations": steps.operations(),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
