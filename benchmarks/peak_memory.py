"""Most memory that a training step and an evaluation take, measured in this process."""

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from modeling import GPTForCausalLM
from training.config.command_line import load_recipe
from training.costs import config_of, estimate_recipe
from training.data.dataset import EvaluationRows, TokenArray
from training.loop.evaluation import evaluate_rows
from training.model.optimizers import build_optimizer


def resident(kind: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{kind}:"))


def step(model, optimizer, args, micro_batches: int) -> None:
    """One training step on random tokens."""
    shape, device = (args.per_device_train_batch_size, model.config.max_position_embeddings), args.device
    for _ in range(micro_batches):
        ids = torch.randint(0, model.config.vocab_size, shape, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids, shift_labels=ids, return_logits=False).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def peak_of_tensors(work: Callable[[], None], held: int) -> int:
    """Most bytes that torch's CPU allocator had given out during `work`, `held` of them before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_bytes())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return held + max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def evaluation_peak(model, args) -> float:
    """Bytes that one batch of evaluation takes beside what is there already."""
    context, device = model.config.max_position_embeddings, args.device
    length = args.per_device_eval_batch_size * context + 1
    tokens = TokenArray(torch.randint(0, model.config.vocab_size, (length,)).numpy())

    def work() -> None:
        autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
        evaluate_rows(model, EvaluationRows(tokens, context), 1, args.per_device_eval_batch_size, autocast)

    if device.type != "cuda":
        return peak_of_tensors(work, 0)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - held


def measure(recipe: str, flags: list[str]) -> dict:
    """Peak bytes of a training step, and the estimate's."""
    loaded = load_recipe("estimate", [recipe, *flags])
    args = loaded.training_arguments()
    estimate = estimate_recipe(loaded, device=args.device.type)
    micro_batches, device = min(2, estimate.accumulation), args.device
    before = resident("VmRSS")
    model = GPTForCausalLM(config_of(loaded)).to(device).train()
    optimizer = build_optimizer(model, args)
    step(model, optimizer, args, micro_batches)  # makes the optimizer's state
    if device.type == "cuda":
        step(model, optimizer, args, micro_batches)
        figures = {"measured_bytes": torch.cuda.max_memory_allocated(device)}
    else:
        state = [t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)]
        held = sum(t.nbytes for t in [*model.parameters(), *state])
        peak = peak_of_tensors(lambda: step(model, optimizer, args, micro_batches), held)
        figures = {"measured_bytes": peak, "resident_bytes": resident("VmHWM") - before}
    estimated, evaluation = sum(estimate.memory.values()), evaluation_peak(model, args)
    figures |= {"evaluation_bytes": evaluation, "estimated_evaluation_bytes": round(estimate.evaluation)}
    ratios = {"ratio": estimated / figures["measured_bytes"], "evaluation_ratio": estimate.evaluation / evaluation}
    return figures | {"estimated_bytes": round(estimated), **ratios}
