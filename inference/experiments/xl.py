"""`acorn lab xl [RUN]`: what a memory of the segments before is worth, and how far past its training length it goes."""

import argparse
import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from modeling.compat import CACHE_NAME
from modeling.segment_memory import SegmentMemory
from training.model.loading import add_loading_flags, load_model_and_tokenizer, loading_options, without_adapter
from training.run import open_run
from training.system.checkpoints import run_of
from training.system.errors import UserError

from ..measuring.kv_report import Streams, cut_streams, drawn_mean, paired
from ..measuring.texts import add_text_flags
from .common import BAR, Output, grow, held_out_ids, next_command

ABOUT = """Measure Transformer-XL: bits per byte on running text against the memory in evaluation, from none to four
times what the model was trained with, beside the same model trained without one. Without RUN both are trained."""
EPILOG = """examples:
  acorn lab xl                                  trains stdlib-xl twice, with and without its memory
  acorn lab xl runs/stdlib-xl                   takes that run, and trains its counterpart
  acorn lab xl runs/stdlib-xl --plain runs/plain --text_files my.txt"""
RECIPE = "stdlib-xl"
FACTORS = (0, 0.5, 1, 2, 4)  # of the training memory
SMOKE = {
    "model": {"n_layer": 2, "n_embd": 64, "n_head": 2},
    "training": {"max_steps": 60, "warmup_steps": 10, "eval_steps": 60},
    "sample": {"max_new_tokens": 0},
}
LENGTH, STREAMS = 16, 64  # of a stream, in training memories; at most so many


def add_flags(add) -> None:
    add("model", nargs="?", help=f"run that was trained with a memory (default: trained here, from {RECIPE})")
    add("--plain", help="run of the same model trained without a memory (default: trained here)")
    add("--length", type=int, help=f"tokens of a stream; their last half counts (default: {LENGTH} training memories)")
    add("--streams", type=int, default=STREAMS, help="streams at most")
    add_text_flags(add)
    add_loading_flags(add)


def run(flags: argparse.Namespace, out: Output) -> None:
    """Read the same streams with each memory, by both models, and compare."""
    if flags.model is not None:
        trained_length(flags.model)  # refused before anything is trained
    flags.model = flags.model or str(grow(out, "xl", RECIPE, **trained(flags)))
    length = trained_length(flags.model)
    plain = flags.plain or counterpart(flags, out)
    streams, rows = None, []
    for name, directory in (("with a memory", flags.model), ("without", plain)):
        if directory is None:
            continue
        model, tokenizer = load_model_and_tokenizer(directory, **loading_options(flags))
        if streams is None:
            ids, bytes_per_token = held_out_ids(flags, model, tokenizer)
            streams = cut_streams(ids, flags.length or LENGTH * length, flags.streams, bytes_per_token)
        rows += measure(name, model, streams, length, flags.seed, out)
    print(f"\n{len(streams.ids)} streams of {streams.length} tokens, of which the last half counts:")
    columns = {"trained": "", "memory": "", "bits_per_byte": ".4f", "low": ".4f", "high": ".4f"}
    out.table(rows, columns | {"change": "+.4f", "change_low": "+.4f", "change_high": "+.4f"})
    print(verdict([row for row in rows if row["trained"] == rows[0]["trained"]]))
    draw(rows, length, out)
    next_command("generate", flags.model)


def trained(flags: argparse.Namespace) -> dict:
    """What differs from the recipe, by section."""
    smoke = SMOKE if flags.smoke else {}
    return {**smoke, "training": {"seed": flags.seed, **smoke.get("training", {})}}


def counterpart(flags: argparse.Namespace, out: Output) -> Path | None:
    """The run of the same recipe without a memory, trained here; None for a model that belongs to no run."""
    run_dir = run_of(Path(flags.model))
    if run_dir is None:
        return None
    without = {"train_memory_length": None, "memory_reset_probability": 0.0}
    recipe = str(run_dir / "recipe.yaml")
    return grow(out, "plain", recipe, model={"memory_length": 0}, training=without)


def trained_length(name: str) -> int:
    """Tokens of memory that a model was trained with; UserError where there is none."""
    run_dir = run_of(Path(name))
    if run_dir is None:
        raise UserError(f"{name}: is no run, so it is not known what memory it was trained with; name a run")
    recipe = open_run(run_dir).recipe
    length = recipe.training.get("train_memory_length")
    length = recipe.model.get("memory_length", 0) if length is None else length
    if not length:
        raise UserError(f"{name}: was trained without a memory; name a run of a recipe such as {RECIPE}")
    return length


# ---- measuring


def measure(name: str, model, streams: Streams, length: int, seed: int, out: Output) -> list[dict]:
    """A row of results for each memory: bits per byte, and how they change from the memory before, with intervals."""
    rows, before = [], None
    num_bytes = streams.targets.shape[1] * streams.bytes_per_token  # of a stream
    segments = -(-streams.length // without_adapter(model).config.max_position_embeddings)
    with tqdm(total=len(FACTORS) * segments, desc=name, unit="segment", **BAR) as bar:
        for factor in FACTORS:
            nats = read(model, streams, round(factor * length), bar.update)
            bits = drawn_mean(nats.double().sum(1) / math.log(2) / num_bytes, seed)
            row = {"trained": name, "memory": round(factor * length), "factor": factor, "bits_per_byte": bits.value}
            row |= {"low": bits.low, "high": bits.high}
            if before is not None:
                change, _ = paired(nats, before, num_bytes * len(nats), seed)
                row |= {"change": change.value, "change_low": change.low, "change_high": change.high}
            rows.append(out.row(**row))
            before = nats
    return rows


@torch.inference_mode()
def read(model, streams: Streams, memory_length: int, on_segment=lambda: None) -> torch.Tensor:
    """Nats of the targets, (streams, targets), by reading the streams segment by segment with so long a memory."""
    memory = SegmentMemory(without_adapter(model).config, memory_length)
    ids, nats = streams.ids.to(model.device), []
    targets = ids[:, 1:].split(model.config.max_position_embeddings, dim=1)
    for piece, wanted in zip(ids[:, :-1].split(model.config.max_position_embeddings, dim=1), targets, strict=True):
        logits = model(piece, use_cache=False, **{CACHE_NAME: memory}).logits
        nats.append(cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none"))
        on_segment()
    return torch.cat(nats, dim=1)[:, streams.first :].cpu()


def verdict(rows: list[dict]) -> str:
    """Whether a longer memory never costs anything, as far as the intervals can tell."""
    worse = [row for row in rows if row.get("change_low", 0) > 0]
    if not worse:
        return "Bits per byte fall, or stay within the interval, with every longer memory."
    return f"Bits per byte rise where the memory grows to {', '.join(str(row['memory']) for row in worse)} tokens."


def draw(rows: list[dict], length: int, out: Output) -> None:
    """Bits per byte against the memory, a line a model, with intervals."""
    with out.picture("xl") as figure:
        axes = figure.subplots()
        for name in dict.fromkeys(row["trained"] for row in rows):
            own = [row for row in rows if row["trained"] == name]
            values = [row["bits_per_byte"] for row in own]
            below = [row["bits_per_byte"] - row["low"] for row in own]
            above = [row["high"] - row["bits_per_byte"] for row in own]
            places = [row["memory"] for row in own]
            axes.errorbar(places, values, yerr=[below, above], marker="o", capsize=3, label=f"trained {name}")
        axes.axvline(length, color="grey", linestyle=":", label="memory in training")
        axes.set(xlabel="memory in evaluation (tokens)", ylabel="bits per byte")
        axes.legend()
