"""`acorn lab extend [RUN]`: how many steps of training at a longer context a model needs before it can use it."""

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling import GPTConfig
from training.model.devices import best_device
from training.model.loading import load_causal_lm
from training.model.starting import architecture_to_start_from, model_to_start_from
from training.run import Run, corpus_of_run, open_run
from training.system.errors import UserError, unknown
from training.system.flags import check_number

from ..measuring.by_position import binned
from ..measuring.kv_report import Streams, cut_streams, paired
from .common import BAR, Output, grow, grow_small, most_streams, next_command, validation_ids
from .long_text import position_sums, read_whole, reread

ABOUT = """Train a model on for a few steps at a longer context, and measure its loss by position after each number of
steps: how many are enough? Rotary positions are stretched in one of three ways, or left as they are; beside them, what
the model gets that is not extended, and rereads the last half of its context."""
EPILOG = """examples:
  acorn lab extend --smoke                              grows a small model first
  acorn lab extend runs/quickstart
  acorn lab extend runs/mine --factor 8 --ways linear yarn --steps 10 100 1000

Enough are the fewest of the steps after which the loss past the trained context is within 1 % of what it is after the
most; and, to be worth it, below that of the model as it was, rereading the last half of its context. The steps go on
from each other, at one learning rate: 100 steps are the 30 before and 70 more."""

ENOUGH = 1.0  # percent of the loss after the most steps
SHARE = 0.1  # of the run's own learning rates
WARMUP = 2  # steps, in which Adam's averages begin to mean something
STEPS, SMOKE_STEPS = [10, 30, 100, 300], [3, 10, 30]


class Trained(NamedTuple):
    """The run that is extended, its configuration and the text that it held out, in streams of the longer context."""

    run: Run
    config: GPTConfig
    data_dir: Path
    streams: Streams

    @property
    def context(self) -> int:
        return self.config.max_position_embeddings


# ---- the ways to stretch rotary positions: (the model's configuration, factor) to rope_parameters


def unchanged(config: GPTConfig, factor: int) -> dict:
    return dict(config.rope_parameters)


def linear(config: GPTConfig, factor: int) -> dict:
    """Position interpolation (arXiv 2306.15595): positions are divided by the factor."""
    return {"rope_type": "linear", "factor": float(factor)}


def yarn(config: GPTConfig, factor: int) -> dict:
    """YaRN (arXiv 2309.00071): slow turns are divided by the factor, quick ones stay, attention becomes sharper."""
    return {"rope_type": "yarn", "factor": float(factor)}


def theta(config: GPTConfig, factor: int) -> dict:
    """A larger base (arXiv 2309.00071, section 3.1): the slowest turn is divided by the factor, the quickest stays."""
    grown = config.rope_parameters["rope_theta"] * factor ** (config.head_dim / (config.head_dim - 2))
    return {"rope_type": "default", "rope_theta": grown}


WAYS: dict[str, Callable[[GPTConfig, int], dict]] = {
    "unchanged": unchanged,
    "linear": linear,
    "yarn": yarn,
    "theta": theta,
}


def add_flags(add: Callable) -> None:
    add("model", nargs="?", metavar="RUN", help="run of acorn pretrain with rotary positions (default: grows one)")
    add("--factor", type=int, default=4, help="how many times longer the context becomes")
    add("--ways", nargs="+", default=list(WAYS), help="how positions are stretched")
    add("--steps", type=int, nargs="+", help=f"after which to measure (default: {' '.join(map(str, STEPS))})")
    add("--learning_rate", type=float, help="AdamW's (default: a tenth of the run's); Muon's in the same proportion")
    add("--tokens_per_step", type=int, help="tokens of a step (default: the run's, in whole sequences)")


def run(flags: argparse.Namespace, out: Output) -> None:
    """Measure each way before training and after each number of steps."""
    steps = check(flags)
    directory = Path(flags.model) if flags.model else grow_small(out)
    trained = open_trained(directory, flags)
    rows, curves = [], {}
    base = load_causal_lm(str(directory)).to(best_device())
    again = reread(base, trained.streams.ids, trained.context)
    for way in flags.ways:
        measured = dict(measure(out, trained, way, steps, flags))
        rows += compare(way, measured, again, trained, flags.seed, out)
        curves[way] = measured
    columns = {"way": "", "steps": ",d", "tokens": ",d", "near": ".4f", "far": ".4f"}
    title = f"Loss within the trained context of {trained.context:,} (near: its last half) and past it (far):"
    print(f"\n{title}")
    out.table(rows, columns | {"over_last": "+.2f", "low": "+.2f", "high": "+.2f", "over_reread": "+.2f"})
    print("over_last: % above the loss after the most steps, low to high: 95 % interval; over_reread: % above what the")
    print(f"model gets that is not extended, and rereads the last half of its context ({far(again, trained):.4f}).\n")
    for way in flags.ways:
        print(in_words(way, rows, max(steps)))
    draw_positions(curves, again, trained, out)
    draw_steps(rows, steps, far(again, trained), out)
    best = min((row for row in rows if row["steps"]), key=lambda row: row["far"])
    extended = out.directory / "runs" / best["way"]
    next_command("evaluate", extended, by_position=out.directory / "extended.png")


def check(flags: argparse.Namespace) -> list[int]:
    """The numbers of steps in order; refuses flags that are none."""
    if flags.factor < 2:
        raise UserError(f"factor={flags.factor}: must be at least 2: the trained context is extended, never cut")
    for way in flags.ways:
        if way not in WAYS:
            raise unknown("way", way, WAYS)
        if flags.ways.count(way) > 1:
            raise UserError(f"ways={way}: is given twice; give it once")
    steps = sorted(set(flags.steps or (SMOKE_STEPS if flags.smoke else STEPS)))
    if steps[0] < 1:
        raise UserError(f"steps={steps[0]}: must be at least 1; what is there before training is always measured")
    for number in steps:
        check_number("max_steps", number)
    return steps


def open_trained(directory: Path, flags: argparse.Namespace) -> Trained:
    """The run in a directory; one that cannot be extended is refused."""
    run = open_run(directory)
    if type(run) is not Run:
        raise UserError(f"{directory}: is no run of acorn pretrain; give one of those")
    config = GPTConfig.from_pretrained(directory)
    if config.position_encoding != "rope" or config.rope_layer_types():
        kind = config.position_encoding if config.position_encoding != "rope" else "rope by layer type"
        raise UserError(f"{directory}: its positions are {kind}; this stretches rotary ones, the same in all layers")
    if config.rope_parameters["rope_type"] != "default":
        raise UserError(f"{directory}: its positions are stretched already; take the run that it began with")
    corpus = corpus_of_run(run.recipe, directory)
    ids, bytes_per_token = validation_ids(corpus)
    length = flags.factor * config.max_position_embeddings
    return Trained(run, config, corpus.directory, cut_streams(ids, length, most_streams(flags), bytes_per_token))


# ---- training on, and what it comes to


def measure(out: Output, trained: Trained, way: str, steps: list[int], flags: argparse.Namespace):
    """Yield (steps, predictions (2, streams, tokens)), before training and after each number of steps."""
    directory, length = trained.run.directory, trained.streams.length
    stretched = WAYS[way](trained.config, flags.factor)
    changes = {"max_position_embeddings": length, "rope_parameters": stretched}
    config = GPTConfig(**architecture_to_start_from(str(directory), changes))
    yield 0, predict(model_to_start_from(str(directory), config), trained, f"{way}, before")
    changes["model_name_or_path"] = str(directory.absolute())
    sections = {"model": changes, "data": {"data_dir": str(trained.data_dir)}, "sample": {"max_new_tokens": 0}}
    place = None
    for number in steps:
        plan = {"max_steps": number, "eval_steps": number}
        if place is None:
            training = plan | training_of(trained.run, length, flags)
            place = grow(out, way, str(directory / "recipe.yaml"), **sections, training=training)
        elif not (place / f"checkpoint-{number}").is_dir():
            again = open_run(place)
            again.change({"training": plan})
            with redirect_stdout(sys.stderr):
                again.go_on()
        yield number, predict(load_causal_lm(str(place / f"checkpoint-{number}")), trained, f"{way}, {number} steps")


def training_of(run: Run, length: int, flags: argparse.Namespace) -> dict:
    """The run's own way of training, at a small learning rate that stays, with longer sequences."""
    args = run.args
    rate = SHARE * args.learning_rate if flags.learning_rate is None else flags.learning_rate
    tokens = flags.tokens_per_step or args.tokens_per_step
    rows = max(1, round(tokens / length))
    share = rate / args.learning_rate if args.learning_rate else 0.0
    muon = {"muon_learning_rate": share * args.muon_learning_rate} if args.optimizer != "adamw" else {}
    return muon | {
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARMUP,
        "tokens_per_step": rows * length,
        "per_device_train_batch_size": min(rows, args.per_device_train_batch_size),
        "per_device_eval_batch_size": min(8, args.per_device_eval_batch_size),
        "save_total_limit": None,
        "seed": flags.seed,
    }


def predict(model, trained: Trained, what: str) -> torch.Tensor:
    ids = trained.streams.ids
    with tqdm(total=len(ids), desc=what, unit="stream", **BAR) as bar:
        return read_whole(model.to(best_device()), ids, bar.update)


def far(predicted: torch.Tensor, trained: Trained) -> float:
    """Loss of the tokens that more than the trained context comes before."""
    return predicted[0, :, trained.context :].mean().item()


def compare(way: str, measured: dict[int, torch.Tensor], again: torch.Tensor, trained: Trained, seed: int, out) -> list:
    """A row for each number of steps, with the losses by position among the lines of results."""
    rows, context, last = [], trained.context, measured[max(measured)]
    tokens_per_step = open_run(out.directory / "runs" / way).args.tokens_per_step
    for steps, predicted in measured.items():
        nats = {name: values[0, :, context:] for name, values in (("own", predicted), ("last", last), ("re", again))}
        num_bytes = trained.streams.bytes_per_token * nats["own"].numel()
        lost = paired(nats["own"], nats["last"], num_bytes, seed)[1]
        row = {
            "way": way,
            "steps": steps,
            "tokens": steps * tokens_per_step,
            "near": predicted[0, :, context // 2 : context].mean().item(),
            "far": nats["own"].mean().item(),
            "over_last": lost.value,
            "low": lost.low,
            "high": lost.high,
            "over_reread": paired(nats["own"], nats["re"], num_bytes, seed)[1].value,
        }
        edges = [*range(0, predicted.shape[2], max(1, context // 4)), predicted.shape[2]]
        rows.append(out.row(**row, by_position=binned(position_sums(predicted), edges)))
    return rows


def in_words(way: str, rows: list[dict], most: int) -> str:
    """How many steps are enough: to lose as little as after the most, and to be ahead of a model that rereads."""
    own = [row for row in rows if row["way"] == way]
    near_last = min(row["steps"] for row in own if row["over_last"] <= ENOUGH)
    ahead = next((row["steps"] for row in own if row["over_reread"] < 0), None)
    settled = f"{near_last:,} steps come within {ENOUGH:g} % of {most:,}" if near_last < most else "it still falls"
    return f"{way}: {settled}; " + (
        f"ahead of rereading after {ahead:,}" if ahead is not None else "rereading is ahead"
    )


# ---- pictures


def draw_positions(curves: dict[str, dict[int, torch.Tensor]], again: torch.Tensor, trained: Trained, out) -> None:
    """The loss by position of each way after each number of steps, and how far it is above that of rereading.

    The text is the same for all, and so are its hard and easy places: below, they are gone.
    """
    from matplotlib import colormaps

    step = max(1, trained.context // 4)
    with out.picture("loss-by-position", width=4 * len(curves) + 1, height=8) as figure:
        panels = figure.subplots(2, len(curves), sharex=True, sharey="row", squeeze=False)
        places, reread_losses = curve(again, step)
        for (losses, above), (way, measured) in zip(panels.T, curves.items(), strict=True):
            colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(measured)))
            for color, (steps, predicted) in zip(colors, measured.items(), strict=True):
                own = curve(predicted, step)[1]
                losses.plot(places, own, color=color, label=f"{steps:,} steps")
                above.plot(places, [a - b for a, b in zip(own, reread_losses, strict=True)], color=color)
            losses.plot(places, reread_losses, color="tab:red", linestyle=":", label="not extended, reread")
            above.axhline(0, color="tab:red", linestyle=":")
            for axes in (losses, above):
                axes.axvline(trained.context, color="grey", linestyle="--", linewidth=1)
                axes.grid(alpha=0.25)
            losses.set(title=way)
            above.set(xlabel="tokens before the predicted one")
        panels[0, 0].set(ylabel="loss (nats a token)")
        panels[1, 0].set(ylabel="above rereading (nats a token)")
        panels[0, 0].legend(fontsize="small")


def curve(predicted: torch.Tensor, step: int) -> tuple[list[float], list[float]]:
    """Positions, and the mean loss of the stretch that ends there."""
    length = predicted.shape[2]
    rows = binned(position_sums(predicted), [*range(0, length, step), length])
    return [row["to_context"] for row in rows], [row["loss"] for row in rows]


def draw_steps(rows: list[dict], steps: list[int], not_extended: float, out: Output) -> None:
    """The loss past the trained context against the number of steps."""
    with out.picture("steps", width=8, height=5) as figure:
        axes = figure.subplots()
        for way in dict.fromkeys(row["way"] for row in rows):
            own = [row for row in rows if row["way"] == way]
            axes.plot([row["steps"] for row in own], [row["far"] for row in own], marker="o", label=way)
        axes.axhline(not_extended, color="tab:red", linestyle=":", label="not extended, reread")
        axes.set_xscale("symlog", linthresh=steps[0])
        axes.set_xlim(left=-steps[0] / 10)
        axes.set_xticks([0, *steps], [f"{step:,}" for step in (0, *steps)])
        axes.set(xlabel="steps at the longer context", ylabel="loss past the trained context (nats a token)")
        axes.grid(alpha=0.25)
        axes.legend()
