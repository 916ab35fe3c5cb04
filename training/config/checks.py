"""What an argument can be: the names that it takes, the values that another place decides, and what it needs."""

import importlib.util
import inspect
import math
import multiprocessing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import DynamoBackend
from transformers.integrations import integration_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import trainer_log_levels
from transformers.utils import import_utils

from ..data.dataset import LANES, SAMPLERS
from ..data.sources import SPLITTERS
from ..model.loading import DTYPES
from ..model.optimizers import OPTIMIZERS
from ..system.errors import UserError, one_line, unknown
from .presets import PRESETS

# The metrics of an evaluation, and whether more of it is better.
RISING = {"loss": False, "perplexity": False, "bits_per_byte": False, "token_accuracy": True}
CHOICES = {
    "preset": PRESETS,
    "optimizer": OPTIMIZERS,
    "compile_scope": ("blocks", "model"),
    "eval_strategy": [choice.value for choice in IntervalStrategy],
    "logging_strategy": [choice.value for choice in IntervalStrategy],
    "save_strategy": [choice.value for choice in SaveStrategy],
    "hub_strategy": [choice.value for choice in HubStrategy],
    "lr_scheduler_type": [choice.value for choice in SchedulerType],
    "metric_for_best_model": [*RISING, *(f"eval_{metric}" for metric in RISING)],
    "log_level": trainer_log_levels,
    "log_level_replica": trainer_log_levels,
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "torch_compile_backend": [backend.value.lower() for backend in DynamoBackend if backend is not DynamoBackend.NO],
    "dataloader_multiprocessing_context": multiprocessing.get_all_start_methods(),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"),
    "debug": ("underflow_overflow",),
    "sampling": (*SAMPLERS, LANES),
    "validation_by": SPLITTERS,
    "on_bad_file": ("stop", "skip"),
    "data_format": ("auto", "text", "pairs", "chat"),
    "dtype": DTYPES,
}

# What another place decides: no value but the default is taken, and the refusal names that place.
_REFUSED = {
    "the evaluation is Acorn's own, which gathers sums, not logits": "batch_eval_metrics eval_accumulation_steps "
    "eval_do_concat_batches eval_use_gather_object include_for_metrics prediction_loss_only",
    "evaluation computes as training does": "bf16_full_eval fp16_full_eval",
    "batches are made by row position; use tokens_per_step and per_device_train_batch_size": "accelerator_config",
    "every micro-batch is whole": "dataloader_drop_last",
    "the order of the rows is what makes a run repeatable": "dataloader_in_order",
    "use eval_strategy, or `acorn evaluate`": "do_eval",
    "use `acorn generate`": "do_predict",
    "to evaluate without training use `acorn evaluate`": "do_train",
    "SIGTERM and Ctrl-C save a checkpoint already": "enable_jit_checkpoint",
    "a recipe is pushed with its run, and the token would be too; set HF_TOKEN or run `hf auth login`": "hub_token",
    "a resumed run computes its position in the data, and replays nothing": "ignore_data_skip",
    "metrics.jsonl counts tokens": "include_num_input_tokens_seen",
    "the labels are the next tokens": "label_names",
    "use sampling, or packing in finetuning": "length_column_name",
    "the run directory's root holds the best model at every moment": "load_best_model_at_end",
    "torchrun and accelerate launch number the processes": "local_rank",
    "a loss that is not a number stops the run": "logging_nan_inf_filter",
    "nothing here adds noise to embeddings; leave it out": "neftune_noise_alpha",
    "use optimizer (adamw, muon, normuon) and its own flags": "optim optim_args optim_target_modules",
    "use `accelerate launch --config_file training/launch/…`": "parallelism_config",
    "rows have only the columns that the model takes": "remove_unused_columns",
    "a resumed run always restores them": "restore_callback_states_from_checkpoint",
    "use `acorn resume RUN_DIR --checkpoint …`": "resume_from_checkpoint",
    "use `acorn estimate`, or the report of a finetuning run": "skip_memory_metrics",
    "use sampling (random, shuffled, lanes)": "train_sampling_strategy",
    "training uses no cache, and the saved model has it on": "use_cache",
}
REFUSED = {name: place for place, names in _REFUSED.items() for name in names.split()}


class Need(NamedTuple):
    """Another argument without which one does nothing, the values that it may have, and the test of that."""

    argument: str
    value: str
    is_met: Callable[[object], object]


def _compiles(args) -> bool:
    return bool(args.torch_compile or args.torch_compile_mode or args.torch_compile_backend)


_NEEDS = {
    "muon_learning_rate muon_momentum muon_momentum_warmup_steps": Need(
        "optimizer", "muon or normuon", lambda args: args.optimizer != "adamw"
    ),
    "muon_beta2": Need("optimizer", "normuon", lambda args: args.optimizer == "normuon"),
    "average_start": Need("average_decay", "a number", lambda args: args.average_decay is not None),
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context": Need(
        "dataloader_num_workers", "at least 1", lambda args: args.dataloader_num_workers
    ),
    "early_stopping_patience": Need("eval_strategy", "steps", lambda args: args.eval_strategy != "no"),
    "fsdp_config": Need("fsdp", "true", lambda args: args.fsdp),
    "liger_kernel_config": Need("use_liger_kernel", "true", lambda args: args.use_liger_kernel),
    "compile_scope": Need("torch_compile", "true", _compiles),
    "activation_checkpointing_kwargs gradient_checkpointing_kwargs": Need(
        "activation_checkpointing", "true", lambda args: args.checkpoints_activations
    ),
    "run_name project": Need("report_to", "a tracker", lambda args: args.report_to not in ([], ["none"])),
    "trackio_space_id": Need("report_to", "trackio", lambda args: args.report_to not in ([], ["none"])),
    "hub_model_id hub_revision hub_always_push hub_strategy": Need("push_to_hub", "true", lambda a: a.push_to_hub),
    "hub_private_repo": Need("push_to_hub", "true", lambda args: args.push_to_hub or "trackio" in args.report_to),
}
NEEDS = {name: need for names, need in _NEEDS.items() for name in names.split()}

CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")  # of torch
# Where a package has another name than the integration.
PACKAGES = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
SCHEDULE_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")  # by Trainer, to each schedule
REHEARSED = 100  # steps of a schedule that is tried out, where the run's are not known yet


def check_name(field: str, value: object) -> None:
    """Refuse a name that the field's table does not hold."""
    for name in (value if isinstance(value, list) else [value]) if field in CHOICES else ():
        if name is not None and name not in CHOICES[field]:
            raise unknown(field, name, CHOICES[field])


def check_attention(name: str | None, device_type: str) -> None:
    """Refuse an attention implementation that transformers does not know, or that cannot be trained with here."""
    if name is None or "/" in name:  # a kernel of the Hub
        return
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if not key.startswith("paged|"))]  # serving
    if name not in known:
        raise unknown("attn_implementation", name, known)
    if name == "flex_attention" and device_type == "cpu":
        raise UserError("attn_implementation='flex_attention': torch cannot train with it on CPUs; use sdpa or eager")
    is_available = getattr(import_utils, f"is_{name.replace('attention', 'attn')}_available", lambda: True)
    if name.startswith("flash") and not is_available():
        raise UserError(f"attn_implementation={name!r}: its package is not installed; install it, or use sdpa or eager")


def check_installed(args) -> None:
    """Refuse arguments whose file or package is not here."""
    for name in args.report_to if args.report_to not in (["none"], ["all"]) else []:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            raise unknown("report_to", name, ("none", *integration_utils.INTEGRATION_TO_CALLBACK))
        is_available = getattr(integration_utils, f"is_{PACKAGES.get(name, name)}_available", lambda: True)
        if not is_available():
            raise UserError(f"report_to={name!r}: {name} is not installed; install it, or leave report_to out")
    for name in ("deepspeed", "fsdp_config"):
        path = getattr(args, name)
        if isinstance(path, str) and not path.startswith("{") and not Path(path).is_file():
            raise UserError(f"{name}={path!r}: there is no such file")
    for name, package in (("deepspeed", "deepspeed"), ("use_liger_kernel", "liger_kernel")):
        value = getattr(args, name)
        if value not in (None, False) and not importlib.util.find_spec(package):
            raise UserError(
                f"{name}={value!r}: the package {package} is not installed; install it, or leave {name} out"
            )


def check_needs(args) -> None:
    """Refuse an argument that does nothing because of another one."""
    defaults = {field.name: field.default for field in fields(args)}
    for name, need in NEEDS.items():
        value = getattr(args, name, None)
        if value != defaults.get(name) and not need.is_met(args):
            raise UserError(f"{name}={value!r}: has no effect without {need.argument}: {need.value}")
    for key in args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}:
        if key not in CHECKPOINTING:
            raise unknown("key in activation_checkpointing_kwargs", key, CHECKPOINTING)


def settle_metric(args) -> None:
    """The direction of the best follows its metric; refuse one that contradicts it."""
    metric = args.metric_for_best_model = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if args.greater_is_better not in (None, RISING[metric]):
        better = "more" if RISING[metric] else "less"
        raise UserError(f"greater_is_better={args.greater_is_better}: of {metric} {better} is better; leave it out")
    args.greater_is_better = RISING[metric]


def check_schedule(args) -> None:
    """Try the learning rate's schedule on a few steps: unknown, missing and impossible settings are refused."""
    kind, given = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    what = f"lr_scheduler_type={kind.value!r}" + (f", lr_scheduler_kwargs={given}" if given else "")
    signature = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind])
    own = [parameter for parameter in signature.parameters.values() if parameter.name not in SCHEDULE_GIVEN]
    numbers = {parameter.name for parameter in own if not isinstance(parameter.default, str)}
    for name, value in given.items():
        if name in numbers and isinstance(value, str):
            raise UserError(f"lr_scheduler_kwargs.{name}={value!r}: must be a number")
    try:
        signature.replace(parameters=own).bind(**given)
        rates = _rehearse(args, kind, dict(given))
    except ZeroDivisionError as error:
        why = f"warmup_steps={args.warmup_steps} leaves it no steps of max_steps={args.max_steps}"
        raise UserError(f"{what}: {why}; lower warmup_steps") from error
    except Exception as error:  # whatever a schedule says of settings that it cannot use
        takes = ", ".join(parameter.name for parameter in own) or "no settings"
        raise UserError(f"{what}: {one_line(error)}; lr_scheduler_kwargs takes {takes}") from error
    if not all(isinstance(rate, float | int) and math.isfinite(rate) and rate >= 0 for rate in rates):
        raise UserError(f"{what}: its learning rates must be finite and not negative")


def _rehearse(args, kind: SchedulerType, kwargs: dict) -> list:
    """The factors of the schedule at its first and last steps and between, warm-up included."""
    decay = kwargs.get("num_decay_steps")
    if decay is not None and not decay > 0:
        raise ValueError(f"num_decay_steps={decay}: must be above 0")
    steps = args.max_steps if args.max_steps > 0 else REHEARSED
    if decay is not None:
        kwargs["num_decay_steps"] = round(decay * steps) if decay < 1 else decay
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    warmup = math.ceil(args.warmup_steps * steps) if args.warmup_steps < 1 else int(args.warmup_steps)
    schedule = get_scheduler(kind, optimizer, warmup, steps, kwargs)
    shapes = getattr(schedule, "lr_lambdas", [])
    return [shape(step) for shape in shapes for step in {0, 1, warmup, steps // 2, steps - 1, steps}]
