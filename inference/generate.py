"""`acorn generate MODEL --prompt "…"`: text from a run directory, a checkpoint or a Hub id."""

import argparse
import sys
from pathlib import Path

from tqdm.auto import tqdm

from training.model.loading import add_loading_flags, load_model_and_tokenizer, loading_options
from training.model.sampling import (
    BEYOND_CONTEXT,
    DRAFTS,
    TextPrinter,
    context_left,
    prompt_tensor,
    reads_on,
    stop_tokens,
)
from training.model.windows import has_learned_positions
from training.system.errors import UserError, log, quiet_libraries, run_main, unknown
from training.system.flags import FlagParser
from training.system.shell import shell

from .decoding.batches import Job, grow, refuse_drafts
from .decoding.compiled import compiled
from .decoding.drafts import load_draft, refuse_short_draft
from .decoding.held import add_cache, add_cache_flags, refuse_cache
from .decoding.output import json_line, log_probabilities, open_output, refuse_taken, separator
from .decoding.prompts import Prompt, read_prompt, read_prompts
from .decoding.strategies import (
    add_strategy_flags,
    file_strategies,
    generate_arguments,
    given_strategies,
    refuse_unknown_ids,
    settle,
)
from .decoding.weights import QUANTIZATIONS, quantized

BATCH_SIZE = 16
EPILOG = """examples:
  acorn generate runs/quickstart --prompt "def main("
  acorn generate runs/quickstart --prompt FILE:start.txt --num_samples 3 --temperature 0.7 --seed 7
  acorn generate gpt2 --prompt "Once upon a time" --num_beams 4 --stop_strings "The end"
  acorn generate runs/quickstart --prompts prompts.jsonl --output samples.jsonl --logprobs
  acorn generate runs/large --prompt "import " --temperature 0 --assistant_model runs/small
  acorn generate runs/large --prompts prompts.jsonl --output samples.jsonl --compile --quantization int8
  acorn generate runs/large --prompt "import " --max_new_tokens 5000 --cache window --cache_window 256

What a model's generation_config.json says of sampling is not taken; give it as --generation_config to take it."""

BEYOND = """where the context is full: window goes on from its last half; extrapolate goes on at positions that the
model was not trained on, which is worse as a rule, and not with learned positions (default: window; with a --cache
that drops tokens, go on with what it holds)"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags; names are generate()'s where it has one."""
    parser = FlagParser(
        prog="acorn generate",
        usage="acorn generate MODEL [--flag value ...]",
        description="Generate text with a model, streamed to the terminal.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", help="run directory, checkpoint, adapter, model directory or Hub id")
    add("--prompt", help="text to continue, FILE:path, or - for standard input (default: start a new document)")
    add("--prompts", help="JSONL file of many, or -: an object a line, with its text as prompt")
    add("--batch_size", type=int, help=f"of --prompts, so many are continued at once (default: {BATCH_SIZE})")
    add("--json", action="store_true", help="print samples as lines of JSON: text, tokens, why it ended")
    add("--output", help="new JSONL file to write those lines to")
    add("--logprobs", action="store_true", help="the log-probability of each token in those lines")
    add("--no_stream", action="store_true", help="generate all samples in one batch, and print each when complete")
    add("--generation_config", help="JSON file of the strategies below, such as a model's generation_config.json")
    add("--seed", type=int, default=1337, help="seed of the first sample; the n-th after it has the seed + n")
    add("--ignore_eos", action="store_true", help="go on past the end-of-text token")
    add("--beyond_context", help=BEYOND)
    add("--assistant_model", help="smaller run that drafts for the model to verify: same text, fewer passes")
    add_strategy_flags(parser)
    add = parser.add_argument_group("how it runs").add_argument
    add("--quantization", help="int8: weights of linear layers in 8 bits, which a CPU reads in less time")
    add("--compile", action="store_true", help="compile the step that writes a token: slow to start, quick after that")
    add_loading_flags(add)
    add_cache_flags(parser)
    flags = parser.parse_args(argv)
    check_output(flags)
    return flags


def check_output(flags: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, or that nothing would come of."""
    if flags.prompt is not None and flags.prompts is not None:
        raise UserError("--prompt and --prompts: give one of them")
    if flags.beyond_context not in (None, *BEYOND_CONTEXT):
        raise unknown("beyond_context", flags.beyond_context, BEYOND_CONTEXT)
    if flags.quantization is not None and flags.quantization not in QUANTIZATIONS:
        raise unknown("quantization", flags.quantization, QUANTIZATIONS)
    if flags.batch_size is not None and flags.prompts is None:
        raise UserError("--batch_size: has no effect without --prompts")
    if flags.json and flags.output:
        raise UserError("--json and --output: the same lines, printed or written to a file; give one of them")
    if flags.logprobs and not (flags.json or flags.output):
        raise UserError("--logprobs: has no effect on text; add --json or --output FILE.jsonl")
    if flags.output:
        refuse_taken(flags.output)


def main(argv: list[str] | None = None) -> None:
    """Write samples to stdout or a file."""
    flags = parse(argv)
    file, file_ends = file_strategies(Path(flags.generation_config)) if flags.generation_config else (None, None)
    values = settle(given_strategies(flags), file, flags.assistant_model is not None)
    refuse_cache(flags, values)
    if flags.compile and (flags.assistant_model is not None or "prompt_lookup_num_tokens" in values):
        raise UserError(
            "--compile: not with drafts, which are verified in passes of many lengths; leave one of them out"
        )
    if flags.prompts is None:
        prompts = [Prompt(read_prompt(flags.prompt or ""), "prompt", {})]
    else:
        prompts = read_prompts(flags.prompts)
    quiet_libraries()
    model, tokenizer = load_model_and_tokenizer(flags.model, **loading_options(flags))
    refuse_unknown_ids(values, model)
    rows = encode(flags, model, tokenizer, prompts)
    job = Job(
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=values["max_new_tokens"],
        ends=[] if flags.ignore_eos else stop_tokens(model) if file_ends is None else file_ends,
        stop_strings=values.get("stop_strings", ()),
        num_samples=values.get("num_return_sequences", 1),
        seed=flags.seed,
        beyond_context=flags.beyond_context or "window",
        generation=generate_arguments(values),
    )
    add_cache(job, flags, max(map(len, rows)))
    add_draft(job, flags, values, max(map(len, rows)))
    quantized(model, flags.quantization)
    if flags.compile:
        job.generation |= compiled(model)
    write(job, prompts, rows, flags)


def encode(flags: argparse.Namespace, model, tokenizer, prompts: list[Prompt]) -> list[list[int]]:
    """The ids of each prompt; one that the model cannot read whole is refused."""
    others = {"make_cache": flags.cache, **{name: getattr(flags, name) for name in DRAFTS}}
    is_window, has_memory = flags.beyond_context != "extrapolate", reads_on(model, others)
    if not is_window and has_memory:
        raise UserError("beyond_context=extrapolate: the model goes on with its memory; leave it out")
    if not is_window and has_learned_positions(model):
        raise UserError("beyond_context=extrapolate: the model's positions are learned, and end with its context")
    limit = context_left(model) if is_window and not has_memory else None
    return [prompt_tensor(tokenizer, prompt.text, limit, prompt.name)[0].tolist() for prompt in prompts]


def add_draft(job: Job, flags: argparse.Namespace, values: dict, longest: int) -> None:
    """Load the draft model that the flags name; drafts that could not be right are refused.

    longest: tokens of the longest prompt.
    """
    if flags.assistant_model is not None:
        draft = load_draft(flags.assistant_model, job.model, job.tokenizer, values, **loading_options(flags))
        refuse_short_draft(flags.assistant_model, draft, job.model, longest + job.max_new_tokens)
        job.generation["assistant_model"] = draft
    if job.has_drafts:
        refuse_drafts(job, longest)


def write(job: Job, prompts: list[Prompt], rows: list[list[int]], flags: argparse.Namespace) -> None:
    """Generate, and write as the flags say; where there are drafts, say what became of them."""
    streams = not (flags.no_stream or flags.json or flags.output or flags.prompts or job.has_beams)
    if streams:
        write_streamed(job, prompts[0].text, rows[0])
    else:
        write_complete(job, prompts, rows, flags)
    if job.has_drafts:
        log(str(job.passes))
    if sys.stderr.isatty():
        log(f"Type next: {shell('acorn', 'chat', flags.model)}")


def write_streamed(job: Job, prompt: str, ids: list[int]) -> None:
    """Samples one after the other, each as it grows."""
    for number in range(job.num_samples):
        printer = TextPrinter(
            job.tokenizer, ids, lambda text: print(text, end="", flush=True), stop_strings=job.stop_strings
        )
        print(separator(number) + prompt, end="", flush=True)
        grow(job.alone(number), [ids], streamer=printer)
        printer.finish()
        sys.stdout.write("\n")


def write_complete(job: Job, prompts: list[Prompt], rows: list[list[int]], flags) -> None:
    """Samples batch by batch, in the order of their prompts."""
    written, batch_size = 0, flags.batch_size or BATCH_SIZE
    with (
        open_output(flags.output) as out,
        tqdm(
            total=len(rows), unit="prompt", leave=False, file=sys.stderr, disable=None if len(rows) > 1 else True
        ) as bar,
    ):
        for first in range(0, len(rows), batch_size):
            batch = slice(first, first + batch_size)
            for prompt, ids, samples in zip(prompts[batch], rows[batch], grow(job, rows[batch]), strict=True):
                for number, sample in enumerate(samples):
                    if flags.json or flags.output:
                        logprobs = log_probabilities(job, ids, sample) if flags.logprobs else None
                        line = json_line(prompt, number, sample, logprobs)
                    else:
                        line = separator(written) + prompt.text + sample.text
                    print(line, file=out, flush=True)
                    written += 1
                bar.update()
    if flags.output:
        log(f"{written} samples of {len(rows)} prompts: {flags.output}")


if __name__ == "__main__":
    run_main(main)
