"""The dataclasses that recipes and flags fill; a field with a help text is one that `--help` shows."""

import math
import sys
from dataclasses import dataclass, field, fields
from typing import Any

from accelerate.utils import patch_environment
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..model.devices import ACCELERATE_PRECISIONS, choose_precision, plan_compilation
from ..model.optimizers import FIRST_MOMENTUM, OPTIMIZERS
from ..system.errors import UserError
from .checks import check_installed, check_needs, check_schedule, settle_metric
from .publishing import check_hub_arguments, check_language, check_license


def help_field(text: str, default: Any = None, **kwargs) -> Any:
    """A dataclass field with a help text, as HfArgumentParser reads them."""
    return field(metadata={"help": text}, **(kwargs or {"default": default}))


@dataclass
class DataArguments:
    """Where the text comes from, how it becomes tokens, and which part of it is held out for validation."""

    text_files: list[str] = help_field("Text files, directories, globs or URLs; a document each.", default_factory=list)
    data_files: list[str] = help_field("JSON, CSV, Parquet or Arrow files; a document per row.", default_factory=list)
    dataset: str | None = help_field("Dataset on the Hub, local dataset directory, or python-stdlib (no download).")
    dataset_config: str | None = help_field("Configuration of the Hub dataset.")
    dataset_split: str = help_field("Split of the Hub dataset.", "train")
    text_column: str = help_field("Column that holds the text.", "text")
    streaming: bool = help_field("Tokenize during training instead of preparing the corpus first.", False)
    mixture: list[dict] = help_field("List of sources with the keys above and a weight each.", default_factory=list)
    tokenizer: str = help_field("byte, char, bpe, or the Hub id or path of a Hugging Face tokenizer.", "byte")
    tokenizer_vocab_size: int | None = help_field("Vocabulary size of a bpe tokenizer (default: up to 4096).")
    validation_fraction: float = help_field("Fraction of the text or documents held out for validation.", 0.1)
    validation_by: str = help_field("Hold out the end of the text (position) or random documents.", "position")
    validation_seed: int = help_field("Seed of the random choice of validation documents.", 2357)
    validation_characters: int | None = help_field("With --streaming: characters held out (default: 200000).")
    data_dir: str | None = help_field("Directory of the prepared tokens (default: corpora/NAME-FINGERPRINT).")
    shard_size: int = help_field("Tokens per shard file.", 100_000_000)
    num_proc: int = help_field("Number of tokenizing processes; 1 uses the tokenizer's own threads.", 1)
    on_bad_file: str = help_field("What to do about an unreadable file or row: stop or skip.", "stop")
    sampling: str = help_field("Training sequences: random offsets, shuffled (once per epoch), or lanes.", "random")
    document_masking: bool = help_field("Attend within a document only, not to those before it in a row.", False)


@dataclass
class SampleArguments:
    """The text generated at the end of a run, and at each evaluation if `sample_during_training`."""

    prompt: str = help_field("Text that the sample continues.", "\n")
    max_new_tokens: int = help_field("Length of the sample in tokens; 0 generates none.", 300)
    temperature: float = help_field("Sampling temperature; 0 is greedy.", 0.8)
    top_k: int | None = help_field("Sample from the k most likely tokens.", 200)
    top_p: float | None = help_field("Sample from the most likely tokens whose probabilities add up to this.")
    sample_during_training: bool = help_field("Also generate a sample at each evaluation.", False)


@dataclass
class CardArguments:
    """What the model card cannot know by itself."""

    license: str | None = help_field("License of the weights by its Hub name, such as apache-2.0.")
    language: list[str] = help_field("ISO 639 codes of the text, such as en; `code` for code.", default_factory=list)

    def __post_init__(self):
        check_license(self.license)
        check_language(self.language)


_CHECKPOINTING = [(f"activation{name}", f"gradient{name}") for name in ("_checkpointing", "_checkpointing_kwargs")]


@dataclass
class GPTTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with nanoGPT's defaults, its overheads off, and a few fields more."""

    output_dir: str | None = help_field("Run directory (default: runs/RECIPE).")
    max_steps: int = help_field("Number of optimizer steps; -1 trains for num_train_epochs.", -1)
    num_train_epochs: float = help_field("Number of epochs if max_steps is -1.", 1.0)
    tokens_per_step: int | None = help_field("Tokens per optimizer step; sets gradient_accumulation_steps.")
    per_device_train_batch_size: int = help_field("Sequences per device in one forward pass.", 12)
    per_device_eval_batch_size: int = help_field("Sequences per device in one forward pass of evaluation.", 32)
    train_memory_length: int | None = help_field("Tokens of memory in training (default: memory_length).")
    memory_reset_probability: float = help_field("Probability that a lane's memory is emptied at a step.", 0.0)
    kv_quantization_start: float = help_field("Steps (below 1: share) before kv_quantization begins in training.", 0)
    optimizer: str = help_field(f"Optimizer: {' or '.join(OPTIMIZERS)}.", "adamw")
    learning_rate: float = help_field("Peak learning rate of AdamW.", 6e-4)
    muon_learning_rate: float = help_field("Peak learning rate of the hidden matrices under muon.", 0.02)
    muon_momentum: float = 0.95
    muon_momentum_warmup_steps: float = help_field("Steps (below 1: share) in which momentum rises from 0.85.", 0)
    muon_beta2: float = help_field("Under normuon: decay of the mean square of a neuron's steps.", 0.95)
    lr_scheduler_type: str = help_field("Learning rate schedule, as in transformers.", "cosine_with_min_lr")
    lr_scheduler_kwargs: dict | None = help_field("Arguments of the schedule, such as {min_lr_rate: 0.1}.")
    warmup_steps: float = help_field("Steps of linear warmup; below 1, the fraction of all steps.", 100)
    weight_decay: float = help_field("Weight decay of matrices (under muon: of the hidden matrices).", 0.1)
    average_decay: float | None = help_field("Evaluate and save an average of the weights: EMA's decay, or 1 for SWA.")
    average_start: float = help_field("Steps (below 1: share) before the average begins.", 0)
    adam_beta2: float = 0.95
    max_grad_norm: float = help_field("Maximum gradient norm; 0 does not clip.", 1.0)
    precision: str = help_field("auto (bf16 if the device supports it, else fp32), fp32, bf16 or fp16.", "auto")
    force_precision: bool = help_field("Train in this precision even if the device only emulates it.", False)
    bf16: bool | None = None  # of transformers, and fp16: the same as --precision
    fp16: bool | None = None
    torch_compile: bool = help_field("Compile the model with torch.compile.", False)
    compile_scope: str = help_field("With --torch_compile: compile each block (blocks) or the whole model.", "blocks")
    activation_checkpointing: bool | None = help_field("Recompute activations in the backward pass to save memory.")
    activation_checkpointing_kwargs: dict | None = None
    gradient_checkpointing: bool | None = None  # the name before transformers 5.23
    gradient_checkpointing_kwargs: dict | None = None
    peak_flops: float | None = help_field(
        "Peak FLOP/s of the device, for MFU (default: common GPUs', a CPU's measured)."
    )
    eval_strategy: str = help_field("When to evaluate: steps, epoch or no.", "steps")
    eval_steps: float | None = help_field("Steps between evaluations; below 1, the fraction of all steps.", 250)
    save_strategy: str = help_field("When to save checkpoints: steps, epoch, best or no.", "steps")
    save_steps: float | None = help_field("Steps between checkpoints (default: eval_steps).")
    save_total_limit: int | None = help_field("Number of checkpoints kept, the best and the last among them.", 2)
    logging_steps: float | None = help_field("Steps between updates of the loss (default: eval_steps / 10).")
    metric_for_best_model: str | None = help_field("Metric that selects the best checkpoint.", "loss")
    greater_is_better: bool | None = None  # as the metric is
    early_stopping_patience: int | None = help_field("Stop after this many evaluations without a better metric.")
    seed: int = help_field("Seed of initialization, data order and dropout.", 1337)
    report_to: list[str] = help_field("Trackers, such as tensorboard; none or all.", default_factory=lambda: ["none"])
    push_to_hub: bool = help_field("Upload the run to the Hub at every save.", False)
    hub_model_id: str | None = help_field("Repository on the Hub (default: the name of output_dir).")
    debug: list[str] = field(default_factory=list)
    log_level_replica: str = "error"
    # What Acorn's loop decides; `REFUSED` says where.
    do_train: bool = True
    optim: str = "adamw_torch_fused"
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    ignore_data_skip: bool = True
    ddp_find_unused_parameters: bool | None = False
    prediction_loss_only: bool = True
    dataloader_drop_last: bool = True

    def __post_init__(self):
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ["none"])
        check_hub_arguments(self)
        settle_metric(self)
        check_installed(self)
        check_needs(self)
        self._settle_checkpointing()
        if self.save_steps is None:
            self.save_steps = self.eval_steps or 500
        if self.logging_steps is None:
            self.logging_steps = max(1, int(self.eval_steps or 100) // 10)
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        check_schedule(self)
        if self.muon_momentum_warmup_steps and self.muon_momentum <= FIRST_MOMENTUM:
            rise = f"the momentum rises from {FIRST_MOMENTUM} to muon_momentum={self.muon_momentum}"
            raise UserError(
                f"muon_momentum_warmup_steps={self.muon_momentum_warmup_steps}: {rise}; raise that, or leave it out"
            )
        self.compile_blocks = plan_compilation(self)
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a log file has no use for a bar
        self.precision, self.precision_reason = choose_precision(self)
        self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        # transformers takes the launcher's word where neither of the two is set.
        with patch_environment(ACCELERATE_MIXED_PRECISION=ACCELERATE_PRECISIONS[self.precision]):
            super().__post_init__()
        if self.n_gpu > 1:
            self._n_gpu = 1  # one process drives one GPU; DataParallel would be slower than it and split every batch

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data: `data_seed`, or the run's own."""
        return self.seed if self.data_seed is None else self.data_seed

    def share_out(self, context_length: int, processes: int | None = None) -> int:
        """Set the accumulation that makes `tokens_per_step` on the processes there are (or so many); return its rows.

        Without `tokens_per_step` it is what the batch sizes given make. A micro-batch that one process could do, but
        that is more than the share of each of several, becomes that share. Raises UserError where it does not divide.
        """
        processes = processes or self.world_size
        if self.tokens_per_step is None:
            at_once = self.per_device_train_batch_size * processes
            self.tokens_per_step = at_once * self.gradient_accumulation_steps * context_length
        rows, rest = divmod(self.tokens_per_step, context_length)
        if rest or not rows:
            near = context_length * max(1, round(self.tokens_per_step / context_length))
            what = f"not a multiple of the context, {context_length}"
            raise UserError(f"tokens_per_step={self.tokens_per_step}: {what}; the nearest is {near}")
        share, size = rows // processes, self.per_device_train_batch_size
        if share * processes == rows and share < size <= rows:
            self.per_device_train_batch_size = share
        at_once = self.per_device_train_batch_size * processes
        if rows % at_once:
            raise UserError(_does_not_divide(self, rows, context_length, processes))
        accumulation = rows // at_once
        if self.gradient_accumulation_steps not in (1, accumulation):
            given = f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            instead = "leave one out (--tokens_per_step none, if it is the recipe's)"
            raise UserError(f"{given}: tokens_per_step={self.tokens_per_step} makes it {accumulation}; {instead}")
        self.gradient_accumulation_steps = accumulation
        return rows

    def count_steps(self, steps_an_epoch: float) -> None:
        """Turn epochs, and a cool-down that is given as a share of the run, into steps."""
        if self.max_steps <= 0:
            self.max_steps = math.ceil(self.num_train_epochs * steps_an_epoch)
        for what in ("eval", "save", "logging"):  # Trainer's epoch is all of training: the rows are drawn for all of it
            if getattr(self, f"{what}_strategy") == "epoch":
                if not steps_an_epoch:
                    raise UserError(f"{what}_strategy='epoch': a stream has no end; use steps and {what}_steps")
                setattr(self, f"{what}_strategy", IntervalStrategy.STEPS if what != "save" else SaveStrategy.STEPS)
                setattr(self, f"{what}_steps", min(self.max_steps, math.ceil(steps_an_epoch)))
        for name in ("muon_momentum_warmup_steps", "average_start", "kv_quantization_start"):
            value = getattr(self, name)
            steps = round(value * self.max_steps) if 0 < value < 1 else int(value)
            setattr(self, name, steps)
            if name.endswith("_start") and steps >= self.max_steps > 0:
                what = f"{name}={value:g}" + (f", step {steps}" if value < 1 else "")
                raise UserError(f"{what}: the run ends with step {self.max_steps}; lower it")
        decay = (self.lr_scheduler_kwargs or {}).get("num_decay_steps")
        if decay is not None and 0 < decay < 1:
            self.lr_scheduler_kwargs = {**self.lr_scheduler_kwargs, "num_decay_steps": round(decay * self.max_steps)}

    @property
    def is_compiled(self) -> bool:
        """Whether torch compiles the model: block by block by ourselves, or whole by Accelerate."""
        return self.torch_compile or self.compile_blocks is not None

    @property
    def checkpoints_activations(self) -> bool:
        """Whether blocks are computed twice, by whichever of its two names that was asked for."""
        return bool(self.activation_checkpointing or self.gradient_checkpointing)

    def _settle_checkpointing(self) -> None:
        """Both names of activation checkpointing are one, in versions of transformers that know one of them as well."""
        for new, old in _CHECKPOINTING:
            value = getattr(self, old) if getattr(self, new) is None else getattr(self, new)
            is_known = any(f.name == new for f in fields(TrainingArguments))
            setattr(self, new, value)
            setattr(self, old, None if is_known else value)  # where both are known, the old one warns


def fitting_micro_batches(rows: int, processes: int) -> list[int]:
    """The micro-batches that share out the rows of a step evenly over so many processes, from small to large."""
    share, rest = divmod(rows, processes)
    return [] if rest else [size for size in range(1, share + 1) if share % size == 0]


def _does_not_divide(args: GPTTrainingArguments, rows: int, context_length: int, processes: int) -> str:
    """The refusal that names the nearest micro-batches that would do, or the nearest numbers of processes."""
    size = args.per_device_train_batch_size
    what = f"tokens_per_step={args.tokens_per_step} ({rows} sequences of {context_length})"
    fitting = fitting_micro_batches(rows, processes)
    if not fitting:
        counts = [count for count in range(1, 2 * processes) if rows % count == 0]
        return f"{what} does not divide among {processes} processes; {_nearest(counts, processes)} would do"
    return f"per_device_train_batch_size={size}: {what} needs {_nearest(fitting, size)} on {processes} process(es)"


def _nearest(numbers: list[int], wanted: int) -> str:
    return " or ".join(map(str, sorted(sorted(numbers, key=lambda number: (abs(number - wanted), -number))[:2])))
