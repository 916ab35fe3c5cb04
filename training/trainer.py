"""GPTTrainer: transformers' Trainer with exact data position, our optimizers and evaluation, and its overheads off."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .arguments import DataArguments, GPTTrainingArguments, SampleArguments, fitting_micro_batches
from .callbacks import ConsoleTable, StopOnSignal
from .corpus import Corpus
from .dataset import EvaluationRows, Rows, TrainingRows, collate_rows
from .errors import UserError
from .evaluation import evaluate_rows
from .hardware import flops_per_token
from .optimizers import build_optimizer
from .push_while_training import PushesToHub


class StepSampler(Sampler):
    """Row indices in order, from the first row of the trainer's current step on: resuming replays nothing."""

    def __init__(self, trainer: "GPTTrainer"):
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.trainer.train_dataset)

    def __iter__(self):
        return iter(range(self.trainer.state.global_step * self.trainer.rows_per_step, len(self)))


class GPTTrainer(PushesToHub, Trainer):
    """The only training loop.

    model: a GPTForCausalLM, or any causal LM that takes `shift_labels`. corpus: prepared tokens, train and validation.
    data, sample: DataArguments (how windows are drawn) and SampleArguments (whether samples are shown on the way).
    Raises UserError when the loss stops being a number; the checkpoints before that are kept.
    """

    resume_command = "acorn resume"  # what continues a run of this kind

    def __init__(
        self,
        model,
        args: GPTTrainingArguments,
        corpus: Corpus,
        context_length: int,
        data: DataArguments | None = None,
        sample: SampleArguments | None = None,
    ):
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
        self._choose_callbacks()
        if args.compile_blocks:
            for layer in self.blocks(model):
                layer.compile()

    def build_rows(self, args: GPTTrainingArguments, data: DataArguments) -> tuple[Rows, Rows]:
        """Rows for all of training, and those of one evaluation; also counts the steps of `args` given in epochs."""
        tokens = self.corpus.tokens("train")
        args.count_steps(len(tokens) / self.tokens_per_step)
        rows = self.rows_per_step * args.max_steps
        return (
            TrainingRows(tokens, self.context_length, args.seed, rows, data.sampling),
            EvaluationRows(self.corpus.tokens("validation"), self.context_length),
        )

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
            generator=torch.Generator().manual_seed(args.seed),
            drop_last=True,
        )
        return self.accelerator.prepare(loader)

    def _init_training_state(self, max_steps, *others):
        """As in Trainer, but the intervals are those of today's arguments, not the checkpoint's."""
        trained = super()._init_training_state(max_steps, *others)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The checkpoint's state under today's learning rates and decay, which the state would silently replace."""
        if checkpoint is None:
            return
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        groups = [{key: v for key, v in group.items() if key != "params"} for group in self.optimizer.param_groups]
        rates = list(getattr(schedule, "base_lrs", []))
        super()._load_optimizer_and_scheduler(checkpoint)
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
        self.accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Our table's optimizer instead of transformers' `optim`."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.args)
        return self.optimizer

    def train(self, *args, **kwargs):
        """As in Trainer; the signals are Python's again however it ends."""
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

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that clipping measured; without clipping it is computed only where it will be shown."""
        step, intervals = self.state.global_step + 1, (self.state.logging_steps, self.state.eval_steps)
        is_shown = any(step % interval == 0 for interval in intervals if interval) or step == self.state.max_steps
        if grad_norm is None and not is_shown:
            return None
        return super()._get_grad_norm(model, grad_norm)

    # ---- evaluation and saving

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The whole validation split; the results are logged as `eval_loss` and so on."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        results = evaluate_rows(
            self.model_wrapped if is_sharded else self.model,
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
        self.save_model(str(aside), _internal_call=True)
        if self.args.should_save:
            for file in sorted(aside.iterdir()):
                if file.name != TRAINING_ARGS_NAME:  # a pickle, which nobody who loads the model needs
                    file.replace(root / file.name)
            shutil.rmtree(aside)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, after a look at the loss: training on with NaN would only spoil more."""
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop_on_nan(logs["loss"])
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        if not all(torch.isfinite(parameter).all() for parameter in self.model.parameters()):
            self._stop_on_nan(float("nan"))
        super()._save_checkpoint(model, trial)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As in Trainer; on a CPU, where looking costs nothing, each loss is checked as it comes."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            self._stop_on_nan(loss.item())
        return loss

    def _stop_on_nan(self, loss: float) -> None:
        raise UserError(
            f"loss is {loss} at step {self.state.global_step + 1}: training stopped, the checkpoints in "
            f"{self.args.output_dir} are from before; lower learning_rate (or use bf16 instead of fp16) and resume"
        )
