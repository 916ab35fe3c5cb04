"""How fast does text become token ids, by `tokenizers`, by tiktoken and by Acorn? Prints one JSON line.

    python benchmarks/tokenizing.py --tokenizer DIR-OR-ID [--text_files FILE …] [--threads 1 2] [--rounds 5]

The tokenizer must be a byte-level BPE such as GPT-2's; the text is the standard library unless files are named. Each
contender turns the same documents into one uint32 array each. They run in alternation, in a process of their own for
each number of threads; figures are MB/s of UTF-8, medians over the rounds, and `same_ids` says whether all contenders
gave the same ids.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np

from training.data.encoding import encode_documents, fast_bpe
from training.data.sources import SOURCE_DEFAULTS, read_documents
from training.data.tokenizers import load_tokenizer

Encoder = Callable[[list[str]], list[np.ndarray]]


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--text_files", nargs="+", default=[])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in_this_process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def contenders(tokenizer, threads: int) -> dict[str, Encoder]:
    """Name to what encodes documents."""
    backend, fast, pool = tokenizer.backend_tokenizer, fast_bpe(tokenizer), ThreadPoolExecutor(threads)
    backend.encode_special_tokens = True  # text that spells a special token is text, as for the others

    def by(encode: Callable) -> Encoder:
        return lambda texts: [np.array(one.ids, dtype=np.uint32) for one in encode(texts, add_special_tokens=False)]

    found: dict[str, Encoder] = {"encode_batch": by(backend.encode_batch)}
    found["encode_batch_fast"] = by(backend.encode_batch_fast)
    if fast is not None:
        encode = fast.encoding.encode_ordinary
        found["tiktoken"] = lambda texts: [np.array(ids, dtype=np.uint32) for ids in pool.map(encode, texts)]
    found["acorn"] = lambda texts: encode_documents(tokenizer, texts)
    return found


def measure(flags: argparse.Namespace, threads: int) -> dict:
    """MB/s of each contender in this process."""
    tokenizer = load_tokenizer(flags.tokenizer)
    named = {"text_files": flags.text_files} if flags.text_files else {"dataset": "python-stdlib"}
    texts = [document.text for document in read_documents(SimpleNamespace(**SOURCE_DEFAULTS | named))]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    encoders = contenders(tokenizer, threads)
    first, same = encoders["encode_batch"](texts), True
    speeds: dict[str, list[float]] = {name: [] for name in encoders}
    for number in range(flags.rounds + 1):
        for name, encode in encoders.items():
            begun = time.perf_counter()
            ids = encode(texts)
            seconds = time.perf_counter() - begun
            same &= all(np.array_equal(one, other) for one, other in zip(first, ids, strict=True))
            if number:  # the first round warms caches and memory
                speeds[name].append(megabytes / seconds)
    medians = {name: round(statistics.median(values), 2) for name, values in speeds.items()}
    return {"threads": threads, "megabytes": round(megabytes, 2), "same_ids": same, "megabytes_per_second": medians}


def in_own_process(threads: int) -> dict:
    """What `measure` says in a process where `tokenizers` has so many threads."""
    command = [sys.executable, *sys.argv, "--in_this_process", "--threads", str(threads)]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure for each number of threads."""
    flags = parse()
    if flags.in_this_process:
        print(json.dumps(measure(flags, flags.threads[0])))
        return
    print(json.dumps({"benchmark": "tokenizing", "runs": [in_own_process(threads) for threads in flags.threads]}))


if __name__ == "__main__":
    main()
