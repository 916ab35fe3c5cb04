"""What a person sees and can do while a run goes on: the progress bar, the table, metrics.jsonl, and stopping."""

import signal
import sys
import time
from datetime import timedelta

import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from modeling.kv_quantization import KVQuantizer

from ..model.devices import ACCELERATE_NAMES, device_peak_flops
from ..model.optimizers import set_momentum
from ..model.sampling import sample_text
from ..share.metrics_file import append_metrics
from ..system.distributed import max_over_processes
from ..system.errors import UserError, detach_closed_terminal

COLUMNS = {  # of the table: header, width, format
    "step": ("step", 8, ","),
    "tokens": ("tokens", 14, ","),
    "train_loss": ("train", 8, ".4f"),
    "eval_loss": ("valid", 8, ".4f"),
    "bits_per_byte": ("bpb", 7, ".4f"),
    "learning_rate": ("lr", 9, ".2e"),
    "grad_norm": ("grad", 7, ".3f"),
    "tokens_per_second": ("tok/s", 10, ",.0f"),
    "mfu": ("mfu", 6, ".1%"),
    "seconds_left": ("left", 9, ""),
}
HANGUP = getattr(signal, "SIGHUP", None)  # comes when the terminal is closed; Windows has none


class MomentumWarmup(TrainerCallback):
    """Before each step: Muon's momentum, which rises in a run's first ones."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        set_momentum(optimizer, args, state.global_step)


def check_quantization_start(config, args) -> None:
    """Refuse a start of what the model does not have."""
    if args.kv_quantization_start and getattr(config, "kv_quantization", None) is None:
        what = f"kv_quantization_start={args.kv_quantization_start:g}"
        raise UserError(f"{what}: has no effect without kv_quantization")


class QuantizationStart(TrainerCallback):
    """Train without the model's kv_quantization until its step has come."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.quantizers = [module for module in model.modules() if isinstance(module, KVQuantizer)]

    def on_step_begin(self, args, state, control, **kwargs):
        for quantizer in self.quantizers:
            quantizer.begins_later = state.global_step < args.kv_quantization_start


class StopOnSignal(TrainerCallback):
    """Ctrl-C, SIGTERM and SIGHUP finish the step, write a checkpoint and end the run; a second one ends it at once.

    SIGHUP stays ignored where nohup has it ignored. A signal reaches several processes at different steps, so at the
    end of each step they compare: all stop together. `received` is this process's own signal, `agreed` the one that the
    run stops for.
    """

    def __init__(self):
        self.received: int | None = None
        self.agreed: int | None = None
        self._group = None
        self._previous: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.restore()  # auto_find_batch_size begins more than once
        if args.world_size > 1 and self._group is None:  # compared on the CPU, so that no GPU is waited for
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))
        self._is_first = state.is_world_process_zero
        hangup = [HANGUP] if HANGUP and signal.getsignal(HANGUP) is not signal.SIG_IGN else []
        for number in (signal.SIGINT, signal.SIGTERM, *hangup):
            self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if number == HANGUP:
            detach_closed_terminal()
        if self.received is None and self._is_first:
            print(f"\n{signal.Signals(number).name}: finishing this step and saving …", file=sys.stderr)
        self.received = self.received or number
        if self._group is None:
            self.restore()
        else:  # torchrun sends SIGTERM after the terminal's SIGINT: only a second one of a kind ends it at once
            signal.signal(number, self._previous.pop(number))

    def on_step_end(self, args, state, control, **kwargs):
        number = self.received or 0
        if self._group is not None:
            number = max_over_processes(number, self._group)
        if number:
            self.agreed = number
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


# What a checkpoint keeps of the table, so that the rows of a resumed run are those of the unbroken one.
KEPT = "loss_sum loss_steps training_seconds last_logged interval_start latest last_evaluated unlogged".split()


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
        self.unlogged: dict = {}  # the losses since the last log: see keep_unlogged_loss
        self._start_interval(0)

    def state(self) -> dict:
        """What goes into a checkpoint; ResumeCallback sets the attributes again."""
        kept = {name: getattr(self, name) for name in KEPT}
        return {"args": {}, "attributes": {**kept, "seconds_before": self._seconds()}}

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.resumed_at = time.perf_counter()
        if state.global_step and self.unlogged:
            self.trainer.restore_unlogged_loss(**self.unlogged)
        if self.last_logged > state.global_step or not self.unlogged:  # a new run, or one of an Acorn that kept less
            self._start_interval(state.global_step)
        precision = ACCELERATE_NAMES.get(self.trainer.accelerator.mixed_precision, "")
        peak = args.peak_flops or device_peak_flops(args.device, precision, args.tf32 is not False)
        self.peak_flops = peak * args.world_size if peak else None
        if state.is_world_process_zero:
            print_cells([header for header, _, _ in COLUMNS.values()])
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=args.disable_tqdm,
                file=sys.stderr, mininterval=0.5,
            )  # fmt: skip

    def _start_interval(self, step: int) -> None:
        self.loss_sum, self.loss_steps, self.training_seconds = 0.0, 0, 0.0
        self.last_logged = self.interval_start = step

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps  # Trainer counts anew after a resume that replays nothing
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
                self.bar.set_postfix(loss=f"{logs['loss']:.4f}", tok_s=f"{self._tokens_per_second():,.0f}")
        self.resumed_at = now

    def on_save(self, args, state, control, **kwargs):
        self.resumed_at = time.perf_counter()

    def _tokens_per_second(self) -> float | None:
        steps = self.last_logged - self.interval_start
        return steps * self.trainer.tokens_per_step / self.training_seconds if self.training_seconds else None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.last_evaluated = state.global_step
        sample = self._draw_sample(args)
        if not state.is_world_process_zero:
            return
        speed = self._tokens_per_second()
        flops = speed * self.trainer.flops_per_token if speed else None
        row = {
            "step": state.global_step,
            "tokens": state.global_step * self.trainer.tokens_per_step,
            "train_loss": self.loss_sum / self.loss_steps if self.loss_steps else None,
            "eval_loss": metrics["eval_loss"],
            "bits_per_byte": metrics["eval_bits_per_byte"],
            "token_accuracy": metrics.get("eval_token_accuracy"),
            "learning_rate": self.latest.get("learning_rate"),
            "grad_norm": self.latest.get("grad_norm"),
            "tokens_per_second": speed,
            "mfu": flops / self.peak_flops if flops and self.peak_flops else None,
            "seconds": self._seconds(),
        }
        append_metrics(args.output_dir, row)
        if sample:
            with tqdm.external_write_mode(file=sys.stdout):
                print(sample, flush=True)
        self._print_row(row, (state.max_steps - state.global_step) * self.trainer.tokens_per_step)
        self._start_interval(state.global_step)
        self.resumed_at = time.perf_counter()

    def _draw_sample(self, args) -> str:
        """A sample where they are wanted on the way; all processes draw it, as a sharded model needs them all."""
        trainer, sample = self.trainer, self.trainer.sample
        if not (sample.sample_during_training and sample.max_new_tokens):
            return ""
        is_in_step = trainer.is_sharded and args.world_size > 1
        return sample_text(trainer.model, trainer.corpus.tokenizer, sample, args.seed, synced_gpus=is_in_step)

    def _print_row(self, row: dict, tokens_left: int) -> None:
        speed = row["tokens_per_second"]
        left = tqdm.format_interval(tokens_left / speed) if speed else None
        row = {**row, "seconds_left": left}
        cells = ["–" if row[key] is None else format(row[key], kind) for key, (_, _, kind) in COLUMNS.items()]
        with tqdm.external_write_mode(file=sys.stdout):
            print_cells(cells)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def print_cells(cells: list[str]) -> None:
    """A line of the table, each cell as wide as its column."""
    widths = (width for _, width, _ in COLUMNS.values())
    print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), flush=True)
