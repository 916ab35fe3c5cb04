"""`acorn generate MODEL --prompt "…"`: text from a run directory, a checkpoint or a Hub id."""

import argparse
import sys

import torch
from transformers import set_seed

from training.model.devices import best_device
from training.model.loading import load_model_and_tokenizer, refuse_emulated_dtype
from training.model.sampling import (
    TextPrinter,
    context_left,
    continuations,
    continue_ids,
    prompt_tensor,
    sampling_arguments,
)
from training.system.errors import UserError, quiet_libraries, run_main
from training.system.flags import FlagParser

from .decoding.compiled import compiled
from .decoding.prompts import read_prompt

EPILOG = """examples:
  acorn generate runs/quickstart --prompt "def main("
  acorn generate runs/quickstart --prompt FILE:start.txt --num_samples 3 --temperature 0.7 --seed 7
  acorn generate gpt2 --prompt "Once upon a time" --max_new_tokens 60"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags; names are generate()'s where it has one."""
    parser = FlagParser(
        prog="acorn generate",
        description="Generate text with a model, streamed to the terminal.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", help="run directory, checkpoint, model directory or Hub id")
    add("--prompt", default="", help="text to continue, or FILE:path (default: start a new document)")
    add("--max_new_tokens", type=int, default=300, help="length of a sample in tokens")
    add("--num_samples", type=int, default=1, help="number of samples")
    add("--temperature", type=float, default=0.8, help="sampling temperature; 0 is greedy")
    add("--top_k", type=int, default=200, help="sample from the k most likely tokens; 0: all")
    add("--top_p", type=float, help="sample from the most likely tokens whose probabilities add up to this")
    add("--repetition_penalty", type=float, default=1.0, help="above 1 repeats less")
    add("--seed", type=int, default=1337, help="seed of the sampling")
    dtypes = "float32, bfloat16, float16 or auto (as saved, unless the device only emulates that)"
    add("--dtype", default="auto", help=dtypes)
    add("--compile", action="store_true", help="compile the step that writes a token: slow to start, quick after that")
    add("--force_precision", action="store_true", help="use a type even if the device only emulates it")
    add("--trust_remote_code", action="store_true", help="run model code from the Hub")
    add("--no_stream", action="store_true", help="generate all samples in one batch, and print each when complete")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write samples to stdout."""
    flags = parse(argv)
    if flags.max_new_tokens < 1:  # which a recipe may say, and means no sample
        raise UserError(f"max_new_tokens={flags.max_new_tokens}: must be above 0")
    quiet_libraries()
    generation = sampling_arguments(
        flags.temperature, flags.top_k, flags.top_p, repetition_penalty=flags.repetition_penalty
    )
    prompt = read_prompt(flags.prompt)
    if not flags.force_precision:
        refuse_emulated_dtype(flags.dtype, best_device().type)
    model, tokenizer = load_model_and_tokenizer(
        flags.model, flags.dtype, flags.trust_remote_code, flags.force_precision
    )
    if flags.compile:
        generation |= compiled(model)
    ids = prompt_tensor(tokenizer, prompt, context_left(model)).to(model.device)
    set_seed(flags.seed)
    write = write_batch if flags.no_stream else write_streamed
    write(model, tokenizer, prompt, ids, flags, generation)


def write_streamed(model, tokenizer, prompt: str, ids: torch.Tensor, flags, generation: dict) -> None:
    """Samples one after the other, each as it grows."""
    for number in range(flags.num_samples):
        printer = TextPrinter(tokenizer, ids[0].tolist(), lambda text: print(text, end="", flush=True))
        print(separator(number) + prompt, end="", flush=True)
        continue_ids(model, ids, flags.max_new_tokens, streamer=printer, **generation)
        printer.finish()
        sys.stdout.write("\n")


def write_batch(model, tokenizer, prompt: str, ids: torch.Tensor, flags, generation: dict) -> None:
    """All samples in one batch, which is quicker than one after the other."""
    grown = continue_ids(model, ids.repeat(flags.num_samples, 1), flags.max_new_tokens, **generation)
    for number, sample in enumerate(continuations(model, tokenizer, grown, ids.shape[1])):
        print(separator(number) + prompt + sample)


def separator(number: int) -> str:
    """A line between samples."""
    return "─" * 50 + "\n" if number else ""


if __name__ == "__main__":
    run_main(main)
