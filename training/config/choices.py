"""What a training argument that names something can name, and whether this machine has it: seen before a run begins."""

import importlib.util
import inspect
import math
import multiprocessing
from pathlib import Path

import torch
from accelerate.utils import DynamoBackend
from transformers.integrations import integration_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import trainer_log_levels
from transformers.utils import import_utils

from ..data.dataset import SAMPLERS
from ..data.splitting import SPLITTERS
from ..model.optimizers import OPTIMIZERS
from ..system.errors import UserError, one_line, unknown

# The metrics of an evaluation, and whether more of it is better.
RISING = {"loss": False, "perplexity": False, "bits_per_byte": False, "token_accuracy": True}
INTEGRATIONS = integration_utils.INTEGRATION_TO_CALLBACK
CHOICES = {
    "optimizer": OPTIMIZERS,
    "compile_scope": ("blocks", "model"),
    "eval_strategy": [choice.value for choice in IntervalStrategy],
    "logging_strategy": [choice.value for choice in IntervalStrategy],
    "save_strategy": [choice.value for choice in SaveStrategy],
    "hub_strategy": [choice.value for choice in HubStrategy],
    "lr_scheduler_type": [choice.value for choice in SchedulerType],
    "metric_for_best_model": RISING,
    "log_level": trainer_log_levels,
    "log_level_replica": trainer_log_levels,
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "torch_compile_backend": [backend.value.lower() for backend in DynamoBackend if backend is not DynamoBackend.NO],
    "dataloader_multiprocessing_context": multiprocessing.get_all_start_methods(),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl"),
    "debug": ("underflow_overflow",),
    "sampling": SAMPLERS,
    "validation_by": SPLITTERS,
    "on_bad_file": ("stop", "skip"),
    "data_format": ("auto", "text", "pairs", "chat"),
}
# What does nothing without another argument: the field, and the one that it needs.
NEEDS = {
    "muon_learning_rate": ("optimizer", "muon"),
    "muon_momentum": ("optimizer", "muon"),
    "dataloader_persistent_workers": ("dataloader_num_workers", "at least 1"),
    "dataloader_prefetch_factor": ("dataloader_num_workers", "at least 1"),
    "dataloader_multiprocessing_context": ("dataloader_num_workers", "at least 1"),
    "early_stopping_patience": ("eval_strategy", "steps"),
    "fsdp_config": ("fsdp", "true"),
    "liger_kernel_config": ("use_liger_kernel", "true"),
    "compile_scope": ("torch_compile", "true"),
    "activation_checkpointing_kwargs": ("activation_checkpointing", "true"),
    "gradient_checkpointing_kwargs": ("activation_checkpointing", "true"),
    "run_name": ("report_to", "a tracker"),
    "project": ("report_to", "a tracker"),
    "trackio_space_id": ("report_to", "trackio"),
}
CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")  # of torch
# Where a package has another name than the integration.
PACKAGES = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
SCHEDULE_GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")
REHEARSED = 100  # steps of a schedule that is tried out


def check_names(args) -> None:
    """Refuse a name that is in no table."""
    for name, known in CHOICES.items():
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            value = getattr(value, "value", value)  # of an enumeration
            if value is not None and value not in known:
                raise unknown(name, value, known)


def check_attention(name: str | None, device_type: str = "") -> None:
    """Refuse an attention implementation that transformers does not know, or that cannot be trained with here."""
    if name == "flex_attention" and device_type == "cpu":
        raise UserError("attn_implementation='flex_attention': torch cannot train with it on CPUs; use sdpa or eager")
    known = ["eager", *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if not key.startswith("paged|"))]  # serving
    if name is None or "/" in name:  # a kernel of the Hub
        return
    if name not in known:
        raise unknown("attn_implementation", name, known)
    is_available = getattr(import_utils, f"is_{name.replace('attention', 'attn')}_available", lambda: True)
    if name.startswith("flash") and not is_available():
        raise UserError(f"attn_implementation={name!r}: its package is not installed; install it, or use sdpa or eager")


def check_choices(args) -> None:
    """Refuse a name that is in no table, and one whose file or package is not here."""
    check_names(args)
    _check_reports(args.report_to)
    for key in args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}:
        if key not in CHECKPOINTING:
            raise unknown("key in activation_checkpointing_kwargs", key, CHECKPOINTING)
    for name in ("deepspeed", "fsdp_config"):
        path = getattr(args, name)
        if isinstance(path, str) and not path.startswith("{") and not Path(path).is_file():
            raise UserError(f"{name}={path!r}: there is no such file")
    _check_package("deepspeed", args.deepspeed is not None and (args.deepspeed or "{}"))
    _check_package("liger_kernel", args.use_liger_kernel, "use_liger_kernel")


def _check_reports(names: list[str]) -> None:
    for name in names if names not in (["none"], ["all"]) else []:
        if name not in INTEGRATIONS:
            raise unknown("report_to", name, ("none", *INTEGRATIONS))
        is_available = getattr(integration_utils, f"is_{PACKAGES.get(name, name)}_available", lambda: True)
        if not is_available():
            raise UserError(f"report_to={name!r}: {name} is not installed; install it, or leave report_to out")


def _check_package(package: str, is_asked: object, name: str | None = None) -> None:
    if is_asked and not importlib.util.find_spec(package):
        name = name or package
        raise UserError(f"{name}={is_asked!r}: the package {package} is not installed; install it, or leave {name} out")


def check_needs(args, defaults: dict) -> None:
    """Refuse an argument that does nothing because of another one."""
    unmet = {
        "optimizer": args.optimizer != "muon",
        "dataloader_num_workers": not args.dataloader_num_workers,
        "eval_strategy": args.eval_strategy == "no",
        "fsdp": not args.fsdp,
        "use_liger_kernel": not args.use_liger_kernel,
        "torch_compile": not (args.torch_compile or args.torch_compile_mode or args.torch_compile_backend),
        "activation_checkpointing": not (args.activation_checkpointing or args.gradient_checkpointing),
        "report_to": args.report_to in ([], ["none"]),
    }
    for name, (other, wanted) in NEEDS.items():
        value = getattr(args, name, None)
        if unmet[other] and value != defaults.get(name):
            raise UserError(f"{name}={value!r}: has no effect without {other}: {wanted}")


def settle_metric(args) -> None:
    """The direction of the best follows its metric; refuse one that contradicts it."""
    metric = args.metric_for_best_model = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in RISING:  # which check_choices says
        return
    if args.greater_is_better not in (None, RISING[metric]):
        better = "more" if RISING[metric] else "less"
        raise UserError(f"greater_is_better={args.greater_is_better}: of {metric} {better} is better; leave it out")
    args.greater_is_better = RISING[metric]


# ---- the schedule


def check_schedule(args) -> None:
    """Try the learning rate's schedule on a few steps: unknown, missing and impossible settings are refused."""
    kind, given = SchedulerType(args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    what = f"lr_scheduler_kwargs={given}" if given else f"lr_scheduler_type={kind.value!r}"
    parameters = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[kind]).parameters
    known = {name: p for name, p in parameters.items() if name not in SCHEDULE_GIVEN}
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in given:
        if name not in known and not is_open:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(f"lr_scheduler_kwargs.{name}={given[name]!r}: {kind.value} does not read it; {takes}")
        if not _is_number(given[name]) and not (_may_be_text(known.get(name)) and isinstance(given[name], str)):
            raise UserError(f"lr_scheduler_kwargs.{name}={given[name]!r}: must be a finite number")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in given and parameter.kind is not parameter.VAR_KEYWORD:
            raise UserError(f"{what}: {kind.value} needs lr_scheduler_kwargs.{name}, such as {{{name}: 0.2}}")
    try:
        rates = _rehearse(args, kind, dict(given))
    except ZeroDivisionError as error:
        why = f"warmup_steps={args.warmup_steps} leaves it no steps of max_steps={args.max_steps}"
        raise UserError(f"{what}: {why}; lower warmup_steps") from error
    except Exception as error:  # whatever a schedule says of settings that it cannot use
        raise UserError(f"{what}: {one_line(error)}") from error
    if not all(isinstance(rate, float | int) and math.isfinite(rate) and rate >= 0 for rate in rates):
        raise UserError(f"{what}: its learning rates must be finite and not negative")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _may_be_text(parameter: inspect.Parameter | None) -> bool:
    """Whether a schedule takes a word here; of settings that it hands on that is not known."""
    return parameter is None or isinstance(parameter.default, str)


def _rehearse(args, kind: SchedulerType, kwargs: dict) -> list:
    """The factors of a hundred steps of the schedule, warm-up included."""
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
