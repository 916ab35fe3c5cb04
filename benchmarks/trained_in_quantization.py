"""What does a KV cache of 2 bits cost a model that was trained with it, and what do others cost one that was not?

Trains the recipe stdlib-int2-cache, and beside it the same model without kv_quantization, from the same seeds and on
the same tokens. Scores both on the same held-out text, token by token through their caches, and the plain one through
other caches too: Acorn's int4 and int2, with a Hadamard rotation, and transformers' QuantizedCache, which needs the
packages of .venv-clients. Prints one JSON line: for each cache the bits that a key or value takes at the end of a
stream, and the percent of the plain model's loss that it costs, for each seed with its interval, and in the mean.

    .venv-clients/bin/python benchmarks/trained_in_quantization.py --output_dir runs/trained-in --seeds 1 2 3
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, QuantizedCache
from transformers.cache_utils import Cache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from inference.caches import policies
from inference.experiments.common import Output, add_model_flags, grow, held_out_streams
from inference.measuring.kv_report import decode, held_bits, paired
from modeling.kv_quantization import build_cache
from training.model.loading import load_model_and_tokenizer
from training.system.errors import log, quiet_libraries

RECIPE = "stdlib-int2-cache"
THEIRS = {  # backend: whether it is installed, and the axis that transformers' documentation recommends
    "hqq": (is_hqq_available, 1),
    "quanto": (is_optimum_quanto_available, 0),
}


def main() -> None:
    """Train what is not there, score, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the runs go, or lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--streams", type=int, default=64, help="streams of held-out text, at most")
    flags = parser.parse_args()
    quiet_libraries()
    out = Output(flags.output_dir, {"max_steps": flags.max_steps}, " ".join(sys.argv))
    results: dict[str, dict] = {}
    for seed in flags.seeds:
        plain, coded = (train(out, seed, kind, flags.max_steps) for kind in (None, "int2"))
        for name, bits, (_, percent) in scores(plain, coded, flags.streams, seed):
            result = results.setdefault(name, {"bits": bits, "percent": [], "low": [], "high": []})
            for key, value in zip(("percent", "low", "high"), percent, strict=True):
                result[key].append(round(value, 3))
            interval = f"{percent.value:+.3f} % ({percent.low:+.3f} to {percent.high:+.3f})"
            log(f"seed {seed}, {name}: {bits:.3f} bits a value, {interval}")
    for result in results.values():
        result["mean"] = round(sum(result["percent"]) / len(result["percent"]), 3)
    print(json.dumps({"max_steps": flags.max_steps, "seeds": flags.seeds, "caches": results}))


def train(out: Output, seed: int, kind: str | None, steps: int) -> Path:
    """The run of one seed, with or without quantization."""
    return grow(
        out,
        f"{kind or 'plain'}-{seed}",
        RECIPE,
        model={"kv_quantization": kind},
        data={"data_dir": str(out.directory / "runs" / "data")},
        training={"seed": seed, "max_steps": steps, "eval_steps": steps},
        sample={"max_new_tokens": 0},
    )


def scores(plain: Path, coded: Path, most: int, seed: int) -> Iterator[tuple]:
    """(cache, bits a value, (bits a byte lost, percent lost)) of each, against the plain model and its plain cache."""
    parser = argparse.ArgumentParser()
    add_model_flags(parser.add_argument)
    flags = parser.parse_args([str(plain), "--streams", str(most)])
    model, tokenizer = load_model_and_tokenizer(str(plain))
    streams = held_out_streams(flags, model, tokenizer)
    num_bytes = streams.targets.numel() * streams.bytes_per_token
    own, _ = load_model_and_tokenizer(str(coded))
    baseline = None
    for name, scored, cache in [
        ("plain", model, DynamicCache(config=model.config)),
        ("trained in, int2", own, build_cache(own.config)),
        *((name, model, cache) for name, cache in untrained(model.config)),
    ]:
        with tqdm(total=streams.length, desc=name, unit="token", leave=False, file=sys.stderr, disable=None) as bar:
            nats, _ = decode(scored, streams.ids, cache, streams.first, bar.update)
        baseline = nats if baseline is None else baseline
        yield name, bits_a_value(cache, model.config, streams.ids), paired(nats, baseline, num_bytes, seed)


def untrained(config) -> Iterator[tuple[str, Cache]]:
    """The caches for a model that knows nothing of them."""
    for kind in ("int4", "int2"):
        yield f"{kind}, Hadamard", policies.build_cache(config, kind, torch.float16)
    for backend, (is_installed, axis) in THEIRS.items():
        if not is_installed():
            log(f"{backend} is not installed: left out; .venv-clients has it")
            continue
        for bits in (4, 2):
            axes = {"axis_key": axis, "axis_value": axis, "q_group_size": 64 if backend == "hqq" else 32}
            yield f"QuantizedCache, {backend}, {bits} bits", QuantizedCache(backend, config, nbits=bits, **axes)


def bits_a_value(cache: Cache, config, ids: torch.Tensor) -> float:
    """Bits held for each key or value of the tokens that went through."""
    streams, tokens = ids.shape[0], ids.shape[1] - 1
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * streams * tokens
    bits = held_bits(cache)
    if isinstance(cache, QuantizedCache):  # which holds more than its newest keys and values, that were counted
        parts = (part for layer in cache.layers for part in (layer._quantized_keys, layer._quantized_values))
        bits += 8 * sum(tensor.nbytes for part in parts for tensor in tensors_of(part))
    return bits / values


def tensors_of(part) -> list[torch.Tensor]:
    """The tensors that one of hqq's pairs of codes and what reads them consists of, or one of quanto's tensors."""
    if isinstance(part, tuple):
        codes, meta = part
        return [codes, meta["scale"], meta["zero"]]
    names, _ = part.__tensor_flatten__()
    held = (getattr(part, name) for name in names)
    return [tensor._data if hasattr(tensor, "_data") else tensor for tensor in held]


if __name__ == "__main__":
    main()
