"""From a finetuning recipe to a finished run: the base, its adapter, the rows, the loop, the report."""

import dataclasses
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed

from training.config.choices import check_attention
from training.costs import refuse_large_batch
from training.data.inputs import refuse_other_inputs
from training.model.hardware import context_of, peak_memory
from training.model.loading import (
    fingerprint,
    in_native_dtype,
    load_adapter,
    load_causal_lm,
    load_config,
    load_model_tokenizer,
    refuse_emulated_dtype,
)
from training.model.precision import trained_in
from training.model.sampling import prompt_tensor, sample_text
from training.run import begin, by_the_first, train
from training.share.metrics_file import read_metrics
from training.system.checkpoints import refuse_finished
from training.system.distributed import close_process_group, from_main_process
from training.system.errors import UserError
from training.system.files import read_json, write_whole
from training.system.lock import claimed

from .adapters import attach, count_parameters, quantization, virtual_tokens
from .arguments import FinetuneRecipe
from .data import Examples, as_prompt, describe, read_data
from .probe import as_trained, keeps_documents_apart
from .report import side_by_side, summary, write_report
from .trainer import FinetuneTrainer, refuse_optimizer

DEFAULT_BLOCK = 1024
FACTS = "finetune.json"


@dataclass
class Prepared:
    """What is ready before the weights are loaded: tokenizer, data, row length, and what the samples ask."""

    tokenizer: object
    material: object
    block_size: int
    question: str
    sample: object


def prepare_data(recipe: FinetuneRecipe, args, is_resumed: bool = False) -> Prepared:
    """Tokenizer, data and prompt; wrong ones are refused before the weights are read."""
    model, data, adapter = recipe.model_arguments(), recipe.data_arguments(), recipe.adapter_arguments()
    check_attention(model.attn_implementation, args.device.type)
    quantization(adapter.adapter, args.precision)  # refuses what this machine cannot do
    if not args.force_precision:
        refuse_emulated_dtype(model.dtype, args.device.type)
    config = load_config(model.model_name_or_path, model.trust_remote_code)
    tokenizer = load_model_tokenizer(data.tokenizer or model.model_name_or_path, config)
    context = context_of(config) - virtual_tokens(adapter)
    block_size = data.block_size or min(context, DEFAULT_BLOCK)
    if not 2 <= block_size <= context:
        raise UserError(f"block_size={block_size}: must be from 2 to the model's context, {context}")
    refuse_large_batch(args, block_size, getattr(config.get_text_config(), "vocab_size", 1))
    material = by_the_first(args, lambda: read_data(data, tokenizer, block_size, recipe.name, is_resumed))
    question, prompt = choose_prompt(recipe.sample_arguments().prompt, material)
    sample = dataclasses.replace(recipe.sample_arguments(), prompt=prompt)
    if sample.max_new_tokens:
        prompt_tensor(material.tokenizer, prompt, context)
    return Prepared(material.tokenizer, material, block_size, question, sample)


def choose_prompt(given: str | None, material) -> tuple[str, str]:
    """(what is asked in words, what the model reads): the prompt given, or the first that was held out."""
    if not isinstance(material, Examples):
        return (given or "\n",) * 2
    if given is None:
        return material.question, material.sample_prompt
    return given, as_prompt(material.tokenizer, given) if material.tokenizer.chat_template else given


def load_base(recipe: FinetuneRecipe, args, checkpoint: str | None):
    """(model, name, fingerprint) of what is finetuned; a whole model that goes on is its own checkpoint."""
    model, adapter = recipe.model_arguments(), recipe.adapter_arguments()
    name = model.model_name_or_path
    if Path(name).is_dir():
        name = str(Path(name).absolute())  # an adapter names its base, wherever it is loaded from
    is_whole_again = checkpoint is not None and adapter.adapter == "full"
    options = quantization(adapter.adapter, args.precision)
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    base = load_causal_lm(checkpoint if is_whole_again else name, model.dtype, model.trust_remote_code, **options)
    if model.dtype == "auto" and not args.force_precision:
        base = in_native_dtype(base, args.device.type)
    known = None if adapter.adapter == "qlora" or is_whole_again else fingerprint(base)
    if not model.attn_implementation and args.device.type == "cpu" and args.bf16:
        base.set_attn_implementation("eager")  # the backward pass of fused attention is slower in bf16 on CPUs
    return base, name, known


def build_trainer(recipe: FinetuneRecipe, args, prepared: Prepared, checkpoint: str | None) -> FinetuneTrainer:
    """The trainer of a recipe: base, adapter and rows put together."""
    data, adapter = recipe.data_arguments(), recipe.adapter_arguments()
    base, name, known = load_base(recipe, args, checkpoint)
    is_apart = keeps_documents_apart(base, name, **as_trained(base, args))
    refuse_optimizer(args, adapter, base)
    packing = data.packing and is_apart and not virtual_tokens(adapter)
    if data.packing and not packing and args.process_index == 0:
        why = "virtual tokens leave no positions to tell documents apart" if is_apart else "this model does not tell"
        print(f"one document a row: {why}{'' if is_apart else ' packed documents apart'}")
    set_seed(args.seed)
    return FinetuneTrainer(
        attach(base, adapter, name),
        args,
        prepared.material,
        prepared.block_size,
        data,
        prepared.sample,
        packing=packing,
        adapter=adapter,
        base=(name, known),
    )


def run(recipe: FinetuneRecipe, args, prepared: Prepared, checkpoint: str | None = None) -> None:
    """Finetune to the end or to a signal, then report; `checkpoint` continues an earlier run."""
    run_dir = Path(args.output_dir)
    args.eval_on_start = args.eval_on_start and checkpoint is None
    trainer = build_trainer(recipe, args, prepared, checkpoint)
    with claimed(run_dir, args):
        # On the main process alone: one that is sent its shards has no base to take a fingerprint of.
        from_main_process(args, lambda: refuse_other_inputs(run_dir, trainer.inputs))
        kept = read_json(run_dir / FACTS, "remove it: it is made again, without the sample from before")
        if checkpoint is not None:
            refuse_finished(Path(checkpoint), args)
        trainer.best_is_gone = from_main_process(args, lambda: begin(recipe, trainer, checkpoint))
        if trainer.is_world_process_zero():
            print(introduce(recipe, trainer), flush=True)
            if checkpoint is None:
                kept = {"sample_before": draw(trainer, prepared)}
                write_facts(run_dir, first_facts(trainer, prepared) | kept)
        train(trainer, checkpoint)
        if trainer.is_world_process_zero():
            finish(recipe, trainer, prepared, str(kept.get("sample_before", "")))
    close_process_group()


def introduce(recipe: FinetuneRecipe, trainer: FinetuneTrainer) -> str:
    """Three lines before the table: the model and what is trained of it, the data, the plan."""
    args, (trained, total) = trainer.args, count_parameters(trainer.model)
    return (
        f"{recipe.name}: {trainer.adapter.adapter} on {trainer.base[0]}, {trained:,} of {total:,} parameters trained "
        f"({trained / total:.2%})\n{describe(trainer.corpus)}\n"
        f"{args.max_steps:,} steps of {trainer.rows_per_step:,} rows of {trainer.context_length:,} tokens on "
        f"{args.world_size} × {args.device.type}, {trained_in(trainer)}, {args.optimizer} → {args.output_dir}"
    )


# ---- what is kept of a run beside its losses


def first_facts(trainer: FinetuneTrainer, prepared: Prepared) -> dict:
    """What is known before the first step: names and sizes."""
    trained, total = count_parameters(trainer.model)
    return {
        "adapter": trainer.adapter.adapter,
        "base_model": trainer.base[0],
        "trained_parameters": trained,
        "parameters": total,
        "question": prepared.question,
    }


def write_facts(run_dir: Path, facts: dict) -> None:
    write_whole(run_dir / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def draw(trainer: FinetuneTrainer, prepared: Prepared) -> str:
    """What the base writes after the prompt."""
    if not prepared.sample.max_new_tokens:
        return ""
    with trainer.model.disable_adapter() if hasattr(trainer.model, "disable_adapter") else nullcontext():
        return sample_text(trainer.model, prepared.tokenizer, prepared.sample, trainer.args.seed)


def finish(recipe: FinetuneRecipe, trainer: FinetuneTrainer, prepared: Prepared, sample_before: str) -> None:
    """Load the best from the root as anyone would, sample from it, write the report and say what to type next."""
    args, run_dir, sample = trainer.args, Path(trainer.args.output_dir), prepared.sample
    memory, facts = peak_memory(args.device), first_facts(trainer, prepared)
    trainer.make_room()
    trust = recipe.model_arguments().trust_remote_code
    load = load_causal_lm if trainer.adapter.adapter == "full" else load_adapter
    text = ""
    if sample.max_new_tokens and trainer.adapter.adapter != "qlora":
        model = load(str(run_dir), "auto", trust).to(args.device).eval()
        text = sample_text(model, prepared.tokenizer, sample, args.seed)
    rows = read_metrics(run_dir)
    best = recipe.best([row for row in rows if row["step"] > 0])
    if best is None:  # taken away, and the last evaluation was before
        raise UserError(
            f"{run_dir}: metrics.jsonl holds no evaluation; restore it, or train further with a larger --max_steps"
        )
    first = next((row for row in rows if row["step"] == 0), None)
    facts |= {
        "sample_before": sample_before,
        "perplexity_before": math.exp(first["eval_loss"]) if first else None,
        "perplexity_after": math.exp(best["eval_loss"]),
        "best_step": best["step"],
        "seconds": rows[-1]["seconds"],
        "peak_memory_bytes": memory,
        "device": args.device.type,
        "sample_after": text,
    }
    write_facts(run_dir, facts)
    write_report(run_dir, recipe, trainer.corpus, facts, first, best)
    if args.push_to_hub:
        trainer.push_to_hub()
    if text:
        print(f"\n{side_by_side(sample_before, text)}\n")
    print(summary(run_dir, facts, sample.prompt), flush=True)
