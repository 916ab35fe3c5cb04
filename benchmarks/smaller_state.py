"""What do models cost that are trained with a smaller state, against the one with all its heads? Prints one JSON line.

    python benchmarks/smaller_state.py --runs DIR [--only NAME …] [--seeds 1 2 3] [--max_steps N]

Each architecture is grown from its recipe with each seed, on the same tokens, into DIR/NAME-SEED, or found there.
Losses are of the whole held-out text in streams of 1,024 tokens: of all their tokens, and of their last halves alone,
where a model knows the most past. The percentages are against `multi-head` of the same seed; the interval is the paired
bootstrap of `acorn lab`, over the streams of all seeds. The state is what the model's own cache holds after 1,024
tokens, at 16 bits a number where it is not quantized: a sliding layer holds its window, and one that reuses another's
keys and values nothing.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from inference.experiments.common import validation_ids
from inference.measuring.kv_report import Streams, cut_streams, held_bits, paired
from modeling.compat import CACHE_NAME
from training.config.command_line import load_recipe
from training.config.recipe import load_recipe_file
from training.data.corpus import load_corpus
from training.grown import grown
from training.model.loading import load_causal_lm

LENGTH, MOST_STREAMS = 1024, 1000
BASELINE = "multi-head"
SMALL = load_recipe_file("stdlib-small-state").model
# name: the recipe it is grown from, and what is different in it
ARCHITECTURES = {
    BASELINE: ("stdlib-multi-head", {}),
    "combination": ("stdlib-small-state", {}),
    "combination-int4": ("stdlib-small-state", {"kv_quantization": "int4"}),
    "combination-int2": ("stdlib-small-state", {"kv_quantization": "int2"}),
    "latent": ("stdlib-latent", {}),
    "multi-query": ("stdlib-multi-head", {"num_key_value_heads": 1}),
    "sliding": ("stdlib-multi-head", {name: SMALL[name] for name in ("sliding_window", "layer_types")}),
    "sharing": ("stdlib-multi-head", {"kv_sharing_modes": ["store", "reuse"] * 4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=[BASELINE, "combination"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--data_dir", help="prepared tokens (default: the recipes prepare theirs)")
    flags = parser.parse_args()
    names = list(dict.fromkeys([BASELINE, *flags.only]))
    flags.runs.mkdir(parents=True, exist_ok=True)
    losses, bits, streams = {}, {}, None
    with tqdm(total=len(names) * len(flags.seeds), file=sys.stderr, disable=None) as bar:
        for seed in flags.seeds:
            for name in names:
                bar.set_description(f"{name}, seed {seed}")
                directory = grow(flags, name, seed)
                streams = streams or held_out(directory)
                losses[name, seed], bits[name] = measure(directory, streams)
                bar.update()
    print(json.dumps({name: row(name, flags.seeds, losses, bits, streams) for name in names}))


def grow(flags: argparse.Namespace, name: str, seed: int) -> Path:
    """Where an architecture lies, trained."""
    recipe, changes = ARCHITECTURES[name]
    fields = changes | {"seed": seed, "max_new_tokens": 0}
    fields |= {"max_steps": flags.max_steps, "eval_steps": flags.max_steps} if flags.max_steps else {}
    fields |= {"data_dir": flags.data_dir} if flags.data_dir else {}
    words = [word for field, value in fields.items() for word in (f"--{field}", in_words(value))]
    return grown(flags.runs / f"{name}-{seed}", lambda: load_recipe("pretrain", [recipe, *words]))


def in_words(value: object) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def held_out(directory: Path) -> Streams:
    """The streams of what a run held out."""
    corpus = load_corpus(load_recipe_file(str(directory / "recipe.yaml")).data["data_dir"])
    ids, bytes_per_token = validation_ids(corpus)
    return cut_streams(ids, LENGTH, MOST_STREAMS, bytes_per_token)


@torch.inference_mode()
def measure(directory: Path, streams: Streams) -> tuple[torch.Tensor, int]:
    """(nats of every token, (streams, LENGTH), bits that the cache holds after LENGTH tokens) of a run's best model."""
    model = load_causal_lm(str(directory), "float32")
    nats = []
    for row in streams.ids:
        outputs = model(row[None, :-1], use_cache=True)
        nats.append(cross_entropy(outputs.logits[0].float(), row[1:], reduction="none"))
    return torch.stack(nats), held_bits(getattr(outputs, CACHE_NAME))


def row(name: str, seeds: list[int], losses: dict, bits: dict, streams: Streams) -> dict:
    """An architecture's figures."""
    ours, theirs = (torch.cat([losses[which, seed] for seed in seeds]) for which in (name, BASELINE))
    figures = {
        "state_bits": bits[name],
        "times_smaller": round(bits[BASELINE] / bits[name], 2),
        "loss": [round(losses[name, seed].mean().item(), 4) for seed in seeds],
    }
    for part, first in (("all", 0), ("last_half", streams.first)):
        num_bytes = ours[:, first:].numel() * streams.bytes_per_token
        per_byte, percent = paired(ours[:, first:], theirs[:, first:], num_bytes, seed=0)
        each = [losses[name, seed][:, first:].mean() / losses[BASELINE, seed][:, first:].mean() for seed in seeds]
        figures[part] = {
            "percent_lost": [round(100 * (share.item() - 1), 2) for share in each],
            "mean": round(statistics.mean(100 * (share.item() - 1) for share in each), 2),
            "interval": [round(end, 2) for end in percent[1:]],
            "bits_per_byte_lost": round(per_byte.value, 4),
        }
    return figures


if __name__ == "__main__":
    main()
