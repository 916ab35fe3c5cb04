"""`acorn lab linear`: linear attention, plain and gated, against softmax attention on the same tokens.

What a state of a fixed size costs in loss, what it saves, how the loss depends on the size of a head, and how long a
token takes at the end of a long text.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling.compat import CACHE_NAME
from training.model.loading import load_model_and_tokenizer
from training.run import corpus_of_run, open_run
from training.system.errors import UserError, unknown

from ..measuring.kv_report import Streams, cut_streams, decode, own_cache, paired
from .common import BAR, Output, grow, next_command, validation_ids

ABOUT = """Train linear attention (elu(x) + 1, and the gated delta rule) and softmax attention by one recipe, and
compare loss, what a sequence holds, and the time that a token takes by its place in the text."""
EPILOG = """examples:
  acorn lab linear --smoke
  acorn lab linear --models softmax gated
  acorn lab linear --text_files my.txt --max_steps 600"""
RECIPE = "linear-stdlib"
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
WINDOW = 64  # tokens that `short` sees: what it holds of them is some twice a gated state
STREAMS, BATCH = 16, 8  # of held-out text, and how many are decoded at once
PARTS = 8  # of a long text, whose times are compared
SMOKE = {
    "model": {"n_layer": 2, "n_embd": 64, "block_size": 128},
    "data": {"tokenizer": "byte"},
    "training": {"max_steps": 30, "eval_steps": 30, "tokens_per_step": 1024, "per_device_train_batch_size": 8},
}
COLUMNS = {
    "model": "", "parameters": ",", "loss": ".4f", "lost_percent": "+.2f", "low": "+.2f", "high": "+.2f",
    "state_bits": ",", "smaller": ".1f", "ms_first": ".2f", "ms_last": ".2f",
}  # fmt: skip


# ---- the models: (layers, width) to what differs from the recipe, which is gated


NOT_GATED = {"linear_attention": "elu", "linear_conv_kernel_dim": None, "position_encoding": "rope"}


def softmax(layers: int, width: int) -> dict:
    return {"layer_types": [FULL] * layers, **NOT_GATED}


def short(layers: int, width: int) -> dict:
    return {"layer_types": [SLIDING] * layers, "sliding_window": WINDOW, **NOT_GATED}


def plain(layers: int, width: int) -> dict:
    return {"layer_types": [LINEAR] * layers, **NOT_GATED}


def gated(layers: int, width: int) -> dict:
    return {"layer_types": [LINEAR] * layers}


def hybrid(layers: int, width: int) -> dict:
    return {"layer_types": [LINEAR] * (layers - 1) + [FULL]}


def heads_of(size: int) -> Callable[[int, int], dict]:
    """Gated, with heads of that size in the same width: its state is as many times larger."""
    return lambda layers, width: gated(layers, width) | {"n_head": width // size}


MODELS = {  # all are compared with the first that is chosen
    "softmax": softmax,
    "short": short,
    "plain": plain,
    "gated": gated,
    "hybrid": hybrid,
    "gated-8": heads_of(8),
    "gated-16": heads_of(16),
    "gated-64": heads_of(64),
}
SMOKE_MODELS = ("softmax", "plain", "gated")
HELP = (
    f"softmax, short (softmax that sees {WINDOW} tokens), plain, gated, hybrid (gated, the last layer softmax), and "
    "gated-8, -16, -64 (heads of that size); the others are compared with the first (default: all)"
)


def add_flags(add) -> None:
    add("--models", nargs="+", help=HELP)
    add("--text_files", nargs="+", help="text to train on in place of Python's standard library")
    add("--max_steps", type=int, help="of each model's training (default: the recipe's 300)")
    add("--timed_tokens", type=int, help="of the text whose tokens are timed (default: 4 times the context)")


def run(flags: argparse.Namespace, out: Output) -> None:
    """Grow the models, decode the same held-out text through the state of each, and time each by position."""
    names = chosen(flags)
    check_timed(flags)
    nats, times = {}, {}
    for name in names:
        directory = grow(out, name, RECIPE, **sections(name, flags))
        model, _ = load_model_and_tokenizer(str(directory))
        streams = held_out(directory)
        with tqdm(total=-(-len(streams.ids) // BATCH) * streams.length, unit="token", desc=name, **BAR) as bar:
            decoded = decode(model, streams.ids, 0, own_cache, BATCH, bar.update)
        nats[name] = decoded.nats
        times[name] = timed(model, streams.ids[0], flags.timed_tokens or 4 * streams.length, name)
        row = figures(nats[name], nats[names[0]], streams, flags.seed)
        first = out.rows[0]["state_bits"] if out.rows else decoded.bits
        shape = {"model": name, "parameters": model.num_parameters(), "head_dim": model.config.head_dim}
        size = {"state_bits": decoded.bits, "smaller": first / decoded.bits}
        out.row(**shape, **row, **size, ms_first=times[name][0], ms_last=times[name][-1], ms=times[name])
    out.table(out.rows, COLUMNS)
    draw(out, nats, times)
    next_command("generate", directory, prompt="def ")


def chosen(flags: argparse.Namespace) -> list[str]:
    """The models that the flags name, each once."""
    names = flags.models or (SMOKE_MODELS if flags.smoke else MODELS)
    for name in names:
        if name not in MODELS:
            raise unknown("model", name, MODELS)
    return list(dict.fromkeys(names))


def check_timed(flags: argparse.Namespace) -> None:
    """Refuse a text too short to be timed by its parts."""
    if flags.timed_tokens is not None and flags.timed_tokens < 2 * PARTS:
        raise UserError(
            f"timed_tokens={flags.timed_tokens}: must be at least {2 * PARTS}, two for each of {PARTS} parts"
        )


def sections(name: str, flags: argparse.Namespace) -> dict[str, dict]:
    """What differs from the recipe, by its sections."""
    small = SMOKE if flags.smoke else {}
    model, data, training = ({**small.get(section, {})} for section in ("model", "data", "training"))
    model |= MODELS[name](model.get("n_layer", 4), model.get("n_embd", 128))
    data |= {"text_files": flags.text_files} if flags.text_files else {}
    training |= {"seed": flags.seed, "data_seed": flags.seed}
    training |= {"max_steps": flags.max_steps} if flags.max_steps is not None else {}
    return {"model": model, "data": data, "training": training}


# ---- what is measured


def held_out(directory: Path) -> Streams:
    """Streams as long as the context, of what the run held out."""
    run = open_run(directory)
    ids, bytes_per_token = validation_ids(corpus_of_run(run.recipe, directory))
    return cut_streams(ids, run.recipe.model_config().max_position_embeddings, STREAMS, bytes_per_token)


def figures(nats: torch.Tensor, baseline: torch.Tensor, streams: Streams, seed: int) -> dict[str, float]:
    """Loss of the second half of each stream, and percent of the baseline's that is lost there, with its interval."""
    ours, theirs = nats[:, streams.first :], baseline[:, streams.first :]
    num_bytes = ours.numel() * streams.bytes_per_token
    _, lost = paired(ours, theirs, num_bytes, seed)
    per_byte = ours.mean().item() / streams.bytes_per_token / math.log(2)
    losses = {"loss": ours.mean().item(), "bits_per_byte": per_byte}
    return losses | {"lost_percent": lost.value, "low": lost.low, "high": lost.high}


@torch.inference_mode()
def timed(model, ids: torch.Tensor, tokens: int, name: str) -> list[float]:
    """Milliseconds of this process's CPU time a token, in each part of a text of that many tokens, one after another.

    ids: (tokens,), which are gone through again and again. Windows and waiting for other processes do not count.
    """
    cache, spent, ends = None, [], [tokens * (part + 1) // PARTS for part in range(PARTS)]
    with tqdm(total=tokens, unit="token", desc=f"{name}, timed", **BAR) as bar:
        for start, end in zip([0, *ends], ends, strict=False):
            begun = time.process_time()
            for place in range(start, end):
                step = ids[None, place % len(ids)].view(1, 1).to(model.device)
                cache = getattr(model(step, use_cache=True, **{CACHE_NAME: cache}), CACHE_NAME)
                bar.update()
            spent.append(1000 * (time.process_time() - begun) / (end - start))
    return spent


# ---- pictures


def draw(out: Output, nats: dict[str, torch.Tensor], times: dict[str, list[float]]) -> None:
    """Loss by position, loss against what a sequence holds, and time by position."""
    with out.picture("linear", width=15, height=5) as figure:
        by_position, by_size, by_time = figure.subplots(1, 3)
        for row in out.rows:
            name = row["model"]
            means, start = nats[name].mean(0), 0
            ends = [min(2**power, len(means)) for power in range(3, len(means).bit_length() + 1)]
            points = []
            for end in dict.fromkeys(ends):
                points.append((end, means[start:end].mean().item()))
                start = end
            by_position.plot(*zip(*points, strict=True), marker=".", label=name)
            by_size.scatter(row["state_bits"] / 8000, row["loss"], label=name)
            by_size.annotate(name, (row["state_bits"] / 8000, row["loss"]))
            by_time.plot(range(1, PARTS + 1), times[name], marker=".", label=name)
        by_position.set(xscale="log", xlabel="position up to (tokens)", ylabel="loss (nats a token)")
        by_size.set(
            xscale="log", xlabel="what a sequence holds at the end of the context (kB)", ylabel="loss, 2nd half"
        )
        by_time.set(xlabel=f"part of the text (of {PARTS})", ylabel="CPU ms a token", ylim=(0, None))
        by_position.legend()
