"""`acorn lab linear`: linear attention, plain and gated, against softmax attention on the same tokens.

What a state of a fixed size costs in loss, what it saves, how the loss depends on the size of a head, and how long a
token takes at the end of a long text.
"""

import argparse
import math
import time

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from modeling.compat import CACHE_NAME
from training.model.loading import load_model_and_tokenizer
from training.system.errors import UserError, unknown

from ..measuring.kv_report import decode, held_bits, paired
from .common import Output, cut_streams, grow, held_out_ids, next_command

ABOUT = """Train linear attention (elu(x) + 1, and the gated delta rule) and softmax attention by one recipe, and compare
loss, what a sequence holds, and the time that a token takes by its place in the text."""
EPILOG = """examples:
  acorn lab linear --smoke
  acorn lab linear --models softmax gated
  acorn lab linear --text_files my.txt --max_steps 600"""
RECIPE = "linear-stdlib"
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
WINDOW = 64  # of the softmax models with a short context: what they hold is near what a state takes
SMOKE = {
    "model": {"n_layer": 2, "n_embd": 64, "block_size": 128, "linear_conv_kernel_dim": 4},
    "data": {"tokenizer": "byte"},
    "training": {"max_steps": 30, "eval_steps": 30, "tokens_per_step": 1024, "per_device_train_batch_size": 8},
}
PARTS = 8  # of a long text, whose times are compared


def softmax(layers: int) -> dict:
    return {"layer_types": [FULL] * layers, "position_encoding": "rope"}


def short(layers: int) -> dict:
    return {"layer_types": [SLIDING] * layers, "sliding_window": WINDOW, "position_encoding": "rope"}


def plain(layers: int) -> dict:
    return {
        "layer_types": [LINEAR] * layers,
        "linear_attention": "elu",
        "linear_conv_kernel_dim": None,
        "position_encoding": "rope",
    }


def gated(layers: int) -> dict:
    return {"layer_types": [LINEAR] * layers}


def hybrid(layers: int) -> dict:
    """One softmax layer in four, the last."""
    return {"layer_types": [FULL if (i + 1) % 4 == 0 or i + 1 == layers == 2 else LINEAR for i in range(layers)]}


def heads_of(size: int):
    """Gated, with as many heads of that size as the width holds."""
    return lambda layers: {"layer_types": [LINEAR] * layers, "head_dim": size}


# Name: layers to what differs from the recipe. The first is what the others are compared with.
MODELS = {
    "softmax": softmax,
    "short": short,
    "plain": plain,
    "gated": gated,
    "hybrid": hybrid,
    "gated-8": heads_of(8),
    "gated-16": heads_of(16),
    "gated-64": heads_of(64),
}
HELP = f"""which to train: softmax; short (softmax that sees {WINDOW} tokens); plain; gated; hybrid (one layer in four
is softmax); gated-8, -16, -64: gated with heads of that size (default: all)"""


def add_flags(add) -> None:
    add("--models", nargs="+", metavar="NAME", default=list(MODELS), help=" ".join(HELP.split()))
    add("--text_files", nargs="+", help="train on these instead of Python's standard library")
    add("--max_steps", type=int, help="of each model's training (default: the recipe's)")
    add("--tokens", type=int, help="of the text whose tokens are timed (default: 4 times the context)")


def run(flags: argparse.Namespace, out: Output) -> None:
    """Grow the models, decode the same held-out text through the state of each, and time each."""
    names = chosen(flags.models)
    losses, rows = {}, []
    for name in names:
        directory = grow(out, name, RECIPE, **sections(name, flags))
        model, tokenizer = load_model_and_tokenizer(str(directory))
        own = argparse.Namespace(model=str(directory), text_files=None, **{"smoke": flags.smoke})
        ids, bytes_per_token = held_out_ids(own, model, tokenizer)
        length = model.config.max_position_embeddings
        streams = cut_streams(ids, length, 16, bytes_per_token)
        cache = DynamicCache(config=model.config)
        with tqdm(total=length, unit="token", desc=name, leave=False, disable=None) as bar:
            losses[name], _ = decode(model, streams.ids, cache, 0, bar.update)
        rows.append(
            out.row(
                model=name,
                parameters=model.num_parameters(),
                **compared(losses[name], losses[names[0]], streams, flags.seed),
                state_bits=held_bits(cache) // len(streams.ids),
                head_dim=model.config.head_dim,
            )
        )
        rows[-1]["times_smaller"] = rows[0]["state_bits"] / rows[-1]["state_bits"]
        rows[-1]["ms"] = timed(model, streams.ids[:1, :1], flags.tokens or 4 * length)
        rows[-1]["last_to_first"] = rows[-1]["ms"][-1] / rows[-1]["ms"][0]
    finish(rows, losses, out)
