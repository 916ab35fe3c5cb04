"""Does llama.cpp write the same text as Acorn, as well, and how fast? Prints both texts and one JSON line.

    .venv-clients/bin/python benchmarks/in_llama_cpp.py runs/quickstart --text README.md [--prompt "def "] [--threads 2]

The run is exported as f32, f16 and q8_0 (`acorn export --format gguf`) and opened by llama-cpp-python, which
`make .venv-clients/.llama` compiles. Each continues the prompt greedily by --max_new_tokens; perplexity is over the
first --windows windows of the text, each as long as the context and read alone, in both the same tokens. Tokens/s are
those of the continuation, one after the other, best of three; llama.cpp keeps its cache in f16, as it does by itself,
but for the f32 file.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from inference.formats.conversion import read_model
from inference.formats.gguf import FILE_TYPES, write_gguf
from training.data.encoding import encode_documents
from training.system.errors import quiet_libraries, run_main
from training.system.flags import FlagParser

ROUNDS = 3


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = FlagParser(prog="in_llama_cpp.py", description=__doc__)
    parser.add_argument("model", help="run or model directory")
    parser.add_argument("--text", type=Path, required=True, help="text that perplexity is measured on")
    parser.add_argument("--prompt", default="def ", help="what is continued")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of the continuation")
    parser.add_argument("--windows", type=int, default=20, help="windows of the text")
    parser.add_argument("--threads", type=int, default=1, help="threads, of both")
    return parser.parse_args(argv)


def best_of(draw: Callable[[], list[int]]) -> tuple[list[int], float]:
    """(the ids drawn, the least seconds of some rounds)."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        ids = draw()
        seconds.append(time.perf_counter() - start)
    return ids, min(seconds)


def perplexity(logits_of: Callable[[list[int]], torch.Tensor], windows: list[list[int]]) -> float:
    """Of all tokens but each window's first."""
    losses = [
        torch.nn.functional.cross_entropy(logits_of(ids)[:-1].double(), torch.tensor(ids[1:])).item() for ids in windows
    ]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def ours(model, prompt: list[int], windows: list[list[int]], tokens: int) -> tuple[list[int], dict]:
    """(the continuation, figures) of the model in torch."""
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found, seconds = best_of(lambda: model.generate(ids, max_new_tokens=tokens, **options)[0].tolist())
    value = perplexity(lambda window: model(torch.tensor([window]), use_cache=False).logits[0], windows)
    return found[len(prompt) :], {"perplexity": value, "tokens_per_second": tokens / seconds}


def theirs(path: Path, prompt: list[int], windows: list[list[int]], tokens: int, threads: int) -> tuple[list, dict]:
    """(the continuation, figures) of a file in llama.cpp."""
    from llama_cpp import GGML_TYPE_F16, GGML_TYPE_F32, Llama

    kept = GGML_TYPE_F32 if path.stem == "f32" else GGML_TYPE_F16
    context = max(len(windows[0]), len(prompt) + tokens)
    options = {"n_threads": threads, "n_threads_batch": threads, "type_k": kept, "type_v": kept, "verbose": False}
    llama = Llama(str(path), n_ctx=context, logits_all=True, **options)

    def draw() -> list[int]:
        llama.reset()
        stream = llama.generate(prompt, temp=0.0)
        return [next(stream) for _ in range(tokens)]

    def logits_of(ids: list[int]) -> torch.Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.tensor(np.array(llama.scores[: len(ids)]))

    found, seconds = best_of(draw)
    figures = {"perplexity": perplexity(logits_of, windows), "tokens_per_second": tokens / seconds}
    return found, figures | {"megabytes": path.stat().st_size / 1e6}


def main(argv: list[str] | None = None) -> None:
    flags = parse(argv)
    quiet_libraries()
    torch.set_num_threads(flags.threads)
    model, tokenizer = read_model(flags.model)
    context = model.config.max_position_embeddings
    ids = encode_documents(tokenizer, [flags.text.read_text(encoding="utf-8")])[0].tolist()
    windows = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)][: flags.windows]
    prompt = tokenizer(flags.prompt, add_special_tokens=False)["input_ids"]
    text, figures = ours(model, prompt, windows, flags.max_new_tokens)
    print(f"Acorn:\n{flags.prompt}{tokenizer.decode(text)}\n")
    results = {"acorn": figures}
    with tempfile.TemporaryDirectory() as folder:
        for outtype in FILE_TYPES:
            path = Path(folder) / f"{outtype}.gguf"
            write_gguf(model, tokenizer, path, outtype, Path(flags.model).name)
            found, figures = theirs(path, prompt, windows, flags.max_new_tokens, flags.threads)
            same = next(
                (place for place, pair in enumerate(zip(found, text, strict=True)) if len(set(pair)) > 1), len(text)
            )
            ratio = figures["perplexity"] / results["acorn"]["perplexity"]
            results[outtype] = figures | {"same_tokens": same, "perplexity_ratio": ratio}
            print(f"llama.cpp, {outtype}, {same} of {len(text)} tokens the same:")
            print(f"{flags.prompt}{tokenizer.decode(found)}\n")
    print(json.dumps({"model": flags.model, "windows": len(windows), "threads": flags.threads, **results}))


if __name__ == "__main__":
    run_main(main)
