"""GPTTrainer: transformers' Trainer with exact data position, our optimizers and evaluation, and its overheads off."""

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, set_seed
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from modeling import GPTForCausalLM

from ..config.arguments import DataArguments, GPTTrainingArguments, SampleArguments, fitting_micro_batches
from ..data.corpus import Corpus
from ..data.dataset import EvaluationRows, Rows, StepSampler, collate_rows
from ..data.inputs import Inputs
from ..model.devices import allow_tf32
from ..model.optimizers import build_optimizer
from ..model.sizes import flops_per_token
from ..system.checkpoints import SAVING, move_into_root, processes_of, read_state, reading, rotate, seal, write_beside
from ..system.errors import UserError, is_disk_full
from ..system.run_files import STATE, missing_state
from ..system.shell import shell
from .callbacks import ConsoleTable, StopOnSignal
from .evaluation import evaluate_rows
from .fast_dropout import use_fast_dropout
from .push_while_training import PushesToHub
from .sharding import SavesWhole, is_finite


class GPTTrainer(PushesToHub, SavesWhole, Trainer):
    """The only training loop.

    model: a GPTForCausalLM, or any causal LM that takes `shift_labels`. corpus: prepared tokens, train and validation.
    data, sample: DataArguments (how windows are drawn) and SampleArguments (whether samples are shown on the way).
    Raises UserError when the loss stops being a number; the checkpoints before that are kept.
    """

    best_is_gone = False  # of a run that goes back: see checkpoints.restore_best_model

    def __init__(
        self,
        model,
        args: GPTTrainingArguments,
        corpus: Corpus,
        context_length: int,
        data: DataArguments | None = None,
        sample: SampleArguments | None = None,
    ):
        allow_tf32(args)
        self.rows_per_step = args.share_out(context_length)
        self.context_length = context_length
        self.tokens_per_step = args.tokens_per_step
        self.corpus = corpus
        self.sample = sample or SampleArguments()
        training_rows, evaluation_rows = self.build_rows(args, data or DataArguments())
        self.flops_per_token = self.count_flops(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_rows,
            train_dataset=training_rows,
            eval_dataset=evaluation_rows,
            processing_class=corpus.tokenizer,
        )
        self._is_one_cpu = args.world_size == 1 and args.device.type == "cpu"
        if args.device.type == "cpu":
            use_fast_dropout(model)
        self._all_parameters = list(model.parameters()) if self._is_one_cpu else []
        self._choose_callbacks()
        if args.compile_blocks is not None:
            for layer in self.blocks(model):
                layer.compile(**args.compile_blocks)

    def build_rows(self, args: GPTTrainingArguments, data: DataArguments) -> tuple[Rows, Rows]:
        """Rows for all of training, and those of one evaluation; also counts the steps of `args` given in epochs."""
        tokens = self.corpus.tokens("train")
        is_endless = args.max_steps > 0 and self.corpus.directory is None  # a stream has no length
        args.count_steps(0 if is_endless else len(tokens) / self.tokens_per_step)
        rows = self.rows_per_step * args.max_steps
        return (
            tokens.training_rows(self.context_length, args.order_seed, rows, data.sampling),
            EvaluationRows(self.corpus.tokens("validation"), self.context_length),
        )

    @property
    def inputs(self) -> Inputs:
        """What the run is grown from, by fingerprints."""
        return self.corpus.inputs

    def count_flops(self, model) -> float | None:
        """FLOPs of training on one token, or None where the architecture is not known."""
        return flops_per_token(model.config, self.context_length)

    def blocks(self, model) -> Iterable[nn.Module]:
        """The repeated layers, which `torch_compile` compiles one by one."""
        return model.get_decoder().layers

    def _choose_callbacks(self) -> None:
        for default in (PrinterCallback, ProgressCallback):
            self.remove_callback(default)
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self.stop_on_signal = StopOnSignal()
        self.console = ConsoleTable(self)
        self.add_callback(self.stop_on_signal)
        self.add_callback(self.console)

    # ---- data and optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Rows in the order of their index; the generator keeps the loader off the global random state."""
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            sampler=StepSampler(self),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            generator=torch.Generator().manual_seed(args.seed),
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

    def _init_training_state(self, max_steps, *others):
        """As in Trainer, but the intervals are those of today's arguments, not the checkpoint's."""
        trained = super()._init_training_state(max_steps, *others)
        self.state.compute_steps(self.args, max_steps)
        if self.best_is_gone:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        return trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The checkpoint's state under today's learning rates and decay, which the state would silently replace."""
        if checkpoint is None:
            return
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        groups = [{key: v for key, v in group.items() if key != "params"} for group in self.optimizer.param_groups]
        rates = list(getattr(schedule, "base_lrs", []))
        if not set(missing_state(Path(checkpoint))) - {"random state"}:
            with reading(checkpoint, "optimizer state"):
                super()._load_optimizer_and_scheduler(checkpoint)
        elif hasattr(schedule, "lr_lambdas"):  # a fresh optimizer, on the schedule's own step
            schedule.last_epoch = read_state(Path(checkpoint))["global_step"]
        if not hasattr(schedule, "lr_lambdas"):  # a rate that follows the losses is state, not an argument
            for group in groups:
                group.pop("lr")
        for group, today in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(today)
        if hasattr(schedule, "lr_lambdas"):
            schedule.base_lrs = rates
            for group, rate, shape in zip(self.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
                group["lr"] = rate * shape(schedule.last_epoch)

    def _update_auto_batch_size(self, batch_size: int) -> None:
        """After an out-of-memory error: the largest micro-batch up to `batch_size` that keeps the rows of a step."""
        args = self.args
        fitting = fitting_micro_batches(self.rows_per_step, args.world_size)
        size = max(n for n in fitting if n <= batch_size)
        super()._update_auto_batch_size(size)
        args.gradient_accumulation_steps = self.rows_per_step // (size * args.world_size)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Our table's optimizer instead of transformers' `optim`."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.args)
        return self.optimizer

    def train(self, *args, **kwargs):
        """As in Trainer; the signals are Python's again however it ends."""
        self.model.train()  # all of it: an adapter on a base in eval mode says that it is in training already
        try:
            return super().train(*args, **kwargs)
        finally:
            self.stop_on_signal.restore()

    # ---- overheads of Trainer, removed

    def floating_point_ops(self, inputs) -> float:
        """FLOPs of a micro-batch, from the shape: Trainer would walk the parameters each time."""
        return self.flops_per_token * inputs["input_ids"].numel()

    def _get_num_items_in_batch(self, batch_samples: list, device):
        """Counted labels of one step; training windows have no gaps, so nothing is counted or gathered."""
        micro_batches = len(batch_samples) * (self.args.world_size if self.args.average_tokens_across_devices else 1)
        return micro_batches * batch_samples[0]["shift_labels"].numel() if batch_samples else None

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As in Trainer; on a CPU, where looking costs nothing, each loss is checked as it comes."""
        step = self._light_step if self._is_one_cpu else super().training_step
        loss = step(model, inputs, num_items_in_batch)
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            self._stop_on_nan(loss.item())
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in Trainer, from the loss alone, with a smoothing that Trainer's own would lay on unshifted labels."""
        if isinstance(self.model, GPTForCausalLM):
            inputs = {**inputs, "return_logits": False, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _light_step(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Trainer's step without its walk over the modules, which no device's work hides on a CPU."""
        if not model.training:
            model.train()
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def _clip_grad_norm(self, model):
        """As in Trainer; on one CPU nothing is sharded, and nothing looks for shards at every step."""
        if not self._is_one_cpu:
            return super()._clip_grad_norm(model)
        return nn.utils.clip_grad_norm_(self._all_parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that clipping measured; without clipping it is computed only where it will be shown."""
        step, intervals = self.state.global_step + 1, (self.state.logging_steps, self.state.eval_steps)
        is_shown = any(step % interval == 0 for interval in intervals if interval) or step == self.state.max_steps
        if grad_norm is None and not is_shown:
            return None
        return super()._get_grad_norm(model, grad_norm)

    # ---- evaluation and saving

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass gathers weights, so that every process must go through it, as often as the others."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The whole validation split; the results are logged as `eval_loss` and so on."""
        results = evaluate_rows(
            self.model_wrapped if self.is_sharded else self.model,
            eval_dataset or self.eval_dataset,
            self.corpus.manifest["splits"]["validation"]["bytes"],
            self.args.per_device_eval_batch_size,
            self.compute_loss_context_manager,
            self.args.process_index,
            self.args.world_size,
        )
        if not math.isfinite(results["loss"]):
            self._stop_on_nan(results["loss"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_unless_done(self) -> None:
        """One evaluation at the very end where the interval does not fall on it, so that the best is the best."""
        if self.console.last_evaluated != self.state.global_step:
            metrics = self.evaluate()
            if self._determine_best_metric(metrics, trial=None):
                self._save_checkpoint(self.model_wrapped, trial=None)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """A new best model goes to the root of the run directory at once."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:
            self._save_root()
        return is_best

    def _save_root(self) -> None:
        """Write the model beside the root, then move it in file by file: the root can be loaded at every moment."""
        root, aside = Path(self.args.output_dir), Path(self.args.output_dir, ".saving")
        self._write_beside(
            aside,
            lambda: self.save_model(str(aside), _internal_call=True),
            lambda: move_into_root(aside, root, self.state.global_step),
        )

    def _write_beside(self, aside: Path, write: Callable[[], object], finish: Callable[[], object]) -> None:
        """As `write_beside`; where the disk is full the error also says what is left."""
        try:
            write_beside(aside, write, finish, self.args)
        except Exception as error:
            if is_disk_full(error):
                error.add_note(
                    f"What was half written at step {self.state.global_step} is removed, and what was there before is "
                    f"whole: `{shell('acorn', 'resume', Path(self.args.output_dir))}` goes on from it"
                )
            raise

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, after a look at the loss: training on with NaN would only spoil more."""
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop_on_nan(logs["loss"])
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        """What Trainer saves, written whole or not at all, with a manifest; only then older ones are rotated away."""
        if not self.accelerator.gather(is_finite(self.model).to(self.args.device).reshape(1)).all():
            self._stop_on_nan(float("nan"))
        checkpoint = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        aside = checkpoint.with_name(SAVING + checkpoint.name)
        self.store_flos()
        self.keep_unlogged_loss()
        best = checkpoint.with_name(f"checkpoint-{self.state.best_global_step}")
        if best == checkpoint or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        self._write_beside(aside, lambda: self._write_checkpoint(aside), lambda: seal(aside, checkpoint))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            rotate(checkpoint.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write_checkpoint(self, aside: Path) -> None:
        """The files of a checkpoint, by the parts of Trainer's own `_save_checkpoint`; the state comes last."""
        self.save_model(str(aside), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(aside))
            self._save_scaler(str(aside))
            self._save_rng_state(str(aside))
        if self.args.should_save:
            for part in [*self.callback_handler.callbacks, self.control]:
                if isinstance(part, ExportableState):
                    self.state.stateful_callbacks[type(part).__name__] = part.state()
            self.state.save_to_json(str(aside / STATE))

    def _finalize_training(self, *args):
        """As in Trainer, which with save_total_limit=1 would remove the last checkpoint, and the way to go on."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    # ---- what a resumed run takes up again

    def keep_unlogged_loss(self) -> None:
        """Note each process's summed loss since the last log, so that a resumed run logs the very same mean."""
        losses = self.accelerator.gather(self._tr_loss.detach().reshape(1)).tolist()
        self.console.unlogged = {"losses": losses, "since": self._globalstep_last_logged}

    def take_up_unlogged_loss(self, losses: list[float], since: int) -> None:
        """Go on with what `keep_unlogged_loss` noted; on another number of processes each takes the mean."""
        is_same = len(losses) == self.args.world_size
        self._tr_loss += losses[self.args.process_index] if is_same else math.fsum(losses) / len(losses)
        self._globalstep_last_logged = since

    def _load_from_checkpoint(self, checkpoint: str, model=None) -> None:
        with reading(checkpoint, "weights"):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_callback_state(self) -> None:
        """Counts go on where they were; Trainer would forget them, or build the callbacks anew from old arguments."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                saved = self.state.stateful_callbacks.get(type(callback).__name__, {})
                vars(callback).update(saved.get("attributes", {}))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As in Trainer; on another number of processes, for which there are no states, dropout draws anew."""
        before = processes_of(Path(checkpoint)) if checkpoint else 0
        if before in (0, self.args.world_size):
            with reading(checkpoint, "random state"):
                return super()._load_rng_state(checkpoint)
        set_seed(self.args.seed + self.state.global_step)  # the seed alone would repeat the masks of the first steps
        if self.is_world_process_zero():
            print(f"{before} → {self.args.world_size} processes: the samples of each step stay, dropout (if any) "
                  "draws other masks than the unbroken run", file=sys.stderr)  # fmt: skip

    def make_room(self) -> None:
        """Let go of model, gradients and optimizer, so that the device need not hold them beside the next model."""
        self.model = self.model_wrapped = self.deepspeed = self.optimizer = self.lr_scheduler = None
        self._all_parameters = []
        for name in ("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"):
            setattr(self.callback_handler, name, None)
        self.accelerator.free_memory()
        clear_device_cache(garbage_collection=True)

    def _stop_on_nan(self, loss: float) -> None:
        raise UserError(
            f"loss is {loss} at step {self.state.global_step + 1}: training stopped, the checkpoints in "
            f"{self.args.output_dir} are older; lower learning_rate (or use bf16 instead of fp16) and resume"
        )
