"""From a finetuning recipe to a finished run: training's `Run` with a base and its adapter, other rows and a card."""

import dataclasses
import json
import math
import shutil
import textwrap
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path

from transformers import set_seed

from training.config.checks import check_attention
from training.config.publishing import is_hub_id
from training.costs import refuse_large_batch
from training.data.corpus import Corpus, refuse_other_inputs
from training.model.devices import choose_attention, peak_memory
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
from training.model.sizes import context_of
from training.run import Run, sequence_length
from training.share.metrics_file import read_metrics
from training.share.model_card import CardFacts
from training.share.report import data_section, datasets_of, metrics_of, next_steps, sources_of
from training.system.errors import UserError
from training.system.files import read_json, write_whole

from .adapters import attach, count_parameters, quantization, virtual_tokens
from .arguments import FinetuneRecipe, refuse_ungrown
from .data import Examples, read_data
from .packing import held_out_rows, keeps_documents_apart
from .trainer import FinetuneTrainer, refuse_checkpointing, refuse_optimizer

DEFAULT_BLOCK = 1024
FACTS = "finetune.json"
WIDEST = 160  # characters of two samples side by side


class FinetuneRun(Run):
    """A run of finetuning; `facts` is what it keeps in finetune.json beside its losses: names, sizes and samples."""

    verb = "finetune"
    recipe_type = FinetuneRecipe
    changeable_model = ()

    def check(self) -> None:
        self.model, self.adapter = self.recipe.model_arguments(), self.recipe.adapter_arguments()
        refuse_ungrown(self.model.model_name_or_path)
        check_attention(self.model.attn_implementation, self.args.device.type)
        quantization(self.adapter.adapter, self.args.precision)  # refuses what this machine cannot do
        refuse_checkpointing(self.args, self.adapter)
        if not self.args.force_precision:
            refuse_emulated_dtype(self.model.dtype, self.args.device.type)

    def open_data(self, is_resumed: bool = False) -> None:
        """Tokenizer, data and prompt; wrong ones are refused before the weights are read.

        Chats and pairs, which are stored nowhere prepared, each process reads for itself.
        """
        recipe, data = self.recipe, self.recipe.data_arguments()
        config = load_config(self.model.model_name_or_path, self.model.trust_remote_code)
        self.tokenizer = load_model_tokenizer(data.tokenizer or self.model.model_name_or_path, config)
        context = context_of(config) - virtual_tokens(self.adapter)
        self.block_size = data.block_size or min(context, DEFAULT_BLOCK)
        if not 2 <= self.block_size <= context:
            raise UserError(f"block_size={self.block_size}: must be from 2 to the model's context, {context}")
        refuse_large_batch(self.args, self.block_size, getattr(config.get_text_config(), "vocab_size", 1))
        super().open_data(is_resumed)
        given = recipe.sample_arguments().prompt
        if isinstance(self.corpus, Examples):  # asked by default: the first question that is held out
            self.question = self.corpus.question if given is None else given
            prompt = self.corpus.prompt(self.question)
        else:
            self.question = prompt = given or "\n"
        self.sample = dataclasses.replace(recipe.sample_arguments(), prompt=prompt)
        if self.sample.max_new_tokens:
            prompt_tensor(self.corpus.tokenizer, prompt, context)

    def read_data(self, is_resumed: bool) -> Corpus | Examples:
        return read_data(self.recipe, self.tokenizer, self.block_size, is_resumed)

    def build_trainer(self, checkpoint: Path | None) -> FinetuneTrainer:
        """The trainer of base, adapter and rows put together."""
        args, data = self.args, self.recipe.data_arguments()
        base, name, known = self.load_base(checkpoint)
        is_apart = keeps_documents_apart(base, name, args)
        refuse_optimizer(args, self.adapter, base)
        packing = data.packing and is_apart and not virtual_tokens(self.adapter)
        if data.packing and not packing and self.is_main_process:
            ignores = "this model ignores position_ids resets"
            print(f"packing is off: {'virtual tokens take the place of position_ids' if is_apart else ignores}")
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
        if not model.attn_implementation:
            is_masked = self.recipe.data_arguments().packing and args.device.type == "cpu"  # not every base has flex
            choose_attention(base, args, self.block_size, is_masked)
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
        return f"{self.adapter.adapter} on {self.trainer.base[0]}, {share_in_words(self.facts)}"

    def finish(self) -> None:
        """As in pretraining; the figures before and after go into finetune.json too."""
        rows = read_metrics(self.directory)
        self.first = next((row for row in rows if row["step"] == 0), None)
        self.best = self.recipe.best([row for row in rows if row["step"] > 0])
        if self.best is None:  # taken away, and the last evaluation was before
            mend = "restore it, or train further with a larger --max_steps"
            raise UserError(f"{self.directory}: metrics.jsonl holds no evaluation; {mend}")
        self.facts |= {
            "perplexity_before": math.exp(self.first["eval_loss"]) if self.first else None,
            "perplexity_after": math.exp(self.best["eval_loss"]),
            "best_step": self.best["step"],
            "seconds": rows[-1]["seconds"],
            "peak_memory_bytes": peak_memory(self.args.device),
            "device": self.args.device.type,
        }
        super().finish()

    def load_best(self):
        if self.adapter.adapter == "qlora":  # its base would be loaded in full
            return None
        load = load_causal_lm if self.adapter.adapter == "full" else load_adapter
        return load(str(self.directory), "auto", self.model.trust_remote_code)

    def card_facts(self, sample: str) -> CardFacts:
        """What the model card says: the base and its figures before, the figures after, and both samples."""
        self.facts["sample_after"] = sample
        self.write_facts()
        recipe, facts, sources = self.recipe, self.facts, sources_of(self.recipe)
        base, is_whole, is_text = facts["base_model"], facts["adapter"] == "full", not isinstance(self.corpus, Examples)
        what = f"`{base}`, all of it" if is_whole else f"{facts['adapter']} adapter for `{base}`"
        samples = {"Before": facts["sample_before"], "After": sample}
        shown = "".join(f"\n\n{name}:\n\n{textwrap.indent(text, '    ')}" for name, text in samples.items() if text)
        return CardFacts(
            name=recipe.name,
            about=f"Finetuned by Acorn: {what}, {share_in_words(facts)}.",
            license=recipe.card_arguments().license,
            language=recipe.card_arguments().language,
            base_model=base,
            datasets=datasets_of(recipe),
            library_name="transformers" if is_whole else "peft",
            tags=["acorn", facts["adapter"]],
            needs_remote_code=bool(getattr(load_config(base, self.model.trust_remote_code), "auto_map", None)),
            prompt=facts["question"],
            data=data_section(sources, self.corpus.manifest) + ("" if is_text else f"\n{self.corpus.summary()}"),
            evaluated_on="the held-out part of the data" + ("" if is_text else ", answers alone"),
            metrics=metrics_of(self.best),
            metrics_before=metrics_of(self.first) if self.first else {},
            results=f"Best at step {facts['best_step']:,}; {cost_in_words(facts)}.\n\n![loss](loss.png)"
            + (f"\n\nThe same prompt before and after:{shown}" if shown else ""),
            command=recipe.command,
        )

    def closing_words(self, sample: str) -> str:
        samples = f"\n{side_by_side(self.facts['sample_before'], sample)}\n\n" if sample else ""
        return samples + summary(self.directory, self.facts, self.sample.prompt, self.trainer.state.global_step)

    def held_out(self, model, tokenizer, block_size: int | None, stride: int | None = None) -> tuple:
        if stride is not None:
            why = "what this run held out are documents, and no sequence runs over the end of one"
            raise UserError(f"stride={stride}: {why}; leave it out, or evaluate on text (--text_files)")
        data = self.recipe.data_arguments()
        usual = data.block_size or min(sequence_length(model, None), DEFAULT_BLOCK)
        length = sequence_length(model, block_size, usual)
        corpus = read_data(self.recipe, tokenizer, length, is_resumed=True)
        has_virtual_tokens = bool(getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0))
        is_packed = data.packing and not has_virtual_tokens and keeps_documents_apart(model, str(self.directory))
        split = corpus.manifest["splits"]["validation"]
        counted = split["answer_tokens"] if isinstance(corpus, Examples) else split["tokens"] - 1
        return held_out_rows(corpus, length, is_packed), counted, split["bytes"]


# ---- what a run says of itself


def share_in_words(facts: dict) -> str:
    trained, total = facts["trained_parameters"], facts["parameters"]
    return f"{trained:,} of {total:,} parameters trained ({trained / total:.2%})"


def cost_in_words(facts: dict) -> str:
    memory = f"{facts['peak_memory_bytes'] / 1e9:.2f} GB of {'GPU ' if facts['device'] == 'cuda' else ''}memory at most"
    return f"{facts['seconds']:,.0f} seconds, {memory}"


def summary(run_dir: Path, facts: dict, prompt: str, step: int) -> str:
    """The figures before and after, what they cost, and what to type next."""
    before, after = facts["perplexity_before"], facts["perplexity_after"]
    shown = f"{before:,.3f} before, {after:,.3f} after" if before else f"{after:,.3f} after"
    is_worse = before is not None and after >= before
    is_whole = facts["adapter"] == "full"  # else its base must be on the Hub where it goes
    push = {} if is_whole or is_hub_id(facts["base_model"]) else {"base_model": "YOU/BASE"}
    merge = [] if facts["adapter"] in ("full", "prompt", "prefix") else [("merge", run_dir, Path(f"{run_dir}-merged"))]
    return "\n".join(
        [
            f"perplexity on held-out text: {shown} (step {facts['best_step']:,})"
            + ("; it did not get better: lower --learning_rate, or give more text" if is_worse else ""),
            f"{share_in_words(facts)}; {cost_in_words(facts)}",
            next_steps(run_dir, prompt, step, "model" if is_whole else "adapter", *merge, **push),
        ]
    )


def side_by_side(before: str, after: str) -> str:
    """Two texts in two columns, as wide as the terminal."""
    width = max(20, (min(shutil.get_terminal_size((100, 24)).columns, WIDEST) - 3) // 2)
    columns = [
        [part for line in text.splitlines() for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]]
        for text in (before, after)
    ]
    rows = [("before", "after"), *zip_longest(*columns, fillvalue="")]
    lines = [f"{left:<{width}} │ {right}".rstrip() for left, right in rows]
    return "\n".join([lines[0], f"{'─' * width}─┼─{'─' * width}", *lines[1:]])
