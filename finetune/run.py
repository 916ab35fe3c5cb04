"""From a finetuning recipe to a finished run: training's `Run` with a base and its adapter, other rows and a card."""

import dataclasses
import json
import math
from contextlib import nullcontext
from pathlib import Path

from transformers import set_seed

from training.config.choices import check_attention
from training.costs import refuse_large_batch
from training.data.corpus import corpus_at, whereabouts
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
from training.model.sampling import prompt_tensor, sample_text
from training.run import Run, sequence_length
from training.share.metrics_file import read_metrics
from training.share.model_card import CardFacts
from training.system.distributed import main_process_first
from training.system.errors import UserError
from training.system.files import read_json, write_whole

from .adapters import attach, count_parameters, quantization, virtual_tokens
from .arguments import FinetuneRecipe
from .data import Examples, describe, read_data
from .packing import as_trained, held_out_rows, keeps_documents_apart
from .report import card_facts, side_by_side, summary
from .trainer import FinetuneTrainer, refuse_optimizer

DEFAULT_BLOCK = 1024
FACTS = "finetune.json"


class FinetuneRun(Run):
    """A run of finetuning; `facts` is what it keeps in finetune.json beside its losses: names, sizes and samples."""

    verb = "finetune"
    recipe_type = FinetuneRecipe
    changeable_model = ()

    def check(self) -> None:
        self.model, self.adapter = self.recipe.model_arguments(), self.recipe.adapter_arguments()
        check_attention(self.model.attn_implementation, self.args.device.type)
        quantization(self.adapter.adapter, self.args.precision)  # refuses what this machine cannot do
        if not self.args.force_precision:
            refuse_emulated_dtype(self.model.dtype, self.args.device.type)

    def open_data(self, is_resumed: bool = False) -> None:
        """Tokenizer, data and prompt; wrong ones are refused before the weights are read.

        Chats and pairs, which are stored nowhere prepared, each process reads for itself.
        """
        recipe, data = self.recipe, self.recipe.data_arguments()
        config = load_config(self.model.model_name_or_path, self.model.trust_remote_code)
        tokenizer = load_model_tokenizer(data.tokenizer or self.model.model_name_or_path, config)
        context = context_of(config) - virtual_tokens(self.adapter)
        self.block_size = data.block_size or min(context, DEFAULT_BLOCK)
        if not 2 <= self.block_size <= context:
            raise UserError(f"block_size={self.block_size}: must be from 2 to the model's context, {context}")
        refuse_large_batch(self.args, self.block_size, getattr(config.get_text_config(), "vocab_size", 1))
        self.corpus = main_process_first(
            self.args,
            lambda: read_data(data, tokenizer, self.block_size, recipe.name, is_resumed),
            "prepare",
            word=whereabouts,
            take=corpus_at,
        )
        given = recipe.sample_arguments().prompt
        if isinstance(self.corpus, Examples):  # asked by default: the first question that is held out
            self.question = self.corpus.question if given is None else given
            prompt = self.corpus.prompt(self.question)
        else:
            self.question = prompt = given or "\n"
        self.sample = dataclasses.replace(recipe.sample_arguments(), prompt=prompt)
        if self.sample.max_new_tokens:
            prompt_tensor(self.corpus.tokenizer, prompt, context)

    def build_trainer(self, checkpoint: Path | None) -> FinetuneTrainer:
        """The trainer of base, adapter and rows put together."""
        args, data = self.args, self.recipe.data_arguments()
        base, name, known = self.load_base(checkpoint)
        is_apart = keeps_documents_apart(base, name, **as_trained(base, args))
        refuse_optimizer(args, self.adapter, base)
        packing = data.packing and is_apart and not virtual_tokens(self.adapter)
        if data.packing and not packing and self.is_main_process:
            why = "virtual tokens leave no positions to tell documents apart" if is_apart else None
            print(f"packing is off: {why or 'this model ignores position_ids that start again'}")
        set_seed(args.seed)
        return FinetuneTrainer(
            attach(base, self.adapter, name),
            args,
            self.corpus,
            self.block_size,
            data,
            self.sample,
            packing=packing,
            adapter=self.adapter,
            base=(name, known),
        )

    def load_base(self, checkpoint: Path | None):
        """(model, name, fingerprint) of what is finetuned; a whole model that goes on is its own checkpoint."""
        args, model, adapter = self.args, self.model, self.adapter.adapter
        name = model.model_name_or_path
        if Path(name).is_dir():
            name = str(Path(name).absolute())  # an adapter names its base, wherever it is loaded from
        is_whole_again = checkpoint is not None and adapter == "full"
        options = quantization(adapter, args.precision)
        if model.attn_implementation:
            options["attn_implementation"] = model.attn_implementation
        place = str(checkpoint) if is_whole_again else name
        base = load_causal_lm(place, model.dtype, model.trust_remote_code, **options)
        if model.dtype == "auto" and not args.force_precision:
            base = in_native_dtype(base, args.device.type)
        known = None if adapter == "qlora" or is_whole_again else fingerprint(base)
        if not model.attn_implementation and args.device.type == "cpu" and args.bf16:
            base.set_attn_implementation("eager")  # the backward pass of fused attention is slower in bf16 on CPUs
        return base, name, known

    def claim(self, checkpoint: Path | None) -> bool:
        """As in pretraining; a run that begins keeps what the base writes after the prompt."""
        refuse_other_inputs(self.directory, self.trainer.inputs)
        kept = read_json(self.directory / FACTS, "remove it: it is made again, without the sample from before")
        best_is_gone = super().claim(checkpoint)
        trained, total = count_parameters(self.trainer.model)
        self.facts = {
            "adapter": self.adapter.adapter,
            "base_model": self.trainer.base[0],
            "trained_parameters": trained,
            "parameters": total,
            "question": self.question,
            "sample_before": str(kept.get("sample_before", "")),
        }
        if checkpoint is None:
            self.facts["sample_before"] = self.sample_of_base()
            self.write_facts()
        return best_is_gone

    def sample_of_base(self) -> str:
        if not self.sample.max_new_tokens:
            return ""
        model = self.trainer.model
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            return sample_text(model, self.corpus.tokenizer, self.sample, self.args.seed)

    def write_facts(self) -> None:
        write_whole(self.directory / FACTS, json.dumps(self.facts, indent=1, ensure_ascii=False) + "\n")

    def describe_model(self) -> str:
        trained, total = self.facts["trained_parameters"], self.facts["parameters"]
        share = f"{trained:,} of {total:,} parameters trained ({trained / total:.2%})"
        return f"{self.adapter.adapter} on {self.trainer.base[0]}, {share}\n{describe(self.corpus)}"

    def finish(self) -> None:
        self.facts["peak_memory_bytes"] = peak_memory(self.args.device)
        super().finish()

    def load_best(self):
        if self.adapter.adapter == "qlora":  # its base would be loaded in full
            return None
        load = load_causal_lm if self.adapter.adapter == "full" else load_adapter
        return load(str(self.directory), "auto", self.model.trust_remote_code)

    def card_facts(self, sample: str) -> CardFacts:
        """The figures before and after, which go into finetune.json too."""
        rows = read_metrics(self.directory)
        best = self.recipe.best([row for row in rows if row["step"] > 0])
        if best is None:  # taken away, and the last evaluation was before
            mend = "restore it, or train further with a larger --max_steps"
            raise UserError(f"{self.directory}: metrics.jsonl holds no evaluation; {mend}")
        first = next((row for row in rows if row["step"] == 0), None)
        self.facts |= {
            "perplexity_before": math.exp(first["eval_loss"]) if first else None,
            "perplexity_after": math.exp(best["eval_loss"]),
            "best_step": best["step"],
            "seconds": rows[-1]["seconds"],
            "device": self.args.device.type,
            "sample_after": sample,
        }
        self.write_facts()
        return card_facts(self.recipe, self.corpus, self.facts, first, best)

    def closing_words(self, sample: str) -> str:
        samples = f"\n{side_by_side(self.facts['sample_before'], sample)}\n\n" if sample else ""
        return samples + summary(self.directory, self.facts, self.sample.prompt)

    def held_out(self, model, tokenizer, block_size: int | None) -> tuple:
        data = self.recipe.data_arguments()
        usual = data.block_size or min(sequence_length(model, None), DEFAULT_BLOCK)
        length = sequence_length(model, block_size, usual)
        corpus = read_data(data, tokenizer, length, self.recipe.name, is_resumed=True)
        has_virtual_tokens = bool(getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0))
        is_packed = data.packing and not has_virtual_tokens and keeps_documents_apart(model, str(self.directory))
        split = corpus.manifest["splits"]["validation"]
        counted = split["answer_tokens"] if isinstance(corpus, Examples) else split["tokens"] - 1
        return held_out_rows(corpus, length, is_packed), counted, split["bytes"]
