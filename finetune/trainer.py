"""Training's loop for pretrained models, with or without an adapter, on rows whose labels have gaps."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from modeling.loss import causal_lm_loss
from training.config.arguments import GPTTrainingArguments
from training.data.corpus import Corpus, Inputs
from training.loop.lanes import SeparatedRows
from training.loop.trainer import GPTTrainer
from training.model.loading import OUR_TYPES, record_base, without_warnings
from training.system.distributed import checkpoints_by_fsdp
from training.system.errors import UserError

from .adapters import build_loraplus, count_parameters
from .packing import ExampleRows, documents_in, held_out_rows


class FinetuneTrainer(GPTTrainer):
    """GPTTrainer with finetuning's rows and loss; everything else is training's.

    corpus: prepared text, or Examples. packing: whether documents share rows, kept apart by `position_ids`. adapter:
    AdapterArguments. base: (name, fingerprint) of the model that was adapted.
    """

    labels_differ = True

    def __init__(self, model, args, corpus, context_length, data, sample, *, packing: bool, adapter, base):
        self.packing, self.adapter, self.base = packing, adapter, base
        super().__init__(model, args, corpus, context_length, data, sample)
        self.model_accepts_loss_kwargs = True  # compute_loss below divides by the labels of the whole step

    @property
    def inputs(self) -> Inputs:
        """The data and the base, by fingerprints; of a whole model that goes on the base is no longer an input."""
        return {**self.corpus.inputs, "the base model": self.base[1]}

    def build_rows(self, args: GPTTrainingArguments, data):
        if isinstance(self.corpus, Corpus) and self.packing:
            end = self.corpus.tokenizer.eos_token_id
            return tuple(SeparatedRows(rows, end) for rows in super().build_rows(args, data))
        return self._example_rows(args)

    def memory_in_training(self, model, args, data) -> int:
        """None: the rows are documents by themselves."""
        return 0

    def memory_in_evaluation(self) -> int:
        return 0

    def _example_rows(self, args):
        """Rows of chats or pairs, or of a text's documents one by one where they cannot share a row."""
        end, documents = self.corpus.tokenizer.eos_token_id, documents_in(self.corpus, "train", self.context_length)
        once = ExampleRows(documents, self.context_length, end, self.packing)
        args.count_steps(len(once) / self.rows_per_step)
        rows = self.rows_per_step * args.max_steps
        training = ExampleRows(documents, self.context_length, end, self.packing, rows, args.order_seed)
        return training, held_out_rows(self.corpus, self.context_length, self.packing)

    def count_flops(self, model) -> float:
        """Two FLOPs a parameter forward, two backward, and two more for each that is trained."""
        trained, total = count_parameters(model)
        return 4.0 * total + 2.0 * trained

    def blocks(self, model):
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=[])

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.adapter.adapter == "loraplus":
            self.optimizer = build_loraplus(self.model, self.args, self.adapter.loraplus_lr_ratio)
        return super().create_optimizer(model)

    # ---- the loss: labels have gaps, and any model's logits will do

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross entropy of the labels that count, divided by the count of the whole step."""
        inputs = dict(inputs)
        labels = inputs.pop("shift_labels")
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, -labels.shape[1] :]  # virtual tokens come first
        loss = causal_lm_loss(logits, labels, num_items_in_batch, self.args.label_smoothing_factor)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.args.world_size  # DDP averages the gradients of processes
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation and saving

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in training; before the first step it is the base itself that is measured, without its adapter."""
        has_adapter = hasattr(self.model, "disable_adapter") and self.state.global_step == 0
        with self.model.disable_adapter() if has_adapter else nullcontext():
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; an adapter is saved with what its base is known by, and without PEFT's own model card."""
        with without_warnings():
            super().save_model(output_dir, _internal_call)
        if self.args.should_save and self.adapter.adapter != "full":
            directory = Path(output_dir or self.args.output_dir)
            (directory / "README.md").unlink(missing_ok=True)
            record_base(directory, *self.base)


def refuse_checkpointing(args, adapter) -> None:
    """A prefix is a cache, which checkpointed blocks run without in transformers, and fill twice in FSDP."""
    if adapter.adapter == "prefix" and (args.checkpoints_activations or checkpoints_by_fsdp(args)):
        name = "activation_checkpointing" if args.checkpoints_activations else "fsdp_activation_checkpointing"
        why = "a block that is computed twice loses its place in the cache that holds the prefix"
        raise UserError(f"{name}=True: {why}; make it false, or choose adapter=prompt or lora")


def refuse_optimizer(args, adapter, model) -> None:
    """Muon is for the matrices of whole Acorn models alone."""
    if args.optimizer != "adamw" and (adapter.adapter != "full" or model.config.model_type not in OUR_TYPES):
        raise UserError(f"optimizer={args.optimizer!r}: only for adapter=full on an Acorn model; use adamw")
    if args.optimizer != "adamw" and adapter.adapter == "loraplus":
        raise UserError(f"optimizer={args.optimizer!r}: loraplus has groups for adamw; leave it out")
