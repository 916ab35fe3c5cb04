"""What a person sees and can do while a run goes on: the progress bar, the table, metrics.jsonl, and stopping."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .hardware import device_peak_flops
from .sampling import sample_text

COLUMNS = {
    "step": ("step", "{:>8,}"),
    "tokens": ("tokens", "{:>14,}"),
    "train_loss": ("train", "{:>8.4f}"),
    "eval_loss": ("valid", "{:>8.4f}"),
    "bits_per_byte": ("bpb", "{:>7.4f}"),
    "learning_rate": ("lr", "{:>9.2e}"),
    "grad_norm": ("grad", "{:>7.3f}"),
    "tokens_per_second": ("tok/s", "{:>10,.0f}"),
    "mfu": ("mfu", "{:>6.1%}"),
    "seconds_left": ("left", "{:>9}"),
}


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM finish the step, write a checkpoint and end the run; a second signal ends it at once."""

    def __init__(self):
        self.received: int | None = None
        self._previous: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = number
        print(f"\n{signal.Signals(number).name}: finishing this step and saving …", file=sys.stderr)
        self.restore()

    def on_step_end(self, args, state, control, **kwargs):
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


class ConsoleTable(TrainerCallback, ExportableState):
    """A progress bar on stderr, and at each evaluation a row on stdout and a line in metrics.jsonl.

    Throughput counts training time alone; `seconds` is the whole run's, resumed parts added. Only the first process
    shows anything.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.bar: tqdm | None = None
        self.latest: dict = {}
        self.last_evaluated: int | None = None

    def state(self) -> dict:
        return {"args": {"seconds": self._seconds()}, "attributes": {}}

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.resumed_at = time.perf_counter()
        saved = state.stateful_callbacks.get("ConsoleTable", {}) if state.global_step else {}
        self.seconds_before = saved.get("args", {}).get("seconds", 0.0) if isinstance(saved, dict) else 0.0
        peak = args.peak_flops or device_peak_flops(args.device)
        self.peak_flops = peak * args.world_size if peak else None
        self._start_interval(state)
        if state.is_world_process_zero:
            print("  ".join(header.rjust(len(_shown(key, 0))) for key, (header, _) in COLUMNS.items()), flush=True)
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=args.disable_tqdm,
                file=sys.stderr, mininterval=0.5,
            )  # fmt: skip

    def _start_interval(self, state) -> None:
        self.loss_sum, self.loss_steps, self.training_seconds = 0.0, 0, 0.0
        self.last_logged = self.interval_start = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate:
            control.should_log = True  # a row shows the training loss and rate of its own step
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        now = time.perf_counter()
        if logs and "loss" in logs:
            steps = state.global_step - self.last_logged
            self.loss_sum += logs["loss"] * steps
            self.loss_steps += steps
            self.last_logged = state.global_step
            self.training_seconds += now - self.resumed_at
            self.latest = {key: logs.get(key) for key in ("learning_rate", "grad_norm")}
            if self.bar is not None:
                self.bar.set_postfix(loss=f"{logs['loss']:.4f}", tok_s=f"{self._tokens_per_second(state):,.0f}")
        self.resumed_at = now

    def on_save(self, args, state, control, **kwargs):
        self.resumed_at = time.perf_counter()

    def _tokens_per_second(self, state) -> float | None:
        steps = self.last_logged - self.interval_start
        return steps * self.trainer.tokens_per_step / self.training_seconds if self.training_seconds else None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.last_evaluated = state.global_step
        if not state.is_world_process_zero:
            return
        speed = self._tokens_per_second(state)
        flops = speed * self.trainer.flops_per_token if speed else None
        row = {
            "step": state.global_step,
            "tokens": state.global_step * self.trainer.tokens_per_step,
            "train_loss": self.loss_sum / self.loss_steps if self.loss_steps else None,
            "eval_loss": metrics["eval_loss"],
            "bits_per_byte": metrics["eval_bits_per_byte"],
            "learning_rate": self.latest.get("learning_rate"),
            "grad_norm": self.latest.get("grad_norm"),
            "tokens_per_second": speed,
            "mfu": flops / self.peak_flops if flops and self.peak_flops else None,
            "seconds": self._seconds(),
        }
        with open(Path(args.output_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        sample = self.trainer.sample
        if sample.sample_during_training and sample.max_new_tokens:
            with tqdm.external_write_mode(file=sys.stdout):
                print(sample_text(self.trainer.model, self.trainer.corpus.tokenizer, sample, args.seed), flush=True)
        self._print_row(row, (state.max_steps - state.global_step) * self.trainer.tokens_per_step)
        self._start_interval(state)
        self.resumed_at = time.perf_counter()

    def _print_row(self, row: dict, tokens_left: int) -> None:
        speed = row["tokens_per_second"]
        left = tqdm.format_interval(tokens_left / speed) if speed else None
        cells = [_shown(key, {**row, "seconds_left": left}[key]) for key in COLUMNS]
        with tqdm.external_write_mode(file=sys.stdout):
            print("  ".join(cells), flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def _shown(key: str, value) -> str:
    """The cell of a column; a dash where there is no value, of the same width."""
    pattern = COLUMNS[key][1]
    width = int(pattern[3:].split(".")[0].rstrip(",}") or 0)
    return "–".rjust(width) if value is None else pattern.format(value)


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """The lines of metrics.jsonl; where a resumed run passed a step again, the later line counts."""
    path = Path(run_dir, "metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    latest: dict[int, dict] = {}
    for row in rows:
        latest = {step: kept for step, kept in latest.items() if step < row["step"]} | {row["step"]: row}
    return list(latest.values())
