"""GPTTrainer: transformers' Trainer with exact data position, our optimizers and evaluation, and its overheads off."""

import math
from collections.abc import Iterable

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..config.arguments import DataArguments, GPTTrainingArguments, SampleArguments, fitting_micro_batches
from ..data.corpus import Corpus, Inputs
from ..data.dataset import IGNORED, EvaluationRows, Rows, collate_rows
from ..model.devices import allow_tf32
from ..model.optimizers import build_optimizer
from ..model.sizes import flops_per_token
from .averaging import AverageCallback, AveragesWeights
from .callbacks import ConsoleTable, MomentumWarmup, QuantizationStart, StopOnSignal, check_quantization_start
from .checkpointing import CheckpointingTrainer, ResumeCallback
from .evaluation import evaluate_rows
from .fast_on_cpu import use_fast_dropout, use_fast_norms
from .lanes import StepSampler, documents_apart, tell_flash_attention, training_rows
from .memory import CarriesMemory, check_memory
from .push_while_training import PushesToHub

# Every private method of transformers' Trainer that GPTTrainer and its classes override or call, and its parameters:
# the same in transformers 5.17 to 5.24. tests/test_trainer_overheads.py compares them with those of the installed one.
PRIVATE_METHODS = {
    # overridden
    "_determine_best_metric": "metrics trial",
    "_finalize_training": "trial num_train_samples start_time",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_save_checkpoint": "model trial",
    # called
    "_save": "output_dir state_dict",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "_save_scaler": "output_dir",
}


class GPTTrainer(PushesToHub, AveragesWeights, CarriesMemory, CheckpointingTrainer):
    """The only training loop.

    model: a GPTForCausalLM. corpus: prepared tokens, train and validation. data, sample: DataArguments (how training
    sequences are drawn) and SampleArguments (whether samples are shown on the way).
    Raises UserError when the loss stops being a number; the checkpoints before that are kept.
    """

    labels_differ = False  # in number from process to process: training sequences have no gaps

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
        data = data or DataArguments()
        self.train_memory_length = self.memory_in_training(model, args, data)
        training_rows, evaluation_rows = self.build_rows(args, data)
        check_quantization_start(model.config, args)
        self.flops_per_token = self.count_flops(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_rows,
            train_dataset=training_rows,
            eval_dataset=evaluation_rows,
            processing_class=corpus.tokenizer,
        )
        if args.device.type == "cpu":
            use_fast_dropout(model)
            if not args.is_compiled:
                use_fast_norms(model)
        if data.document_masking:
            tell_flash_attention(model)
        self._choose_callbacks()
        if args.compile_blocks is not None:
            for layer in self.blocks(model):
                layer.compile(**args.compile_blocks)

    def build_rows(self, args: GPTTrainingArguments, data: DataArguments) -> tuple[Rows, Rows]:
        """Rows for all of training, and those of one evaluation; also counts the steps of `args` given in epochs."""
        tokens, context = self.corpus.tokens("train"), self.context_length
        is_endless = args.max_steps > 0 and self.corpus.directory is None  # a stream has no length
        args.count_steps(0 if is_endless else len(tokens) / self.tokens_per_step)
        rows = self.rows_per_step * args.max_steps
        training = training_rows(tokens, data, args, context, self.rows_per_step, rows)
        evaluation = EvaluationRows(self.corpus.tokens("validation"), context)
        return tuple(documents_apart(rows, self.corpus, data) for rows in (training, evaluation))

    def memory_in_training(self, model, args: GPTTrainingArguments, data: DataArguments) -> int:
        """How many tokens of memory each lane is trained with."""
        return check_memory(model.config, data, args)

    @property
    def inputs(self) -> Inputs:
        """What the run is grown from, by fingerprints."""
        return self.corpus.inputs

    def count_flops(self, model) -> float:
        """FLOPs of training on one token."""
        return flops_per_token(model.config, self.context_length + self.train_memory_length)

    def blocks(self, model) -> Iterable[nn.Module]:
        """The repeated layers, which `torch_compile` compiles one by one."""
        return model.get_decoder().layers

    def _choose_callbacks(self) -> None:
        for default in (PrinterCallback, ProgressCallback):
            self.remove_callback(default)
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        if self.args.kv_quantization_start:
            self.add_callback(QuantizationStart())
        self.stop_on_signal = StopOnSignal()
        self.console = ConsoleTable(self)
        self.add_callback(ResumeCallback(self))
        if self.args.muon_momentum_warmup_steps:
            self.add_callback(MomentumWarmup())
        if self.args.average_decay is not None:
            self.add_callback(AverageCallback(self))
        self.add_callback(self.stop_on_signal)
        self.add_callback(self.console)

    # ---- data and optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Rows in the order of their index; the generator keeps the loader off the global random state.

        After an out-of-memory error, under auto_find_batch_size, the micro-batch is the largest that divides a step.
        """
        args = self.args
        fitting = fitting_micro_batches(self.rows_per_step, args.world_size)
        self._train_batch_size = max(size for size in fitting if size <= self._train_batch_size)
        accumulation = self.rows_per_step // (self._train_batch_size * args.world_size)
        if accumulation != args.gradient_accumulation_steps and args.compile_blocks is not None:
            torch.compiler.reset()  # a second size would be compiled for any size, which is slower
        args.gradient_accumulation_steps = accumulation
        self.memories = []
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

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Our table's optimizer instead of transformers' `optim`."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.args)
        return self.optimizer

    def train(self, *args, **kwargs):
        """As in Trainer; the signals are Python's again however it ends."""
        self.model.train()  # all of it: an adapter on a base in eval mode says that it is in training already
        try:
            result = super().train(*args, **kwargs)
        finally:
            self.stop_on_signal.restore()
        self.finish_pushes()
        return result

    # ---- a step

    def floating_point_ops(self, inputs) -> float:
        """FLOPs of a micro-batch, from the shape: Trainer would walk the parameters each time."""
        return self.flops_per_token * inputs["input_ids"].numel()

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """As in Trainer: (micro-batches of a step, labels that count in it over all of them and all processes)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counted = sum((batch["shift_labels"] != IGNORED).sum() for batch in batches).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counted = self.accelerator.gather(counted).sum() if self.labels_differ else counted * self.args.world_size
        return batches, counted.clamp(min=1)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """As in Trainer; on a CPU, where looking costs nothing, each loss is checked as it comes."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            self.stop_on_nan(loss.item())
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in Trainer, from the loss alone, with a smoothing that Trainer's own would lay on unshifted labels."""
        inputs = {**inputs, "return_logits": False, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, *args, **kwargs)

    # ---- evaluation and saving

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass gathers weights, so that every process must go through it, as often as the others."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The whole validation split, read by the average of the weights if there is one; logged as `eval_loss` …"""
        with self.averaged():
            return self._evaluate_weights(eval_dataset, metric_key_prefix)

    def _evaluate_weights(self, eval_dataset, metric_key_prefix: str) -> dict[str, float]:
        results = evaluate_rows(
            self.model_wrapped if self.is_sharded else self.model,
            eval_dataset or self.eval_dataset,
            self.corpus.manifest["splits"]["validation"]["bytes"],
            self.args.per_device_eval_batch_size,
            self.compute_loss_context_manager,
            self.args.process_index,
            self.args.world_size,
            memory_length=self.memory_in_evaluation(),
        )
        if not math.isfinite(results["loss"]):
            self.stop_on_nan(results["loss"])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def memory_in_evaluation(self) -> int:
        """How many tokens of memory the rows of an evaluation, which follow each other, are read with."""
        return self.accelerator.unwrap_model(self.model).config.memory_length

    def evaluate_unless_done(self) -> None:
        """One evaluation at the very end where the interval does not fall on it, so that the best is the best."""
        if self.console.last_evaluated != self.state.global_step:
            metrics = self.evaluate()
            if self._determine_best_metric(metrics, trial=None):
                self._save_checkpoint(self.model_wrapped, trial=None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, after a look at the loss: training on with NaN would only spoil more."""
        if not math.isfinite(logs.get("loss", 0.0)):
            self.stop_on_nan(logs["loss"])
        super().log(logs, start_time)

    def free_device_memory(self) -> None:
        """Let go of model, gradients and optimizer, so that the device need not hold them beside the next model."""
        self.model = self.model_wrapped = self.deepspeed = self.optimizer = self.lr_scheduler = None
        self.let_go_of_average()
        for name in ("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"):
            setattr(self.callback_handler, name, None)
        self.accelerator.free_memory()
        clear_device_cache(garbage_collection=True)
