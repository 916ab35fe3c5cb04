"""What Trainer does in a step and Acorn's trainer does not, and what it leaves as it found it."""

import inspect
import signal
import weakref

import pytest
import torch
from transformers import Trainer, TrainerCallback

from finetune import finetune
from finetune.trainer import FinetuneTrainer
from modeling import GPTConfig, GPTForCausalLM
from training.config.arguments import DataArguments, GPTTrainingArguments
from training.data.dataset import IGNORED, TrainingRows
from training.data.preparation import prepare
from training.loop.fast_on_cpu import FastDropout, fast_dropout
from training.loop.lanes import StepSampler
from training.loop.trainer import PRIVATE_METHODS, GPTTrainer
from training.share.metrics_file import read_metrics
from training.system.errors import UserError

from .tiny_bases import TINY, save, stock_model
from .tiny_runs import BATCH, CONTEXT, checkpoints, go_on, grow, write_text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The tiny text as characters."""
    folder = tmp_path_factory.mktemp("overheads")
    return prepare(DataArguments(text_files=[str(write_text(folder))], tokenizer="char", data_dir=str(folder / "c")))


@pytest.fixture(autouse=True)
def usual_handlers():
    """Each test starts with Python's own handlers, whatever the one before left behind."""
    before = handlers()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def make_trainer(corpus, tmp_path):
    """The factory `make_trainer(**training_arguments) -> GPTTrainer`."""

    def make(**changes) -> GPTTrainer:
        keywords = {"max_steps": 4, "per_device_train_batch_size": BATCH, "eval_steps": 2, "warmup_steps": 0}
        args = GPTTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, **keywords | changes)
        config = GPTConfig(
            vocab_size=len(corpus.tokenizer), n_layer=1, n_embd=16, n_head=2, block_size=CONTEXT, eos_token_id=0
        )
        return GPTTrainer(GPTForCausalLM(config), args, corpus, CONTEXT)

    return make


def test_flops_are_counted_without_a_walk_over_the_parameters(make_trainer, monkeypatch) -> None:
    trainer = make_trainer()

    def walked(*args, **kwargs):
        raise AssertionError("the parameters were walked")

    for name in ("parameters", "named_parameters", "num_parameters"):
        monkeypatch.setattr(type(trainer.model), name, walked)
    inputs = {"input_ids": torch.zeros(BATCH, CONTEXT, dtype=torch.long)}
    assert trainer.floating_point_ops(inputs) == trainer.flops_per_token * BATCH * CONTEXT > 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_model_is_told_how_many_labels_a_step_has(make_trainer, monkeypatch, accumulation: int) -> None:
    trainer, told, counted = make_trainer(gradient_accumulation_steps=accumulation), [], []
    forward = trainer.model.forward

    def listen(*args, num_items_in_batch=None, shift_labels=None, **kwargs):
        told.append(num_items_in_batch)
        counted.append(int((shift_labels != -100).sum()) if shift_labels is not None else None)
        return forward(*args, num_items_in_batch=num_items_in_batch, shift_labels=shift_labels, **kwargs)

    monkeypatch.setattr(trainer.model, "forward", listen)
    trainer.get_eval_dataloader = None  # evaluation goes another way: see training/loop/evaluation.py
    trainer.train()
    in_training = [(items, labels) for items, labels in zip(told, counted, strict=True) if labels is not None]
    assert len(in_training) == 4 * accumulation
    assert {int(items) for items, _ in in_training} == {accumulation * BATCH * CONTEXT}
    assert {labels for _, labels in in_training} == {BATCH * CONTEXT}


def test_the_count_is_trainers_own(make_trainer) -> None:
    trainer = make_trainer(gradient_accumulation_steps=2)
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in range(start, start + 2)]) for start in (0, 2)]
    batches[0]["shift_labels"][0, :3] = IGNORED
    for name in ("theirs", "ours"):
        kind = Trainer if name == "theirs" else GPTTrainer
        given = iter([{**batch, "labels": None} if kind is Trainer else batch for batch in batches])
        found, counted = kind.get_batch_samples(trainer, given, 2, torch.device("cpu"))
        assert (len(found), counted) == (2, 4 * CONTEXT - 3)
    assert trainer.get_batch_samples(iter([]), 2, torch.device("cpu")) == ([], None)


def test_a_loss_that_is_no_number_is_not_filtered_away(make_trainer, monkeypatch) -> None:
    trainer, step = make_trainer(), Trainer.training_step
    assert trainer.args.logging_nan_inf_filter is False
    losses = iter([step, step, lambda *args: torch.tensor(float("nan"))])
    monkeypatch.setattr(Trainer, "training_step", lambda *args: next(losses)(*args))
    with pytest.raises(UserError, match="loss is nan at step 3"):
        trainer.train()
    assert trainer.state.global_step == 2


def private_methods(kind: type) -> dict:
    """Name to function of what a class itself defines by a single underscore."""
    own = {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}
    return {name: value for name, value in own.items() if name.startswith("_") and not name.startswith("__")}


def test_private_methods_of_trainer_are_listed_in_one_place() -> None:
    theirs = private_methods(Trainer)
    ours = {name for kind in FinetuneTrainer.mro() if issubclass(kind, GPTTrainer) for name in private_methods(kind)}
    ours |= {name for kind in GPTTrainer.__bases__ for name in private_methods(kind)}
    assert ours & theirs.keys() <= PRIVATE_METHODS.keys()
    parameters = {name: " ".join(inspect.signature(theirs[name]).parameters) for name in PRIVATE_METHODS}
    assert parameters == {name: f"self {listed}" for name, listed in PRIVATE_METHODS.items()}


def test_the_sampler_starts_where_the_run_is(make_trainer) -> None:
    trainer = make_trainer(gradient_accumulation_steps=2)
    sampler = StepSampler(trainer)
    assert list(sampler) == list(range(4 * 2 * BATCH))
    trainer.state.global_step = 3
    assert list(sampler) == list(range(3 * 2 * BATCH, 4 * 2 * BATCH))
    assert isinstance(iter(sampler), type(iter(range(0))))  # nothing is replayed or listed


def test_resuming_reads_no_row_twice(tmp_path, monkeypatch) -> None:
    run = grow(tmp_path, "--max_steps", "8")
    read = []
    batch_of = TrainingRows.__getitems__

    def listen(self, indices):
        read.extend(indices)
        return batch_of(self, indices)

    monkeypatch.setattr(TrainingRows, "__getitems__", listen)
    go_on(run, "--max_steps", "12")
    assert read == list(range(8 * BATCH, 12 * BATCH))
    assert checkpoints(run)[-1] == 12


def test_without_clipping_the_gradient_is_measured_all_the_same(make_trainer) -> None:
    trainer = make_trainer(max_grad_norm=0.0, logging_steps=2)
    trainer.train()
    assert all(row["grad_norm"] > 0 for row in read_metrics(trainer.args.output_dir))


def test_no_cache_is_built_in_training(make_trainer, monkeypatch) -> None:
    trainer, outputs = make_trainer(), []
    compute = Trainer.compute_loss

    def listen(self, model, inputs, return_outputs=False, **kwargs):
        loss, output = compute(self, model, inputs, return_outputs=True, **kwargs)
        outputs.append(output)
        return (loss, output) if return_outputs else loss

    monkeypatch.setattr(Trainer, "compute_loss", listen)
    trainer.train()
    assert len(outputs) == 4
    assert all(output.get("past_key_values") is None for output in outputs)


# signals


def test_signal_handlers_are_restored(make_trainer) -> None:
    before = handlers()
    trainer = make_trainer()
    during = []

    class Monitor(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            during.append(handlers())

    trainer.add_callback(Monitor())
    trainer.train()
    assert handlers() == before
    assert all(ours != theirs for step in during for ours, theirs in zip(step, before, strict=True)) and during


def test_signal_handlers_are_restored_after_a_failure(make_trainer, monkeypatch) -> None:
    before = handlers()
    trainer = make_trainer()
    monkeypatch.setattr(Trainer, "training_step", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(UserError):
        trainer.train()
    assert handlers() == before


def test_a_second_signal_is_the_ordinary_one(make_trainer) -> None:
    trainer, before = make_trainer(), handlers()
    trainer.stop_on_signal.on_train_begin(trainer.args, trainer.state, trainer.control)
    signal.raise_signal(signal.SIGINT)
    assert trainer.stop_on_signal.received == signal.SIGINT
    assert handlers() == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_cpu_trains_with_its_cheap_dropout(make_trainer) -> None:
    model = make_trainer().model
    assert all(type(module) is FastDropout for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert all(layer.self_attn.drop is fast_dropout for layer in model.model.layers)


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_what_was_trained_is_gone_before_the_best_model_is_loaded(tmp_path, monkeypatch, verb) -> None:
    """Model, gradients and optimizer: a GPU that they fill has no room for a second model."""
    known, left, free_device_memory = [], [], GPTTrainer.free_device_memory

    def spied(self) -> None:
        known.extend(map(weakref.ref, [self.model, self.optimizer, self.optimizer.optimizer, *self.model.parameters()]))
        free_device_memory(self)
        left.extend(type(held()) for held in known if held() is not None)

    monkeypatch.setattr(GPTTrainer, "free_device_memory", spied)
    run_dir = grow(tmp_path, "--average_decay", "0.9") if verb == "pretrain" else None
    if verb == "finetune":
        save(stock_model(), tmp_path / "base")
        write_text(tmp_path)
        flags = ["--text_files", str(tmp_path / "text.txt"), "--data_dir", str(tmp_path / "tokens"), *TINY]
        run_dir = tmp_path / "tuned"
        finetune.main([str(tmp_path / "base"), *flags, "--output_dir", str(run_dir)])
    assert len(known) > 10
    assert left == []
    assert (run_dir / "sample.txt").read_text(encoding="utf-8"), "the best model wrote it"
