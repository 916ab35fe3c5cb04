"""What does a KV cache of 2 bits cost a model that was trained with it, and what do others cost one that was not?

Trains the recipe stdlib-int2-cache, and beside it the same model without kv_quantization, from the same seeds and on
the same tokens. Scores both on the same held-out text, token by token through their caches, and the plain one through
other caches too: Acorn's int4 and int2, with a Hadamard rotation, and transformers' QuantizedCache, which needs the
packages of .venv-clients. Prints one JSON line: for each cache the bits that a key or value takes at the end of a
stream, and the percent of the plain model's loss that it costs, for each seed with its interval, and in the mean.

    PYTHONPATH=. .venv-clients/bin/python benchmarks/trained_in_quantization.py --output_dir runs/trained-in
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import QuantizedCache
from transformers.cache_utils import Cache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from inference.caches import policies
from inference.experiments.common import Output, add_model_flags, grow, held_out_streams
from inference.measuring.kv_report import FULL_BITS, decode, own_cache, paired
from training.model.loading import load_model_and_tokenizer
from training.system.errors import log, quiet_libraries

RECIPE = "stdlib-int2-cache"
THEIRS = {  # backend: whether it is installed, and the axes that transformers' documentation recommends
    "hqq": (is_hqq_available, {"axis_key": 1, "axis_value": 1, "q_group_size": 64}),
    "quanto": (is_optimum_quanto_available, {"axis_key": 0, "axis_value": 0, "q_group_size": 64}),
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
    training = {"seed": seed, "max_steps": steps, "eval_steps": steps}
    return grow(
        out,
        f"{kind or 'plain'}-{seed}",
        RECIPE,
        model={"kv_quantization": kind},
        data={"data_dir": str(out.directory / "runs" / "data")},
        training=training if kind else training | {"kv_quantization_start": 0},
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
    config, baseline = model.config, None
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * streams.length
    for name, scored, new_cache in [
        ("plain", model, own_cache),
        ("trained in, int2", own, own_cache),
        *((name, model, new_cache) for name, new_cache in untrained(config)),
    ]:
        with tqdm(total=streams.length, desc=name, unit="token", leave=False, file=sys.stderr, disable=None) as bar:
            decoded = decode(scored, streams.ids, streams.first, new_cache, len(streams.ids), bar.update)
        baseline = decoded.nats if baseline is None else baseline
        yield name, decoded.bits / values, paired(decoded.nats, baseline, num_bytes, seed)


def untrained(config) -> Iterator[tuple[str, Callable[[], Cache]]]:
    """The caches for a model that knows nothing of them, by name, and what makes an empty one."""
    for kind in ("int4", "int2"):
        yield f"{kind}, Hadamard", partial(policies.build_cache, config, kind, torch.float16)
    for backend, (is_installed, options) in THEIRS.items():
        if not is_installed():
            log(f"{backend} is not installed: left out; .venv-clients has it")
            continue
        for bits in (4, 2):
            yield f"QuantizedCache, {backend}, {bits} bits", partial(Theirs, backend, config, nbits=bits, **options)


class Theirs(QuantizedCache):
    """transformers' cache, which says how much it holds: the newest tokens at 16 bits a number, and codes."""

    rows = 1

    def state_bits(self) -> int:
        parts = (part for layer in self.layers for part in (layer._quantized_keys, layer._quantized_values))
        newest = sum(states.numel() for layer in self.layers for states in (layer.keys, layer.values))
        return (
            FULL_BITS * newest + 8 * sum(tensor.nbytes for part in parts for tensor in tensors_of(part))
        ) // self.rows

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Say from now on what one row takes: of codes transformers cannot take one out."""
        self.rows = max(layer.keys.shape[0] for layer in self.layers)


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
