"""`acorn merge ADAPTER OUT [--dtype …]`: fold an adapter into its base, and prove that nothing else changed."""

import argparse
from pathlib import Path

import torch
from torch import nn

from training.data.tokenizers import load_tokenizer
from training.model.loading import DTYPES, base_of, is_adapter, load_adapter, load_causal_lm, tokenizer_home
from training.model.sizes import context_of, text_config
from training.share.model_card import CardFacts, write_card
from training.system.errors import UserError, one_line, quiet_libraries, run_main
from training.system.files import new_directory, read_json
from training.system.flags import FlagParser
from training.system.shell import shell

EPILOG = """examples:
  acorn merge runs/gpt2-lora my-gpt2
  acorn merge runs/gpt2-lora/checkpoint-200 my-gpt2 --dtype bfloat16"""
TOKENS = 64
LARGEST = 1e-3  # more than rounding: such a merge is not written


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags."""
    parser = FlagParser(
        prog="acorn merge",
        description="Fold an adapter into its base: a plain model that needs no PEFT. Logits on random ids are "
        "compared in float32, before the merge and after it is read back, and the largest difference is printed.",
        epilog=EPILOG,
    )
    parser.add_argument("adapter", help="run or checkpoint of `acorn finetune`, or any PEFT adapter's directory")
    parser.add_argument("out", help="output directory; it must be empty or not exist")
    parser.add_argument("--dtype", default="float32", help="type of the weights: float32, bfloat16 or float16")
    parser.add_argument("--trust_remote_code", action="store_true", help="run model code from the Hub")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Merge, compare, write."""
    flags = parse(argv)
    quiet_libraries()
    directory, out = Path(flags.adapter), Path(flags.out)
    if flags.dtype not in DTYPES or flags.dtype == "auto":
        raise UserError(f"dtype={flags.dtype!r}: choose float32, bfloat16 or float16")
    if not directory.is_dir():
        raise UserError(f"adapter {flags.adapter!r}: there is no such directory")
    if not is_adapter(str(directory)):
        what = "holds a plain model already" if (directory / "config.json").is_file() else "holds no adapter"
        raise UserError(f"{directory}: {what} (no adapter_config.json); name a run of `acorn finetune` with an adapter")
    with new_directory(out) as aside:
        difference, count = merge(directory, aside, flags)
        load_tokenizer(tokenizer_home(str(directory))).save_pretrained(aside)
        write_card(aside, card(directory, out))
    print(f"largest difference of logits, unmerged and merged, on {count} random ids: {difference:.2e}")
    print(f"The model is in {out}. Next:\n  {shell('acorn', 'generate', out)} --prompt …")


def merge(directory: Path, out: Path, flags: argparse.Namespace) -> tuple[float, int]:
    """Write the merged model, read it back and compare; (largest difference of logits, on how many ids)."""
    adapted = load_adapter(str(directory), "float32", flags.trust_remote_code).eval()
    config = next(iter(adapted.peft_config.values()))
    if config.is_prompt_learning:
        kind = str(config.peft_type).split(".")[-1].lower()
        raise UserError(f"{directory}: {kind} adds virtual tokens and changes no weights, so there is nothing to merge")
    untie_adapted(adapted)
    vocab_size, length = text_config(adapted.config).vocab_size, min(TOKENS, context_of(adapted.config))
    ids = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(1337))
    was_tied = bool(getattr(adapted.config, "tie_word_embeddings", False))
    try:
        unmerged = logits(adapted, ids)
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{directory}: PEFT cannot merge this adapter: {one_line(error)}") from error
    tie_as_found(merged, was_tied)
    merged.save_pretrained(out)
    written = load_causal_lm(str(out), "float32", flags.trust_remote_code)
    difference = float((logits(written, ids) - unmerged).abs().max())
    if not difference <= LARGEST:
        raise UserError(f"{directory}: merged logits differ by {difference:.2e}; nothing is written")
    if flags.dtype != "float32":
        merged.to(DTYPES[flags.dtype]).save_pretrained(out)
    return difference, ids.numel()


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """(sequences, tokens, vocabulary) in float32."""
    return model(input_ids=ids, use_cache=False).logits.float()


def untie_adapted(model) -> None:
    """Give head and embedding a weight each where an adapter lies on one of a tied pair: that one alone it changes."""
    layers = [model.get_output_embeddings(), model.get_input_embeddings()]
    head, embedding = (getattr(layer, "base_layer", layer) for layer in layers)
    if head is not None and [head, embedding] != layers and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def tie_as_found(model, was_tied: bool) -> None:
    """Say in the config whether head and embedding are one, by their weights: what PEFT says of them may be wrong."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if was_tied and head is not None:
        model.config.tie_word_embeddings = torch.equal(head.weight, embedding.weight)
        model.tie_weights()


def card(directory: Path, out: Path) -> CardFacts:
    """What the plain model says of itself."""
    base = base_of(directory)
    kind = read_json(directory / "adapter_config.json").get("peft_type", "adapter")
    about = f"`{base}` with the {kind} adapter `{directory.name}` merged into its weights by Acorn."
    return CardFacts(out.name, about, base_model=base, tags=["acorn", kind.lower()])


if __name__ == "__main__":
    run_main(main)
