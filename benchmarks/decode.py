"""How long does a token take, by transformers, nanoGPT, llama.cpp and Acorn? Prints one JSON line.

    python benchmarks/decode.py [--shapes char gpt2] [--nanogpt DIR] [--tokens 256] [--rounds 3] [--threads 2]

All contenders get the same random weights, and write the same number of tokens greedily after one; they run in
alternation, each once before that to warm up, which for a compiled step is the cost of the first call. Figures are
milliseconds a token, medians over the rounds. `limit_ms` is what reading would take alone: the weights, and half the
cache that grows, by the bandwidth measured here, of a sum over a gigabyte. A model that fits into the processor's cache
may be ahead of it. nanoGPT's sampler is `generate()` of the model.py in DIR; llama.cpp is measured where
llama-cpp-python and gguf can be imported.
"""

import argparse
import importlib.util
import json
import os
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import torch
import torch._inductor.config
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.contenders import processor
from inference.decoding.compiled import compiled
from inference.decoding.weights import quantized
from inference.formats.gguf import write_gguf
from inference.formats.gpt2 import to_theirs, turned
from modeling import GPTConfig, GPTForCausalLM
from training.data.tokenizers import build_tokenizer
from training.model.devices import is_native
from training.model.sampling import continue_ids

SHAPES = {
    "char": {"vocab_size": 65, "n_layer": 6, "n_head": 6, "n_embd": 384},
    "gpt2": {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768},
}
FIRST = 1  # the token that all begin with
Write = Callable[[], list[int]]  # ids after it


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--nanogpt", help="clone of nanoGPT")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--without", nargs="+", default=[], help="contenders to leave out")
    return parser.parse_args()


def bandwidth() -> float:
    """Bytes a second of a sum over a gigabyte, the best of a few."""
    numbers, best = torch.ones(2**28), float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - begun)
    return numbers.nbytes / best


def seeded(shape: dict) -> GPTForCausalLM:
    """The model of that shape with the same random weights each time, large enough to have preferences."""
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(**shape, block_size=1024)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.generation_config.eos_token_id = None
    return model


def by_acorn(model: GPTForCausalLM, tokens: int, **options) -> Write:
    """Acorn's sampler; options: what `compiled` gives."""
    first = torch.tensor([[FIRST]])
    return lambda: continue_ids(model, first, tokens, ends=[], do_sample=False, **options)[0, 1:].tolist()


def by_transformers(model: GPTForCausalLM, shape: dict, tokens: int) -> Write:
    """generate() of transformers' own GPT-2."""
    theirs = GPT2LMHeadModel(GPT2Config(**shape, n_positions=1024, bos_token_id=None, eos_token_id=None)).eval()
    theirs.load_state_dict(turned(to_theirs(model, has_biases=True)), strict=False)
    theirs.tie_weights()
    first = torch.tensor([[FIRST]])
    options = {"attention_mask": torch.ones_like(first), "do_sample": False, "pad_token_id": 0}
    return lambda: theirs.generate(first, max_new_tokens=tokens, **options)[0, 1:].tolist()


def by_nanogpt(model: GPTForCausalLM, shape: dict, tokens: int, directory: str) -> Write:
    """generate() of nanoGPT's model."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(directory) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    theirs = module.GPT(module.GPTConfig(**shape, block_size=1024, bias=True)).eval()
    theirs.load_state_dict(to_theirs(model, has_biases=True), strict=False)
    return lambda: theirs.generate(torch.tensor([[FIRST]]), tokens, top_k=1)[0, 1:].tolist()


def by_llama_cpp(model: GPTForCausalLM, outtype: str, tokens: int, threads: int, folder: str) -> Write:
    """llama.cpp's own loop over the GGUF file of the model."""
    from llama_cpp import Llama

    path = Path(folder) / f"{outtype}.gguf"
    write_gguf(model, build_tokenizer("char", lambda: iter([string.ascii_letters])), path, outtype, "random")
    llama = Llama(str(path), n_ctx=tokens + 32, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write() -> list[int]:
        found = llama.generate([FIRST], temp=0.0, top_k=1, repeat_penalty=1.0)
        return [next(found) for _ in range(tokens)]

    return write


def contenders(shape: dict, flags: argparse.Namespace, folder: str) -> dict[str, Callable[[], Write]]:
    """Name to what sets a contender up."""
    tokens, model = flags.tokens, seeded(shape)

    def compiled_acorn(prepare: Callable = lambda model: model) -> Write:
        own = prepare(seeded(shape))
        return by_acorn(own, tokens, **compiled(own))

    found = {
        "transformers": lambda: by_transformers(model, shape, tokens),
        "acorn": lambda: by_acorn(model, tokens),
        "acorn_compiled": compiled_acorn,
        "acorn_compiled_int8": lambda: compiled_acorn(lambda model: quantized(model, "int8")),
    }
    if is_native("cpu", torch.bfloat16):
        found["acorn_compiled_bf16"] = lambda: compiled_acorn(lambda model: model.bfloat16())
    if flags.nanogpt:
        found["nanogpt"] = lambda: by_nanogpt(model, shape, tokens, flags.nanogpt)
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        for outtype in ("f32", "q8_0"):
            found[f"llama_cpp_{outtype}"] = lambda outtype=outtype: by_llama_cpp(
                model, outtype, tokens, flags.threads, folder
            )
    return {name: set_up for name, set_up in found.items() if name not in flags.without}


def measure(shape: dict, flags: argparse.Namespace, bytes_a_second: float, folder: str) -> dict:
    """The figures of one shape."""
    writers = {name: set_up() for name, set_up in contenders(shape, flags, folder).items()}
    first, ids, spent = {}, {}, {name: [] for name in writers}
    for number in range(flags.rounds + 1):
        for name, write in writers.items():
            begun = time.perf_counter()
            ids[name] = write()
            seconds = time.perf_counter() - begun
            if number:
                spent[name].append(seconds * 1e3 / flags.tokens)
            else:
                first[name] = round(seconds, 2)
    median = {name: statistics.median(each) for name, each in spent.items()}
    model = seeded(shape)
    weights = sum(p.nbytes for name, p in model.named_parameters() if "positions" not in name)  # of which a row is read
    cache = shape["n_layer"] * 2 * shape["n_embd"] * 4 * flags.tokens // 2
    limit = (weights + cache) / bytes_a_second * 1e3
    return {
        "ms_a_token": {name: round(value, 2) for name, value in median.items()},
        "first_call_s": {name: first[name] for name in first if "compiled" in name},
        "times_as_fast": {
            other: {name: round(median[other] / value, 2) for name, value in median.items() if "acorn" in name}
            for other in ("transformers", "nanogpt", "llama_cpp_f32", "llama_cpp_q8_0")
            if other in median
        },
        "same_ids_as_transformers": {name: each == ids.get("transformers") for name, each in ids.items()},
        "bytes_a_token_fp32": weights + cache,
        "limit_ms_fp32": round(limit, 2),
        "share_of_bandwidth_fp32": {
            name: round(limit / value, 2) for name, value in median.items() if name in ("acorn", "acorn_compiled")
        },
    }


def main() -> None:
    flags = parse()
    torch.set_num_threads(flags.threads)
    torch._inductor.config.force_disable_caches = True  # what an earlier run compiled would make the first call cheap
    transformers.logging.set_verbosity_error()
    figures = {
        "benchmark": "decode",
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": flags.threads,
        "tokens": flags.tokens,
        "load_average": round(os.getloadavg()[0], 1),
    }
    bytes_a_second = bandwidth()
    figures["gigabytes_a_second"] = round(bytes_a_second / 1e9, 2)
    with tempfile.TemporaryDirectory() as folder:
        for name in flags.shapes:
            figures[name] = measure(SHAPES[name], flags, bytes_a_second, folder)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
