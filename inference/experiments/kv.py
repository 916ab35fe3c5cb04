"""`acorn lab kv MODEL`: how small the KV cache can be; every policy by the same measure, against its bits."""

import argparse
import math
from itertools import pairwise
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from training.data.tokenizers import encoding_hash
from training.model.loading import load_model_and_tokenizer, loading_options
from training.model.sampling import context_left
from training.model.sizes import text_config
from training.system.errors import UserError, log

from ..caches.policies import POLICIES, Eviction, build_cache, find, refuse_model
from ..measuring.kv_report import Decoded, Streams, decode, own_cache, paired
from ..measuring.recall import Probe, plant, recalled
from .common import BAR, Output, add_model_flags, held_out_streams, load, next_command
from .kv_picture import draw

ABOUT = """Measure every cache policy on a model: loss by decoding through the cache, as bits per byte and as percent of
the full cache's loss, with intervals; recall from far back; and every bit that a sequence holds in the end."""
EPILOG = """examples:
  acorn lab kv runs/quickstart --smoke
  acorn lab kv runs/quickstart --caches int4 window+int4 --budgets 0.25 0.5 --streams 128

Against full, the plain cache at 16 bits a number, are: smaller, by the bits of a whole stream, on_average of where
tokens count; lost_percent of its loss, from low to high. truncation: the percent that sinks and recent tokens alone
lose at equal bits. recall: nats a token gained where a passage of another text comes a second time, over several
distances; far: over the farthest. Perplexity hides what is forgotten, and this does not; but a model for which it is
near 0 with full recalls nothing that could be."""
BUDGETS, SMOKE_BUDGETS = (0.5, 0.25, 0.125, 0.0625), (0.5, 0.25)  # of the tokens of a stream
OVER = "int4"  # what evictions are put over
DTYPE = torch.float16  # of what is held in full precision
PROBED, SMOKE_PROBED = 8, 2  # streams with a copy, a distance
FULL, LINE = "full", "window"  # what all caches are compared with: without loss, and at equal bits
GOOD_PERCENT = 0.5  # lost at most by what is recommended in the end
COLUMNS = {
    "cache": "", "bits": ",", "bits_per_token_layer": ",.1f", "smaller": ".2f", "on_average": ".2f",
    "bits_per_byte": ".4f", "lost_percent": "+.3f", "low": "+.3f", "high": "+.3f", "truncation": "+.3f",
    "recall": "+.3f", "far": "+.3f",
}  # fmt: skip


class Case(NamedTuple):
    """A cache to measure: a policy, and the share of the tokens that it may hold, where it drops any."""

    policy: str
    budget: float | None = None

    @property
    def name(self) -> str:
        return self.policy if self.budget is None else f"{self.policy} {self.budget:g}"

    def build(self, config, length: int):
        """An empty cache for streams of so many tokens."""
        settings = {} if self.budget is None else {"cache_budget": round(self.budget * length)}
        return build_cache(config, self.policy, DTYPE, **settings)


def add_flags(add) -> None:
    add_model_flags(add)
    add("--caches", nargs="+", help="policies, alone or as eviction+storing (default: all; full is always measured)")
    add("--budgets", nargs="+", type=float, help="shares of the tokens that evictions hold (default: 0.5 to 0.0625)")
    add("--smaller", help="a smaller model of the same tokenizer, whose full cache is measured beside the others")


def run(flags: argparse.Namespace, out: Output) -> None:
    """Measure the full cache and each other one; a table and a picture."""
    cases = chosen_cases(flags)
    model, tokenizer = load(flags)
    refuse_model(text_config(model.config), flags.model)
    streams = held_out_streams(flags, model, tokenizer)
    smaller = load_smaller(flags, tokenizer, streams.length) if flags.smaller else None
    probe = plant(streams, SMOKE_PROBED if flags.smoke else PROBED)
    cases = buildable(cases, model, streams.length, flags)
    rows = torch.cat((streams.ids, probe.ids))
    passes = -(-len(rows) // flags.batch_size)
    with tqdm(total=(len(cases) + bool(smaller)) * passes * streams.length, unit="token", **BAR) as bar:

        def measure(name: str, model, new_cache, full: Decoded | None) -> Decoded:
            bar.set_description(name)
            decoded = decode(model, rows, streams.first, new_cache, flags.batch_size, bar.update)
            row = row_of(name, decoded, full or decoded, streams, probe, layers_of(model), flags.seed)
            out.row(**row, truncation=height_at(line_of([*out.rows, row], LINE), row["bits"]))
            return decoded

        full = None
        for case in cases:
            decoded = measure(case.name, model, lambda case=case: case.build(model.config, streams.length), full)
            full = full or decoded
        if smaller:
            measure(flags.smaller, smaller, own_cache, full)
    out.table(out.rows, COLUMNS)
    draw(out, out.rows, [kind_of(row["cache"]) for row in out.rows], f"{flags.model}, {streams.length} tokens")
    next_command("generate", flags.model, cache=best(out.rows))


# ---- what is measured


def chosen_cases(flags: argparse.Namespace) -> list[Case]:
    """The full cache, then what the flags name: by default each policy, and each that drops tokens over int4."""
    budgets = flags.budgets or (SMOKE_BUDGETS if flags.smoke else BUDGETS)
    for budget in budgets:
        if not 0 < budget < 1:
            raise UserError(f"budgets={budget:g}: must be shares of the tokens, above 0 and below 1")
    drops = [name for name, policy in POLICIES.items() if isinstance(policy, Eviction)]
    names = flags.caches or [*POLICIES, *(f"{name}+{OVER}" for name in drops)]
    cases = []
    for name in (FULL, *names):
        find(name)  # what no policy is called is refused before the model is loaded
        has_budget = any(part in drops for part in name.split("+"))
        cases += [Case(name, budget) for budget in budgets] if has_budget else [Case(name)]
    order = (FULL, LINE)  # come first, as the others are compared with them
    return sorted(dict.fromkeys(cases), key=lambda case: order.index(case.policy) if case.policy in order else 2)


def buildable(cases: list[Case], model, length: int, flags: argparse.Namespace) -> list[Case]:
    """Those that the model and the length allow; why others, if nobody asked for them, are left out is said."""
    kept = []
    for case in cases:
        try:
            case.build(model.config, length)
            kept.append(case)
        except UserError as error:
            is_asked = flags.caches is not None and (case.budget is None or flags.budgets is not None)
            if is_asked or case.policy == FULL:
                raise
            log(f"left out: {case.name}: {error}")
    return kept


def load_smaller(flags: argparse.Namespace, tokenizer, length: int):
    """The smaller model; refuses one that reads other tokens, or fewer."""
    model, own = load_model_and_tokenizer(flags.smaller, **loading_options(flags))
    if encoding_hash(own) != encoding_hash(tokenizer):
        raise UserError(f"smaller={flags.smaller}: has another tokenizer than {flags.model}; losses would not compare")
    if context_left(model) < length:
        raise UserError(
            f"smaller={flags.smaller}: reads {context_left(model)} tokens; give --length {context_left(model)}"
        )
    return model


def layers_of(model) -> int:
    return text_config(model.config).num_hidden_layers


# ---- what is said of it


def row_of(name: str, decoded: Decoded, full: Decoded, streams: Streams, probe: Probe, layers: int, seed: int) -> dict:
    """A line of results: loss on the streams, recall on the rows after them, and the bits."""
    count = len(streams.ids)
    nats, whole = decoded.nats[:count], full.nats[:count]
    num_bytes = nats.numel() * streams.bytes_per_token
    lost, percent = paired(nats, whole, num_bytes, seed)
    found = [each for each in recalled(probe, decoded.nats[count:], decoded.right[count:]) if each.distance]
    return {
        "cache": name,
        "bits": decoded.bits,
        "bits_per_token_layer": decoded.bits / streams.length / layers,
        "smaller": full.bits / decoded.bits,
        "on_average": full.mean_bits / decoded.mean_bits,
        "loss": nats.mean().item(),
        "bits_per_byte": nats.sum().item() / num_bytes / math.log(2),
        "lost_bits_per_byte": lost._asdict(),
        "lost_percent": percent.value,
        "low": percent.low,
        "high": percent.high,
        "recall": sum(each.gain for each in found) / len(found),
        "far": found[-1].gain,
        "recalled": [each._asdict() for each in found],
        "streams": count,
        "length": streams.length,
        "targets": nats.numel(),
    }


def line_of(rows: list[dict], policy: str) -> list[tuple[float, float]]:
    """(bits, percent lost) of a policy at each budget and of the full cache, from the smallest on."""
    return sorted((row["bits"], row["lost_percent"]) for row in rows if row["cache"].split()[0] in (policy, FULL))


def height_at(points: list[tuple[float, float]], bits: float) -> float | None:
    """Of a line through points, drawn over the logarithm of the bits; None left of it, the last one's right of it."""
    if bits < points[0][0]:
        return None
    for (left, low), (right, high) in pairwise(points):
        if bits <= right:
            share = math.log(bits / left) / math.log(right / left)
            return low + share * (high - low)
    return points[-1][1]


def kind_of(name: str) -> str:
    """Which of the picture's kinds a cache is."""
    parts = name.split()[0].split("+")
    if parts == [FULL] or not POLICIES.keys() >= set(parts):
        return FULL if parts == [FULL] else "other"
    drops = any(isinstance(POLICIES[part], Eviction) for part in parts)
    return "both" if len(parts) > 1 else "drops" if drops else "stores"


def best(rows: list[dict]) -> str:
    """The smallest cache without a budget that loses less than half a percent."""
    good = [row for row in rows[1:] if row["cache"] in POLICIES and row["high"] < GOOD_PERCENT]
    return max(good, key=lambda row: row["smaller"], default=rows[0])["cache"]
