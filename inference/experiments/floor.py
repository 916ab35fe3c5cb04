"""`acorn lab floor MODEL`: what can be had without a cache, and what the past is worth to a model.

The past's worth is a floor under every cache: a state of so many bits saves at most so many against the best that can
be said without it.
"""

import argparse
import math

import torch
from tqdm.auto import tqdm

from training.model.sizes import text_config
from training.system.errors import UserError, log

from ..caches.lookup import looking_up
from ..measuring.kv_report import Decoded, Streams, decode, drawn_mean, own_cache
from .common import BAR, Output, add_model_flags, held_out_streams, load
from .long_text import read_whole

ABOUT = """Measure the floor under every KV cache: what the model gains from the past (cold minus warm loss, in bits),
what the tokens themselves take, and how much smaller a cache is that looks its first layer up by token."""
EPILOG = """examples:
  acorn lab floor runs/quickstart
  acorn lab floor runs/quickstart --text_files my.txt --length 128

Each stream of text is cut in the middle, and what follows is decoded twice: warm, after the first half, and cold,
without it. bits are what is held of the first half; lost_percent is of the warm loss. passes: through how many tokens
the model goes for each that it writes. The past's worth is the sum of cold minus warm loss over the second half."""
COLUMNS = {"held": "", "bits": ",.0f", "low": ",.1f", "high": ",.1f", "lost_percent": "+.4f", "passes": ",.0f"}


def add_flags(add) -> None:
    add_model_flags(add)


def run(flags: argparse.Namespace, out: Output) -> None:
    """Decode the second half of each stream with and without its first half, and by what could stand in for a cache."""
    model, tokenizer = load(flags)
    streams = held_out_streams(flags, model, tokenizer)
    batches = -(-len(streams.ids) // flags.batch_size)
    total = batches * (2 * streams.length + streams.length - streams.first)
    with tqdm(total=total, unit="token", **BAR) as bar:
        warm = decode(model, streams.ids, streams.first, own_cache, flags.batch_size, bar.update)
        cold = decode(model, streams.ids[:, streams.first :], 0, own_cache, flags.batch_size, bar.update).nats
        looked_up = by_look_up(model, streams, flags.batch_size, bar.update)
    share, past = streams.first / streams.length, streams.first
    whole, _ = read_whole(model, streams.ids)[..., streams.first :]
    token_bits = math.ceil(math.log2(text_config(model.config).vocab_size))
    gain = (cold - warm.nats) / math.log(2)
    rows = [out.row(held="keys and values, at 16 bits", bits=warm.bits * share, lost_percent=0.0, passes=1)]
    if looked_up is not None:
        lost = lost_percent(looked_up.nats, warm)
        rows.append(out.row(held="without the first layer's", bits=looked_up.bits * share, lost_percent=lost, passes=1))
    lost = lost_percent(whole, warm)
    rows.append(out.row(held="tokens, all read again", bits=token_bits * past, lost_percent=lost, passes=past))
    rows.append(out.row(held="nothing", bits=0, lost_percent=lost_percent(cold, warm), passes=1))
    worth = drawn_mean(gain.sum(1), flags.seed)._asdict()
    rows.append(out.row(held="what the past is worth", bits=worth.pop("value"), **worth))
    out.table(by_position(cold, warm.nats, out), {"after_tokens": "", "cold_loss": ".4f", "warm_loss": ".4f"})
    print(f"\nOf {past:,} tokens of the past, for the {gain.shape[1]:,} that follow:")
    out.table(rows, COLUMNS)
    draw(cold, warm.nats, gain, out)


def by_look_up(model, streams: Streams, batch_size: int, on_token) -> Decoded | None:
    """What is said with a first layer that is looked up by token; None, with a word, where that cannot be."""
    try:
        with looking_up(model, torch.float16) as new_cache:
            return decode(model, streams.ids, streams.first, new_cache, batch_size, on_token)
    except UserError as error:
        log(f"no look-up of the first layer: {error}")
        return None


def lost_percent(nats: torch.Tensor, warm: Decoded) -> float:
    return 100 * (nats.double().sum() / warm.nats.double().sum() - 1).item()


def by_position(cold: torch.Tensor, warm: torch.Tensor, out: Output) -> list[dict]:
    """Loss after up to 1, 2, 4, 8, … tokens from the middle on, without and with what came before it."""
    rows, start = [], 0
    while start < cold.shape[1]:
        end = min(max(1, 2 * start), cold.shape[1])
        losses = {f"{name}_loss": nats[:, start:end].mean().item() for name, nats in (("cold", cold), ("warm", warm))}
        rows.append(out.row(after_tokens=end, **losses))
        start = end
    return rows


def draw(cold: torch.Tensor, warm: torch.Tensor, gain: torch.Tensor, out: Output) -> None:
    """Both losses by position, and what the past has been worth up to there."""
    with out.picture("floor", height=8) as figure:
        losses, worth = figure.subplots(2, 1, sharex=True)
        places = torch.arange(1, cold.shape[1] + 1)
        for nats, words, colour in ((cold, "cold: without the past", "tab:red"), (warm, "warm: with it", "tab:blue")):
            losses.plot(places, nats.mean(0), color=colour, alpha=0.25)
            losses.plot(places, running_mean(nats.mean(0)), color=colour, label=words)
        worth.plot(places, gain.mean(0).cumsum(0), color="tab:green")
        losses.set(ylabel="loss (nats a token)", xscale="log", title="What the past is worth")
        worth.set(xlabel="tokens after the middle of the stream", ylabel="bits gained from the past so far")
        losses.legend()
        for axes in (losses, worth):
            axes.grid(alpha=0.25)


def running_mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of each value and its neighbours, of as many as are a quarter of its place."""
    sums = torch.cat((torch.zeros(1), values.cumsum(0)))
    places = torch.arange(len(values))
    low, high = (places - places // 8).clamp(min=0), (places + places // 8 + 1).clamp(max=len(values))
    return (sums[high] - sums[low]) / (high - low)
