"""Tasks of EleutherAI's evaluation harness (lm_eval) on a model that Acorn has loaded, by its own class for such."""

import argparse
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import EvalResult

from training.model.sampling import first_id
from training.run import sequence_length
from training.system.errors import UserError, one_line, unknown

OF_TASKS = ("num_fewshot", "limit", "include_path", "apply_chat_template")  # flags that say more of the tasks
KEPT = ("results", "groups", "n-shot", "versions", "n-samples")  # of what lm_eval returns
SOURCE = {"source_name": "EleutherAI/lm-evaluation-harness"}
SOURCE["source_url"] = "https://github.com/EleutherAI/lm-evaluation-harness"


def add_harness_flags(add) -> None:
    """The flags of the harness; `add` is a parser's add_argument."""
    add("--tasks", help="tasks of EleutherAI's harness instead of a text: names or patterns, by commas")
    add("--num_fewshot", type=int, help="solved examples before each question (default: the task's own)")
    add("--limit", type=float, help="documents of each task, or a share of them below 1, to try it out")
    add("--include_path", type=Path, help="directory with YAML files of more tasks; their Python is run")
    add("--apply_chat_template", action="store_true", help="ask each question as a user of the model's chat template")


def refuse_missing_harness() -> None:
    """Refuse to go on without the package of the extra."""
    if find_spec("lm_eval") is None:
        raise UserError("acorn evaluate --tasks needs lm-eval: .venv/bin/pip install -e '.[harness]'")


class Harness:
    """The tasks that the flags name, found before a model is loaded."""

    def __init__(self, flags: argparse.Namespace):
        refuse_missing_harness()
        if flags.include_path and not flags.include_path.is_dir():
            raise UserError(f"--include_path={flags.include_path}: there is no such directory")
        self.flags = flags
        with quietly():
            from lm_eval.tasks import TaskManager

            try:
                self.manager = TaskManager(include_path=flags.include_path)
            except Exception as error:  # YAML and the Python beside it: what they raise is of every class
                raise UserError(f"--include_path={flags.include_path}: {one_line(error)}") from error
        self.names = [task for name in flags.tasks.split(",") if name.strip() for task in self._named(name.strip())]
        if not self.names:
            raise UserError("--tasks: names no task; give names by commas, such as hellaswag,lambada_openai")

    def _named(self, name: str) -> list[str]:
        """The task or group of this name, or those that a pattern fits; else a UserError with the nearest ones."""
        found = self.manager.match_tasks([name])
        if not found:
            raise unknown("task", name, self.manager.all_tasks, "`lm-eval ls tasks` lists them.", most=3)
        return found

    def measure(self, model, tokenizer) -> dict:
        """What lm_eval says of the model: results by task and by group, shots, versions and numbers of documents."""
        flags = self.flags
        limit = int(flags.limit) if flags.limit and flags.limit >= 1 else flags.limit
        if flags.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError(f"--apply_chat_template: {flags.model} has no chat template; leave it out")
        with quietly():
            from jinja2 import TemplateError
            from lm_eval import evaluator

            evaluator.get_git_commit_hash = lambda: None  # prints `fatal` outside of a repository
            try:
                results = evaluator.simple_evaluate(
                    language_model(model, tokenizer, flags),
                    tasks=self.names,
                    num_fewshot=flags.num_fewshot,
                    limit=limit,
                    task_manager=self.manager,
                    apply_chat_template=flags.apply_chat_template,
                    log_samples=False,
                )
            except OSError as error:  # datasets' own among them
                why = f"{one_line(error)}; what a task reads must be here, or be reached on the Hub"
                raise UserError(f"--tasks {flags.tasks}: {why}") from error
            except (ValueError, KeyError, AssertionError, ImportError, TemplateError) as error:
                raise UserError(f"--tasks {flags.tasks}: {type(error).__name__}: {one_line(error)}") from error
        kept = {name: results[name] for name in KEPT if results.get(name)}
        return kept | {"lm_eval_version": version("lm_eval")}


def language_model(model, tokenizer, flags: argparse.Namespace):
    """The model as lm_eval's class for Hugging Face models takes it."""
    from lm_eval.models.huggingface import HFLM

    class LoadedModel(HFLM):
        """HFLM where it would stumble: virtual tokens before the logits, texts that a vocabulary has no letters for."""

        max_gen_toks = property(lambda self: min(256, self.max_length // 2))  # what a task that names none may write

        def _model_call(self, inps, **kwargs):
            return super()._model_call(inps, **kwargs)[:, -inps.shape[1] :]

        def tok_encode(self, string, *args, **kwargs):
            return encoded(lambda: super(LoadedModel, self).tok_encode(string, *args, **kwargs))

        def tok_batch_encode(self, strings, *args, **kwargs):
            return encoded(lambda: super(LoadedModel, self).tok_batch_encode(strings, *args, **kwargs))

    start = first_id(tokenizer, "--tasks: the text before some answers")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        tokenizer.pad_token_id = start  # or else lm_eval adds a token that the model does not have
    return LoadedModel(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=flags.per_device_eval_batch_size,
        max_length=sequence_length(model, flags.block_size),
        prefix_token_id=start,
        mixed_precision_dtype=torch.bfloat16 if flags.bf16 else None,
    )


def encoded(encode):
    """What `encode` gives; a text of a task that the tokenizer cannot encode is refused."""
    try:
        return encode()
    except Exception as error:  # the only class that `tokenizers` raises
        raise UserError(
            f"the tokenizer cannot encode a text of the task ({one_line(error)}); choose another"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """lm_eval's notices are for its own command line; its bars stay, and what it prints is no result of ours."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


# ---- what people and cards read


def task_table(results: dict) -> str:
    """Every task's metrics with their standard errors, as lines."""
    lines = [f"{'task':<32} {'shots':>5} {'metric':<24} {'value':>10}"]
    for task, name, value, error in figures(results):
        shots = results.get("n-shot", {}).get(task, "")
        spread = f" ± {error:.4f}" if isinstance(error, float) else ""
        lines.append(f"{task:<32} {shots!s:>5} {name:<24} {value:>10.4f}{spread}")
    return "\n".join(lines)


def figures(results: dict) -> Iterator[tuple[str, str, float, object]]:
    """(task, metric, value, standard error) of every number; a metric's filter is named where there is one."""
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if is_number and kind and not metric.endswith("_stderr"):
                name = metric if kind == "none" else f"{metric} ({kind})"
                yield task, name, value, found.get(f"{metric}_stderr,{kind}")


def card_results(results: dict) -> list[EvalResult]:
    """The same as the Hub's cards hold results."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_name=metric,
            metric_value=round(float(value), 6),
            metric_args={"num_few_shot": results.get("n-shot", {}).get(task, 0)},
            **SOURCE,
        )
        for task, metric, value, _ in figures(results)
    ]
