"""From a recipe and a run directory to a finished run; `acorn pretrain` and `acorn resume` both end here."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import set_seed

from modeling import GPTForCausalLM

from .config.recipe import Recipe
from .data.corpus import Corpus, corpus_at, load_corpus, prepare, whereabouts
from .data.datatrove_tokens import holds_datatrove, load_datatrove
from .data.inputs import inputs_named_by, record_inputs, refuse_other_inputs
from .data.sources import named_sources
from .data.streaming import StreamPosition, is_streamed, refuse_stream_options, stream_corpus
from .data.tokenizers import add_nothing
from .loop.trainer import GPTTrainer
from .model.precision import record as record_precision
from .model.precision import trained_in
from .model.sampling import prompt_tensor, sample_text
from .share.metrics_file import mend_metrics
from .share.report import next_steps, write_report
from .system.checkpoints import list_checkpoints, read_state, refuse_finished, set_aside_later, step_of, stopped_early
from .system.distributed import (
    close_process_group,
    from_main_process,
    is_lost_process_error,
    lost_process_error,
    main_process_first,
)
from .system.errors import UserError
from .system.lock import claimed
from .system.root import follow_course
from .system.shell import shell

T = TypeVar("T")


def build_model(recipe: Recipe, corpus: Corpus, args) -> GPTForCausalLM:
    """A fresh model whose vocabulary is the tokenizer's, seeded by the recipe."""
    tokenizer = corpus.tokenizer
    vocab_size = max(len(tokenizer), recipe.model.get("vocab_size", 0))
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    config = recipe.model_config(vocab_size=vocab_size, **ids)
    tokenizer.model_max_length = config.max_position_embeddings
    set_seed(args.seed)
    # Under FSDP the first process sends the others their shards: they need the shapes only.
    needs_weights = args.process_index == 0 or os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") != "true"
    return GPTForCausalLM(config) if needs_weights else empty_model(config)


def empty_model(config) -> GPTForCausalLM:
    """A model whose weights are not written, and so take no memory; the buffers, which nobody sends, are filled.

    Not on the meta device: by their addresses Accelerate tells the optimizer which shard takes a weight's place, and
    there all have the same one.
    """
    with torch.device("meta"):
        model = GPTForCausalLM(config)
    model.to_empty(device="cpu").tie_weights()
    model.model.positions.init_weights()
    return model


def open_corpus(recipe: Recipe) -> Corpus:
    """The tokens that a recipe names: streamed, written by datatrove, or prepared (now, or before)."""
    data = recipe.data_arguments()
    if is_streamed(data):
        if recipe.training.get("data_seed") is not None:
            raise UserError("data_seed: a stream is read in the order of its text; leave it out")
        return stream_corpus(data, recipe.training.get("dataloader_num_workers", 0))
    refuse_stream_options(data)
    if holds_datatrove(data.data_dir) and not named_sources(data):
        return load_datatrove(data)
    return prepare(data, name=recipe.name)


def corpus_of_run(recipe: Recipe, run_dir: Path) -> Corpus:
    """The tokens that a run was grown from; they are prepared again if they are gone, from the same text only."""
    directory, data = recipe.data.get("data_dir"), recipe.data_arguments()
    if directory and Path(directory).is_dir() and not holds_datatrove(directory):
        corpus = load_corpus(directory)
    else:
        if not is_streamed(data) and named_sources(data):
            refuse_other_inputs(run_dir, inputs_named_by(data))  # before anything is prepared
        corpus = open_corpus(recipe)
    refuse_other_inputs(run_dir, corpus.inputs)
    return corpus


def by_the_first(args, work: Callable[[], T]) -> T:
    """What `work` opens or prepares, in every process; the others load the corpus that the first one has prepared.

    Otherwise each would hash all of the text again. Chats and pairs, which are stored nowhere, each process reads.
    """
    return main_process_first(args, work, "prepare", word=whereabouts, take=corpus_at)


def run(recipe: Recipe, model: GPTForCausalLM, corpus: Corpus, args, checkpoint: str | None = None) -> None:
    """Train to the end or to a signal, then report; `checkpoint` continues an earlier run.

    A run that a signal stopped ends the process with the shell's usual code, after saying how to resume.
    """
    data, sample = recipe.data_arguments(), recipe.sample_arguments()
    add_nothing(corpus.tokenizer)  # what travels with the model reads a text as training does
    recipe.card_arguments()  # a licence that nobody knows is refused now, not after all of training
    if sample.max_new_tokens:
        # A prompt that cannot be read is refused now, not after all of training.
        prompt_tensor(corpus.tokenizer, sample.prompt, model.config.max_position_embeddings)
    if "attn_implementation" not in recipe.model and args.device.type == "cpu" and args.bf16:
        # The backward pass of torch's fused CPU attention is slower in bf16 than plain matmuls.
        model.set_attn_implementation("eager")
    if checkpoint is not None and stopped_early(Path(checkpoint), args.early_stopping_patience):
        args.max_steps = read_state(Path(checkpoint))["global_step"]  # nothing to train, but perhaps to report
    trainer = GPTTrainer(model, args, corpus, model.config.max_position_embeddings, data, sample)
    del model  # the trainer's alone, so that it can let go of it
    if is_streamed(data):
        trainer.add_callback(StreamPosition(trainer))
    with claimed(Path(args.output_dir), args):
        if checkpoint is not None:
            refuse_finished(Path(checkpoint), args)
        trainer.best_is_gone = from_main_process(args, lambda: begin(recipe, trainer, checkpoint))
        if trainer.is_world_process_zero():
            print(describe(recipe, trainer), flush=True)
        train(trainer, checkpoint)
        if trainer.is_world_process_zero():
            finish(recipe, trainer)
    close_process_group()


def begin(recipe: Recipe, trainer: GPTTrainer, checkpoint: str | None) -> bool:
    """Make the run directory this run's: what it is grown from, and nothing that only a later part of it may say.

    Returns whether the best model of the course that goes on is gone.
    """
    args, run_dir = trainer.args, Path(trainer.args.output_dir)
    mend_metrics(run_dir, -1 if checkpoint is None else step_of(Path(checkpoint)))
    best_is_gone = False
    if checkpoint is not None:
        set_aside_later(Path(checkpoint))
        best_is_gone = not follow_course(Path(checkpoint))
    elif list_checkpoints(run_dir):  # another process grew a run here while this one prepared its corpus
        raise UserError(f"output_dir={run_dir} exists: continue it with `{shell('acorn', 'resume', run_dir)}`")
    (run_dir / "README.md").unlink(missing_ok=True)  # written last, it says that the run is finished
    if trainer.corpus.directory is not None:  # a stream has none
        recipe.data["data_dir"] = str(trainer.corpus.directory.absolute())
    # Kept as tokens a step, so that a resume on more or fewer processes takes the same steps.
    recipe.training["tokens_per_step"] = args.tokens_per_step
    recipe.training.pop("gradient_accumulation_steps", None)
    record_precision(recipe.training, args)
    recipe.save(run_dir / "recipe.yaml")
    if checkpoint is None:
        record_inputs(run_dir, trainer.inputs)
    return best_is_gone


def train(trainer: GPTTrainer, checkpoint: str | None) -> None:
    """To the last step and its evaluation, or to a signal, which ends the process."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.stop_on_signal.agreed is not None and trainer.state.global_step < trainer.args.max_steps:
            leave_resumable(trainer)
        trainer.evaluate_unless_done()
    except RuntimeError as error:
        if trainer.args.world_size > 1 and is_lost_process_error(error):
            raise lost_process_error(trainer.args, "training") from error
        raise


def describe(recipe: Recipe, trainer: GPTTrainer) -> str:
    """Two lines before the table: the model and the plan."""
    args, config = trainer.args, trainer.model.config
    return (
        f"{recipe.name}: {trainer.model.num_parameters():,} parameters, {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, context {trainer.context_length}, vocabulary {config.vocab_size:,}\n"
        f"{args.max_steps:,} steps of {trainer.tokens_per_step:,} tokens on {args.world_size} × {args.device.type}, "
        f"{trained_in(trainer)}{', deterministic' if args.full_determinism else ''}, {args.optimizer}, "
        f"attention {config._attn_implementation} → {args.output_dir}"
    )


def leave_resumable(trainer: GPTTrainer) -> None:
    """Say where the run stopped and how it goes on, and exit as the signal would have."""
    received = trainer.stop_on_signal.agreed
    if trainer.is_world_process_zero():
        print(f"stopped by {signal.Signals(received).name} at step {trainer.state.global_step:,}; checkpoint saved. "
              f"Go on with:\n  {shell('acorn', 'resume', Path(trainer.args.output_dir))}", file=sys.stderr)  # fmt: skip
    raise SystemExit(128 + received)


def finish(recipe: Recipe, trainer: GPTTrainer) -> None:
    """Load the best model, sample from it, write the report and say what to type next."""
    run_dir, sample = Path(trainer.args.output_dir), trainer.sample
    trainer.make_room()
    model = GPTForCausalLM.from_pretrained(run_dir).to(trainer.args.device)
    text = sample_text(model, trainer.corpus.tokenizer, sample, trainer.args.seed) if sample.max_new_tokens else ""
    write_report(run_dir, recipe, text)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if text:
        print(f"\n{'─' * 20} a sample {'─' * 20}\n{text}\n{'─' * 50}")
    print(next_steps(run_dir, sample.prompt), flush=True)
