"""The dataclasses that recipes and flags fill; what each field means is its `help`."""

import math
import sys
from dataclasses import dataclass, field, fields

from accelerate.utils import patch_environment
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..model.compiling import plan_compilation
from ..model.optimizers import OPTIMIZERS
from ..model.precision import ACCELERATE, choose
from ..system.errors import UserError
from .choices import RISING, check_choices, check_names, check_needs, check_schedule, settle_metric
from .fields import refuse_other_values
from .publishing import check_hub_arguments, check_language, check_license


def _none() -> list[str]:
    return ["none"]


def help_field(help_text: str, default=None, **kwargs):
    kwargs = kwargs or {"default": default}
    return field(metadata={"help": help_text}, **kwargs)


@dataclass
class DataArguments:
    """Where the text comes from, how it becomes tokens and which part of it validates."""

    text_files: list[str] = help_field(
        "Text files, folders, globs or http(s) addresses; a file is a document.", default_factory=list
    )
    data_files: list[str] = help_field(
        "JSON, CSV, parquet or arrow files, globs or addresses, compressed or not.", default_factory=list
    )
    dataset: str | None = help_field("A Hub data set id, a local directory of one, or python-stdlib (no download).")
    dataset_config: str | None = help_field("Configuration of the Hub data set.")
    dataset_split: str = help_field("Split of the Hub data set.", "train")
    text_column: str = help_field("The column that holds the text.", "text")
    streaming: bool = help_field(
        "Prepare nothing: text becomes tokens as training goes (acorn prepare: copy nothing from the Hub).", False
    )
    mixture: list[dict] = help_field(
        "Several sources, each with the keys above and a weight (in a recipe file).", default_factory=list
    )
    tokenizer: str = help_field("byte, char, bpe, or any Hugging Face tokenizer by id or path.", "byte")
    tokenizer_vocab_size: int | None = help_field(
        "Vocabulary size of a bpe tokenizer trained on the text [4096 or fewer]."
    )
    validation_fraction: float = help_field("Share of the text, or of the documents, that validates.", 0.1)
    validation_by: str = help_field("position (the end of the text) or documents (a seeded choice).", "position")
    validation_seed: int = help_field("Seed of the choice of documents.", 2357)
    validation_characters: int | None = help_field(
        "With --streaming: so many, the first of the text, validate [200000]."
    )
    data_dir: str | None = help_field("Where the prepared tokens live (default: corpora/NAME-FINGERPRINT).")
    shard_size: int = help_field("Tokens a shard file.", 100_000_000)
    num_proc: int = help_field("Processes that tokenise; 1 is this one, with the tokenizer's own threads.", 1)
    on_bad_file: str = help_field(
        "A file or row that cannot be read: stop, or skip (what could be read is kept).", "stop"
    )
    sampling: str = help_field("How training windows are drawn: random (as nanoGPT), or shuffled: each once.", "random")

    def __post_init__(self):
        check_names(self)


@dataclass
class SampleArguments:
    """What is written at the end of a run, and at each evaluation if `sample_during_training`."""

    prompt: str = help_field("Text that the sample continues.", "\n")
    max_new_tokens: int = help_field("Length of the sample in tokens; 0 writes none.", 300)
    temperature: float = help_field("Below one is safer, above one is wilder; 0 is greedy.", 0.8)
    top_k: int | None = help_field("Sample among the k likeliest tokens.", 200)
    top_p: float | None = help_field("Sample among the likeliest tokens that hold this probability.")
    sample_during_training: bool = help_field("Also write a sample at each evaluation.", False)


@dataclass
class CardArguments:
    """What the model card cannot know by itself."""

    license: str | None = help_field(
        "Licence of the weights, by its Hub name, such as apache-2.0 (default: none chosen)."
    )
    language: list[str] = help_field("ISO 639 codes of the text, such as en; `code` for code.", default_factory=list)

    def __post_init__(self):
        check_license(self.license)
        check_language(self.language)


_CHECKPOINTING = [(f"activation{name}", f"gradient{name}") for name in ("_checkpointing", "_checkpointing_kwargs")]


@dataclass
class GPTTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with nanoGPT's defaults, its overheads off, and a few fields more."""

    optimizer: str = help_field(f"One of {', '.join(OPTIMIZERS)}.", "adamw")
    muon_learning_rate: float = help_field("Learning rate of the hidden matrices under muon.", 0.02)
    muon_momentum: float = help_field("Momentum of the hidden matrices under muon.", 0.95)
    early_stopping_patience: int | None = help_field("Stop after so many evaluations without a better validation loss.")
    precision: str = help_field(
        "auto (bf16 where the device multiplies it natively, else fp32), fp32, bf16 or fp16.", "auto"
    )
    force_precision: bool = help_field("Take the precision asked for even where the device only emulates it.", False)
    bf16: bool | None = help_field("The same as --precision bf16; false: as fp32.")
    fp16: bool | None = help_field("The same as --precision fp16.")
    compile_scope: str = help_field("With --torch_compile: blocks (quick to compile) or model.", "blocks")
    peak_flops: float | None = help_field("Peak FLOP/s of the device, for MFU (known GPUs need none).")

    tokens_per_step: int | None = help_field(
        "Tokens of one optimizer step, over all processes; gradient accumulation follows from it."
    )
    per_device_train_batch_size: int = help_field("Windows a micro-batch and process.", 12)
    per_device_eval_batch_size: int = help_field("Windows an evaluation batch and process.", 32)
    max_steps: int = help_field("Optimizer steps; -1 takes num_train_epochs passes over the text.", -1)
    num_train_epochs: float = help_field("Passes over the text when max_steps is -1.", 1.0)
    learning_rate: float = help_field("Peak learning rate of AdamW.", 6e-4)
    lr_scheduler_type: str = help_field(
        "cosine_with_min_lr, warmup_stable_decay, constant_with_warmup, or another of transformers' schedules.",
        "cosine_with_min_lr",
    )
    warmup_steps: float = help_field("Steps (or, below one, the share of steps) of linear warm-up.", 100)
    weight_decay: float = help_field("Decay of matrices (under muon: of the hidden ones).", 0.1)
    adam_beta2: float = help_field("AdamW's second beta.", 0.95)
    max_grad_norm: float = help_field("Gradients are clipped to this norm; 0 clips nothing.", 1.0)
    eval_strategy: str = help_field("steps, epoch (passes over the text) or no.", "steps")
    eval_steps: float | None = help_field("Steps between evaluations.", 250)
    save_strategy: str = help_field("steps, epoch, best or no.", "steps")
    save_steps: float | None = help_field("Steps between checkpoints (default: eval_steps).")
    save_total_limit: int | None = help_field("Checkpoints kept; the best and the last are never removed.", 2)
    logging_steps: float | None = help_field(
        "Steps between updates of the loss shown (default: a tenth of eval_steps)."
    )
    seed: int = help_field("Seed of initialisation, data order and dropout.", 1337)
    metric_for_best_model: str | None = help_field(f"What the best is best at: {', '.join(RISING)}.", "loss")
    greater_is_better: bool | None = help_field("Whether more of it is better (default: as the metric is).")
    report_to: list[str] = help_field(
        "Trackers, such as tensorboard; none, or all that are installed.", default_factory=_none
    )
    debug: list[str] = help_field("underflow_overflow looks at every activation.", default_factory=list)
    lr_scheduler_kwargs: dict | None = help_field("Settings of the schedule, such as {min_lr_rate: 0.1}.")
    activation_checkpointing: bool | None = help_field(
        "Compute activations again in the backward pass, to save memory."
    )
    activation_checkpointing_kwargs: dict | None = help_field("Settings of it, such as {use_reentrant: false}.")
    gradient_checkpointing: bool | None = help_field(
        "The name that activation_checkpointing had before transformers 5.23."
    )
    gradient_checkpointing_kwargs: dict | None = help_field("As activation_checkpointing_kwargs.")
    do_train: bool = help_field("Training is what it does.", True)
    optim: str = help_field("transformers' name of AdamW; `optimizer` decides.", "adamw_torch_fused")
    logging_nan_inf_filter: bool = help_field("transformers' replacement of NaN losses; Acorn stops instead.", False)
    log_level_replica: str = help_field("What other processes than the first say.", "error")
    remove_unused_columns: bool = help_field("Rows have only what the model takes.", False)
    ignore_data_skip: bool = help_field("The data position is computed, not replayed.", True)
    ddp_find_unused_parameters: bool | None = help_field("Every parameter is used.", False)
    prediction_loss_only: bool = help_field("Logits are never gathered.", True)
    dataloader_drop_last: bool = help_field("Every micro-batch is whole.", True)

    def __post_init__(self):
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or ["none"])
        check_hub_arguments(self)
        refuse_other_values(self)
        settle_metric(self)
        check_choices(self)
        check_needs(self, {f.name: f.default for f in fields(self)})
        self._settle_checkpointing()
        if self.save_steps is None:
            self.save_steps = self.eval_steps or 500
        if self.logging_steps is None:
            self.logging_steps = max(1, int(self.eval_steps or 100) // 10)
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        check_schedule(self)
        self.compile_blocks = plan_compilation(self)
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a log file has no use for a bar
        self.precision, self.precision_reason = choose(self)
        self.bf16, self.fp16 = self.precision == "bf16", self.precision == "fp16"
        # transformers takes the launcher's word where neither of the two is set.
        with patch_environment(ACCELERATE_MIXED_PRECISION=ACCELERATE[self.precision]):
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
        decay = (self.lr_scheduler_kwargs or {}).get("num_decay_steps")
        if decay is not None and 0 < decay < 1:
            self.lr_scheduler_kwargs = {**self.lr_scheduler_kwargs, "num_decay_steps": round(decay * self.max_steps)}

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
    what = f"tokens_per_step={args.tokens_per_step} ({rows} windows of {context_length})"
    fitting = fitting_micro_batches(rows, processes)
    if not fitting:
        counts = sorted((n for n in range(1, 2 * processes) if rows % n == 0), key=lambda n: abs(n - processes))[:2]
        return f"{what} does not divide among {processes} processes; {' or '.join(map(str, sorted(counts)))} would do"
    near = [max((n for n in fitting if n < size), default=None), min((n for n in fitting if n > size), default=None)]
    near = " or ".join(str(n) for n in near if n)
    return f"per_device_train_batch_size={size}: {what} needs {near} on {processes} process(es)"
