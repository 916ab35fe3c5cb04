"""Does each strategy of `acorn generate` repeat by its seed, a batch equal its prompts, and a draft equal greedy?

Continues sixteen ragged prompts with a trained run, by each strategy, twice together and once one by one, and a few by
greedy with drafts; prints the first sample of each, and at last one JSON line of what was equal.

    python benchmarks/strategies.py runs/quickstart --assistant_model runs/small
"""

import argparse
import dataclasses
import json
import sys
import sysconfig
import time
from pathlib import Path

from inference.decoding.batches import Job, grow
from inference.decoding.drafts import Passes, load_draft
from inference.decoding.strategies import generate_arguments, settle
from training.model.loading import load_model_and_tokenizer
from training.model.sampling import context_left, prompt_tensor, stop_tokens
from training.system.errors import quiet_libraries

STRATEGIES = {
    "greedy": {"temperature": 0.0},
    "greedy, repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.2},
    "greedy, no_repeat_ngram_size": {"temperature": 0.0, "no_repeat_ngram_size": 3},
    "greedy, encoder_repetition_penalty": {"temperature": 0.0, "encoder_repetition_penalty": 1.5},
    "greedy, encoder_no_repeat_ngram_size": {"temperature": 0.0, "encoder_no_repeat_ngram_size": 2},
    "greedy, min_new_tokens": {"temperature": 0.0, "min_new_tokens": 20},
    "greedy, suppress_tokens": {"temperature": 0.0, "suppress_tokens": [10, 11]},
    "greedy, bad_words_ids": {"temperature": 0.0, "bad_words_ids": [[10], [11, 12]]},
    "greedy, stop_strings": {"temperature": 0.0, "stop_strings": ["\n"]},
    "temperature": {"temperature": 1.2, "top_k": 0},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "top_h": {"top_h": 0.5},
    "typical_p": {"typical_p": 0.8},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.01},
    "num_return_sequences": {"num_return_sequences": 3},
    "num_beams": {"num_beams": 4},
    "num_beams, length_penalty": {"num_beams": 4, "length_penalty": -1.0},
    "num_beams, early_stopping": {"num_beams": 4, "early_stopping": "never"},
    "num_beams, do_sample": {"num_beams": 4, "do_sample": True},
}


def main() -> None:
    """Run every strategy, then the drafts, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run directory")
    parser.add_argument("--assistant_model", help="smaller run with the same tokenizer")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--text", type=Path, default=stdlib / "tarfile.py", help="file that the prompts are cut from")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    flags = parser.parse_args()
    quiet_libraries()
    model, tokenizer = load_model_and_tokenizer(flags.model)
    text = flags.text.read_text(encoding="utf-8")
    starts = [text[place : place + 5 + place % 97] for place in range(0, 16 * 211, 211)]
    rows = [prompt_tensor(tokenizer, start, None)[0].tolist()[: context_left(model)] for start in starts]
    equal = {}
    greedy = Job(model, tokenizer, flags.max_new_tokens, stop_tokens(model), generation={"do_sample": False})
    for name, values in STRATEGIES.items():
        settled = settle(values)
        job = dataclasses.replace(
            greedy,
            stop_strings=settled.get("stop_strings", ()),
            num_samples=settled.get("num_return_sequences", 1),
            seed=1337,
            generation=generate_arguments(settled),
        )
        together = grow(job, rows)
        alone = [grow(job, [row])[0] for row in rows]
        equal[name] = {"repeats": grow(job, rows) == together, "batch_is_single": alone == together}
        print(f"{name:<40}{together[3][0].text!r}", flush=True)
    drafts = {"prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 5}}
    if flags.assistant_model:
        draft = load_draft(flags.assistant_model, model, tokenizer, {})
        drafts["assistant_model"] = {"assistant_model": draft}
    figures = {name: measure(greedy, rows, arguments) for name, arguments in drafts.items()}
    print(json.dumps({"model": flags.model, "prompts": [len(row) for row in rows], "equal": equal, "drafts": figures}))
    if not all(all(found.values()) for found in equal.values()) or not all(f["is_greedy"] for f in figures.values()):
        sys.exit(1)


def measure(greedy: Job, rows: list[list[int]], arguments: dict) -> dict:
    """What drafts save on these prompts, one by one, against greedy one by one."""
    started = time.process_time()
    expected = [grow(greedy, [row]) for row in rows]
    plainly = time.process_time() - started
    job = dataclasses.replace(greedy, generation=greedy.generation | arguments, passes=Passes())
    started = time.process_time()
    found = [grow(job, [row]) for row in rows]
    seconds = time.process_time() - started
    passes = job.passes
    return {
        "is_greedy": found == expected,
        "acceptance_rate": round(passes.accepted / max(1, passes.drafted), 3),
        "tokens": passes.tokens,
        "forward_passes": passes.passes,
        "cpu_seconds_of_greedy": round(seconds / plainly, 2),
    }


if __name__ == "__main__":
    main()
