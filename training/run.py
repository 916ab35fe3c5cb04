"""From a recipe to a finished run: `Run` is pretraining's, and finetuning's overrides what differs in it."""

import os
import signal
import sys
from functools import cached_property
from importlib import import_module
from pathlib import Path

import torch
from transformers import set_seed

from modeling import GPTConfig, GPTForCausalLM

from .config.recipe import Recipe, load_run_recipe
from .costs import refuse_too_large
from .data.corpus import (
    Corpus,
    corpus_at,
    holds_datatrove,
    inputs_named_by,
    load_corpus,
    load_datatrove,
    record_inputs,
    refuse_other_inputs,
    whereabouts,
)
from .data.dataset import LANES, EvaluationRows, Rows
from .data.preparation import prepare
from .data.sources import named_sources
from .data.streaming import StreamPosition, is_streamed, refuse_stream_options, stream_corpus
from .data.tokenizers import add_nothing, encoding_hash
from .loop.checkpointing import choose_checkpoint
from .loop.lanes import documents_apart
from .loop.memory import check_memory
from .loop.trainer import GPTTrainer
from .model.devices import choose_attention, describe_precision, record_precision
from .model.loading import load_model_tokenizer
from .model.sampling import context_left, prompt_tensor, sample_text
from .model.starting import model_to_start_from, refuse_context
from .share.metrics_file import mend_metrics, read_metrics
from .share.model_card import CardFacts, write_card
from .share.report import draw_losses, facts_of_run, next_steps
from .system.checkpoints import (
    abandon_later_checkpoints,
    list_checkpoints,
    read_state,
    reading,
    refuse_finished,
    restore_best_model,
    step_of,
    stopped_early,
)
from .system.distributed import (
    close_process_group,
    from_main_process,
    is_lost_process_error,
    lost_process_error,
    main_process_first,
)
from .system.errors import UserError
from .system.files import refuse_used, write_whole
from .system.lock import claimed
from .system.shell import shell

# What the lanes of a run, and what they remember, follow from.
OF_LANES = ("tokens_per_step", "max_position_embeddings", "train_memory_length", "memory_reset_probability")
# A section that one kind of run alone has in its recipe: where its subclass of Run is, imported to open such a run.
KINDS = {"adapter": ("finetune.run", "FinetuneRun")}


class Run:
    """A run of pretraining: `start` begins it, `resume` goes on with it, and both train and report."""

    verb = "pretrain"
    recipe_type: type[Recipe] = Recipe
    changeable_model: tuple[str, ...] = ("max_position_embeddings", "attn_implementation")
    # the state of a checkpoint belongs to these
    fixed_training = ("optimizer", "seed", "data_seed", "output_dir", "average_decay", "average_start")

    trainer: GPTTrainer  # from `build_trainer` on
    corpus: Corpus  # from `open_data` on

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    @cached_property
    def args(self):
        return self.recipe.training_arguments()

    @property
    def directory(self) -> Path:
        return self.recipe.output_dir.expanduser()

    @property
    def is_main_process(self) -> bool:
        return self.args.process_index == 0

    def start(self) -> None:
        """Begin the run in a directory of its own, and train it to its end."""
        self.check()
        from_main_process(self.args, lambda: refuse_used(self.directory))
        self.open_data()
        self.recipe.settle_depth(self.args, self.corpus)
        self.train()

    def go_on(self, wanted: str = "last", fresh_state: bool = False) -> None:
        """Train to its end a run that was stopped, from the checkpoint that is wanted: last, best or checkpoint-N."""
        self.check()
        with claimed(self.directory, self.args):
            checkpoint = from_main_process(
                self.args, lambda: choose_checkpoint(self.directory, wanted, fresh_state, self.args)
            )
            if self.is_main_process:
                where = f"from {checkpoint.name}" if checkpoint else "from its beginning: it has no checkpoint yet"
                print(f"resuming {self.directory} {where}", flush=True)
            self.open_data(is_resumed=True)
            self.train(checkpoint)

    def train(self, checkpoint: Path | None = None) -> None:
        """Train to the end or to a signal, then report; `checkpoint` continues an earlier part of the run.

        A run that a signal stopped ends the process with the shell's usual code, after saying how to resume.
        """
        args = self.args
        self.recipe.card_arguments()  # a licence that nobody knows is refused now, not after all of training
        args.eval_on_start = args.eval_on_start and checkpoint is None
        if checkpoint is not None and stopped_early(checkpoint, args.early_stopping_patience):
            args.max_steps = read_state(checkpoint)["global_step"]  # nothing to train, but perhaps to report
        self.trainer = self.build_trainer(checkpoint)
        with claimed(self.directory, args):
            self.trainer.best_is_gone = from_main_process(args, lambda: self.claim(checkpoint))
            if self.is_main_process:
                print(self.describe(), flush=True)
            self.optimize(checkpoint)
            if self.is_main_process:
                self.finish()
        close_process_group()

    # ---- what finetuning does otherwise

    def check(self) -> None:
        """Refuse what cannot be done here, before anything is read."""
        refuse_too_large(self.recipe, self.args)
        check_memory(self.recipe.model_config(), self.recipe.data_arguments(), self.args)

    def open_data(self, is_resumed: bool = False) -> None:
        """Read the data in every process; what the first one has prepared the others load, and need not hash again."""
        self.corpus = main_process_first(
            self.args, lambda: self.read_data(is_resumed), "prepare", send=whereabouts, receive=corpus_at
        )

    def read_data(self, is_resumed: bool) -> Corpus:
        return corpus_of_run(self.recipe, self.directory) if is_resumed else open_corpus(self.recipe)

    def build_trainer(self, checkpoint: Path | None) -> GPTTrainer:
        """The trainer of a fresh model, or of the checkpoint's."""
        recipe, args, tokenizer = self.recipe, self.args, self.corpus.tokenizer
        model = build_model(recipe, self.corpus, args) if checkpoint is None else self.load_model(checkpoint)
        context_length, sample = model.config.max_position_embeddings, recipe.sample_arguments()
        add_nothing(tokenizer)  # what travels with the model reads a text as training does
        if sample.max_new_tokens:  # a prompt that cannot be read is refused now, not after all of training
            prompt_tensor(tokenizer, sample.prompt, context_length)
        if "attn_implementation" not in recipe.model:
            choose_attention(model, args, context_length, recipe.data_arguments().document_masking)
        trainer = GPTTrainer(model, args, self.corpus, context_length, recipe.data_arguments(), sample)
        if is_streamed(recipe.data_arguments()):
            trainer.add_callback(StreamPosition(trainer))
        return trainer

    def load_model(self, checkpoint: Path) -> GPTForCausalLM:
        """The checkpoint's model, with a changed context length or attention backend if the flags say so."""
        changes = {key: self.recipe.model[key] for key in self.changeable_model if key in self.recipe.model}
        with reading(checkpoint, "config.json"):
            config = GPTConfig.from_pretrained(checkpoint)
        context = changes.get("max_position_embeddings", config.max_position_embeddings)
        refuse_context(str(self.directory), config, context)
        with reading(checkpoint, "weights"):
            return GPTForCausalLM.from_pretrained(checkpoint, **changes)

    def claim(self, checkpoint: Path | None) -> bool:
        """Make the run directory this run's: what it is grown from, and nothing that only a later part of it may say.

        Returns whether the best model of the course that goes on is gone.
        """
        recipe, args, trainer, best_is_gone = self.recipe, self.args, self.trainer, False
        if checkpoint is not None:
            refuse_finished(checkpoint, args)
            mend_metrics(self.directory, step_of(checkpoint))
            abandon_later_checkpoints(checkpoint)
            best_is_gone = not restore_best_model(checkpoint)
        elif list_checkpoints(self.directory):  # another process grew a run here while this one prepared its corpus
            resume = shell("acorn", "resume", self.directory)
            raise UserError(f"output_dir={self.directory} exists: continue it with `{resume}`")
        else:
            mend_metrics(self.directory, -1)
        (self.directory / "README.md").unlink(missing_ok=True)  # written last, it says that the run is finished
        if trainer.corpus.directory is not None:  # a stream has none
            recipe.data["data_dir"] = str(trainer.corpus.directory.absolute())
        # Kept as tokens a step, so that a resume on more or fewer processes takes the same steps.
        recipe.training["tokens_per_step"] = args.tokens_per_step
        recipe.training.pop("gradient_accumulation_steps", None)
        record_precision(recipe.training, args)
        recipe.save(self.directory / "recipe.yaml")
        if checkpoint is None:
            record_inputs(self.directory, trainer.inputs)
        return best_is_gone

    def load_best(self) -> torch.nn.Module | None:
        """The best model so far, as anyone would load it from the run directory; None where none is to be sampled."""
        return GPTForCausalLM.from_pretrained(self.directory)

    def describe_model(self) -> str:
        model = self.trainer.model
        return (
            f"{model.num_parameters():,} parameters, {model.config.num_hidden_layers} layers of "
            f"{model.config.hidden_size}, context {self.trainer.context_length}, vocabulary {model.config.vocab_size:,}"
        )

    def card_facts(self, sample: str) -> CardFacts:
        """What the model card says; sample.txt and metrics.jsonl are written already."""
        return facts_of_run(self.directory)

    def closing_words(self, sample: str) -> str:
        """What is printed last: the sample, and what to type next."""
        shown = f"\n{'─' * 20} a sample {'─' * 20}\n{sample}\n{'─' * 50}\n" if sample else ""
        return shown + next_steps(self.directory, self.trainer.sample.prompt, self.trainer.state.global_step)

    def held_out(self, model, tokenizer, block_size: int | None, stride: int | None = None) -> tuple[Rows, int, int]:
        """(rows, tokens that count, UTF-8 bytes) of what the run validates on, for a model of this run."""
        corpus = corpus_of_run(self.recipe, self.directory)
        refuse_other_tokenizer(tokenizer, corpus, self.directory)
        tokens = corpus.tokens("validation")
        rows = EvaluationRows(tokens, sequence_length(model, block_size), stride)
        rows = documents_apart(rows, corpus, self.recipe.data_arguments())
        return rows, len(tokens) - 1, corpus.manifest["splits"]["validation"]["bytes"]

    # ---- what every kind of run does

    def change(self, flags: dict[str, dict]) -> None:
        """Lay the checked flags of a resume over the recipe; what would make it another run is refused."""
        recipe, training, model = self.recipe, flags.get("training", {}), flags.get("model", {})
        fixed = [key for key in training if key in self.fixed_training]
        fixed += [key for key in model if key not in self.changeable_model]
        fixed += [key for section in ("data", "adapter") for key in flags.get(section, {})]
        if recipe.data.get("sampling") == LANES:  # as many as a step has sequences; they go on where they are
            fixed += [key for key in (*training, *model) if key in OF_LANES]
        if fixed:
            mend = f"start another with `acorn {self.verb}`"
            raise UserError(f"--{fixed[0]} cannot change in a run that has begun: {mend}")
        tokens = None if "tokens_per_step" in training else recipe.training.get("tokens_per_step")
        is_longer = bool(tokens and "max_position_embeddings" in model)
        sequences = tokens // recipe.model_config().max_position_embeddings if is_longer else 0
        recipe.update(flags)
        recipe.check()
        if is_longer:  # the same sequences a step, of another length
            recipe.training["tokens_per_step"] = sequences * recipe.model_config().max_position_embeddings

    def describe(self) -> str:
        """The model, the data and the plan, printed before the table."""
        args, trainer, corpus, dial = self.args, self.trainer, self.corpus, self.recipe.dial
        return (
            f"{self.recipe.name}: {self.describe_model()}\n"
            f"{corpus.summary()}\n"
            f"{f'{dial.words}{chr(10)}' if dial else ''}"
            f"{args.max_steps:,} steps of {trainer.tokens_per_step:,} tokens ({trainer.rows_per_step:,} sequences) on "
            f"{args.world_size} × {args.device.type}, {describe_precision(trainer)}"
            f"{', deterministic' if args.full_determinism else ''}, {args.optimizer}, "
            f"attention {trainer.model.config._attn_implementation} → {args.output_dir}"
        )

    def optimize(self, checkpoint: Path | None) -> None:
        """To the last step and its evaluation; after a signal say how to resume, and exit with its usual code."""
        trainer = self.trainer
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            received, step = trainer.stop_on_signal.agreed, trainer.state.global_step
            if received is not None and step < self.args.max_steps:
                if self.is_main_process:
                    what, resume = signal.Signals(received).name, shell("acorn", "resume", self.directory)
                    print(
                        f"stopped by {what} at step {step:,}; checkpoint saved. Go on with:\n  {resume}",
                        file=sys.stderr,
                    )
                raise SystemExit(128 + received)
            trainer.evaluate_unless_done()
        except RuntimeError as error:
            if self.args.world_size > 1 and is_lost_process_error(error):
                raise lost_process_error(self.args, "training") from error
            raise

    def finish(self) -> None:
        """Sample from the best model, write the report and say what to type next."""
        trainer, directory, sample, text = self.trainer, self.directory, self.trainer.sample, ""
        trainer.free_device_memory()
        if sample.max_new_tokens and (model := self.load_best()) is not None:
            text = sample_text(model.to(self.args.device), self.corpus.tokenizer, sample, self.args.seed)
        draw_losses(read_metrics(directory), directory / "loss.png", self.recipe.name)
        write_whole(directory / "sample.txt", text)
        write_card(directory, self.card_facts(text))
        if self.args.push_to_hub:
            trainer.push_to_hub()
        print(self.closing_words(text), flush=True)


def open_run(directory: Path) -> Run:
    """The run that lies in a directory, of whichever kind, as it goes on or is looked at there."""
    recipe = directory / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else ""
    sections = {line.partition(":")[0] for line in text.splitlines()}
    named = next((place for section, place in KINDS.items() if section in sections), None)
    kind: type[Run] = getattr(import_module(named[0]), named[1]) if named else Run
    run = kind(load_run_recipe(directory, kind.recipe_type))
    run.recipe.training["output_dir"] = str(directory)
    return run


def sequence_length(model, block_size: int | None, usual: int | None = None) -> int:
    """Tokens of an evaluated sequence: `block_size`, or else what is usual, or else all that the model can read."""
    limit = context_left(model)
    length = (usual or limit) if block_size is None else block_size
    if not 1 <= length <= limit:
        raise UserError(f"block_size={length}: must be between 1 and the model's context, {limit}")
    return length


def refuse_other_tokenizer(
    tokenizer, corpus: Corpus, model: Path | str, mend: str = "evaluate on text instead (--text_files)"
) -> None:
    """Refuse to give a model tokens that its tokenizer would not make."""
    if encoding_hash(tokenizer) != encoding_hash(corpus.tokenizer):
        raise UserError(f"{model}: the tokenizer is not the one that {corpus.directory} was made with; {mend}")


# ---- the model and the tokens of a recipe


def build_model(recipe: Recipe, corpus: Corpus, args) -> GPTForCausalLM:
    """A fresh model whose vocabulary is the tokenizer's, seeded by the recipe; or the weights that it starts from."""
    tokenizer = corpus.tokenizer
    vocab_size = max(len(tokenizer), recipe.model.get("vocab_size", 0))
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    config = recipe.model_config(vocab_size=vocab_size, **ids)
    tokenizer.model_max_length = config.max_position_embeddings
    set_seed(args.seed)
    # Under FSDP the first process sends the others their shards: they need the shapes only.
    needs_weights = args.process_index == 0 or os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") != "true"
    if not needs_weights:
        return empty_model(config)
    start = recipe.model.get("model_name_or_path")
    if start is None:
        return GPTForCausalLM(config)
    mend = "name its text instead (--text_files), or tokens that this tokenizer made"
    refuse_other_tokenizer(load_model_tokenizer(start, config, needs_end_of_text=False), corpus, start, mend)
    return model_to_start_from(start, config)


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
