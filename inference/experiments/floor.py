"""`acorn lab floor MODEL`: what can be had without any cache, and what the past is worth to a model.

The past's worth is a floor under every cache: what holds fewer bits cannot carry what the model makes of the past.
"""

import argparse
import math
import sys

import torch
from tqdm.auto import tqdm

from training.model.sizes import text_config

from ..measuring.kv_report import Decoded, Streams, decode, drawn_mean, own_cache
from .common import Output, add_model_flags, held_out_streams, load

ABOUT = """Measure the floor under every KV cache: what the model gains from the past (cold minus warm loss, in bits),
beside what a cache of 16 bits a number holds, and what the tokens themselves take."""
EPILOG = """examples:
  acorn lab floor runs/quickstart
  acorn lab floor gpt2 --text_files my.txt --length 512"""


def add_flags(add) -> None:
    add_model_flags(add)


def run(flags: argparse.Namespace, out: Output) -> None:
    """Decode the second half of each stream with and without its first half, and compare."""
    model, tokenizer = load(flags)
    streams = held_out_streams(flags, model, tokenizer)
    cold, with_past = cold_and_warm(model, streams, flags.batch_size)
    warm = with_past.nats
    gain = (cold - warm) / math.log(2)
    by_position(cold, warm, out)
    past = streams.first + 1
    token_bits = math.ceil(math.log2(text_config(model.config).vocab_size))
    worth = drawn_mean(gain.sum(1), flags.seed)
    rows = [
        out.row(held="keys and values, 16 bits", bits=with_past.bits * past / streams.length),
        out.row(held="the tokens alone, and recompute", bits=token_bits * past),
        out.row(held="what the past is worth", bits=worth.value, low=worth.low, high=worth.high),
    ]
    print(f"\nOf {past} tokens of the past, for the {streams.length - past + 1} that follow:")
    out.table(rows, {"held": "", "bits": ",.1f", "low": ",.1f", "high": ",.1f"})
    draw(cold, warm, gain, out)


def cold_and_warm(model, streams: Streams, batch_size: int) -> tuple[torch.Tensor, Decoded]:
    """Nats of the tokens after the middle without those before it, and what is said of the same tokens with them."""
    passes = 2 * -(-len(streams.ids) // batch_size)
    with tqdm(total=passes * streams.length, unit="token", leave=False, file=sys.stderr, disable=None) as bar:
        warm = decode(model, streams.ids, streams.first, own_cache, batch_size, bar.update)
        cold = decode(model, streams.ids[:, streams.first :], 0, own_cache, batch_size, bar.update)
    return cold.nats, warm


def by_position(cold: torch.Tensor, warm: torch.Tensor, out: Output) -> None:
    """Loss after 1, 2, 3–4, 5–8, … tokens from the middle on, without and with what came before it."""
    rows, start = [], 0
    while start < cold.shape[1]:
        end = min(max(1, 2 * start), cold.shape[1])
        means = {name: nats[:, start:end].mean().item() for name, nats in (("cold", cold), ("warm", warm))}
        rows.append(out.row(after_tokens=end, cold_loss=means["cold"], warm_loss=means["warm"]))
        start = end
    out.table(rows, {"after_tokens": "", "cold_loss": ".4f", "warm_loss": ".4f"})


def draw(cold: torch.Tensor, warm: torch.Tensor, gain: torch.Tensor, out: Output) -> None:
    """Both losses by position, and what the past has been worth up to there."""
    with out.picture("floor", height=8) as figure:
        losses, worth = figure.subplots(2, 1, sharex=True)
        places = range(1, cold.shape[1] + 1)
        losses.plot(places, cold.mean(0), label="cold: without the past", color="tab:red")
        losses.plot(places, warm.mean(0), label="warm: with the past", color="tab:blue")
        losses.set(ylabel="loss (nats a token)")
        worth.plot(places, gain.mean(0).cumsum(0), color="tab:green")
        worth.set(
            xlabel="tokens after the middle of the stream", ylabel="bits gained from the past so far", xscale="log"
        )
        losses.legend()
