"""`acorn lab window [MODEL]`: what becomes of a model past the context that it was trained with, and what mends it."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import Cache

from training.model.sampling import context_left, continue_ids, decode_continuation, prompt_tensor, sampling_arguments
from training.model.sizes import text_config
from training.model.windows import has_learned_positions
from training.system.errors import UserError
from training.system.files import write_whole

from ..caches.policies import build_cache, refuse_model
from ..decoding.prompts import read_prompt
from ..measuring.by_position import binned
from ..measuring.kv_report import cut_streams, decode
from .common import BAR, Output, add_stream_flags, grow_small, held_out_ids, load, most_streams, next_command
from .long_text import position_sums, read_whole, reread

ABOUT = """Read and write past the context that a model was trained with: all of the text, a window of its newest tokens
in the cache, a window that keeps the first tokens too (sinks, arXiv 2309.17453), and windows that are read again. The
loss by position says where it breaks and what mends it; each way also writes on after a prompt."""
EPILOG = """examples:
  acorn lab window --smoke                     grows a small model first
  acorn lab window runs/quickstart --cache_sinks 8
  acorn lab window runs/mine --text_files book.txt --prompt FILE:start.txt"""

WHOLE, WINDOW, SINKS, REREAD = WAYS = ("all of it", "window", "window and sinks", "read again")
SHOWN = 240  # characters at the end of a sample that are printed


def add_flags(add: Callable) -> None:
    add("model", nargs="?", help="run directory, checkpoint, adapter, model directory or Hub id (default: grows one)")
    add("--factor", type=int, default=4, help="how many trained contexts a stream is long")
    add("--cache_window", type=int, help="tokens that the cache holds, sinks among them (default: the context - 1)")
    add("--cache_sinks", type=int, default=4, help="first tokens that the window with sinks keeps")
    add("--prompt", default="\n", help="text to write on after, or FILE:path")
    add("--temperature", type=float, default=0.8, help="of what is written; 0 takes the likeliest token")
    add_stream_flags(add)


def run(flags: argparse.Namespace, out: Output) -> None:
    """Measure the four ways on the same streams, then let each write on."""
    if flags.factor < 2:
        raise UserError(f"factor={flags.factor}: must be at least 2 contexts, or nothing lies past one")
    prompt = read_prompt(flags.prompt)
    flags.model = flags.model or str(grow_small(out))
    model, tokenizer = load(flags)
    context = context_left(model)
    window = check(flags, model, context)
    begun = prompt_tensor(tokenizer, prompt, context // 2).to(model.device)
    caches = {
        WINDOW: partial(build_cache, model.config, "window", cache_budget=window, cache_sinks=0),
        SINKS: partial(build_cache, model.config, "window", cache_budget=window, cache_sinks=flags.cache_sinks),
    }
    text, bytes_per_token = held_out_ids(flags, model, tokenizer)
    ids = cut_streams(text, flags.factor * context, most_streams(flags), bytes_per_token).ids
    predicted = measure(model, ids, context, caches, flags.batch_size)
    report(predicted, context, flags, out)
    draw(predicted, context, out)
    write_on(flags, model, tokenizer, begun, context, caches, out)
    next_command("generate", flags.model, cache="window", cache_budget=window, cache_sinks=flags.cache_sinks)


def check(flags: argparse.Namespace, model, context: int) -> int:
    """How many tokens the windows hold; refuses what shows nothing."""
    if has_learned_positions(model):
        raise UserError(f"{flags.model}: learned positions end with the context of {context}; take a rotary model")
    refuse_model(text_config(model.config), flags.model)
    window = context - 1 if flags.cache_window is None else flags.cache_window
    if not flags.cache_sinks < window < context:
        raise UserError(
            f"cache_window={window}: must be above cache_sinks={flags.cache_sinks} and below the context, {context}"
        )
    return window


def measure(
    model, ids: torch.Tensor, context: int, caches: dict[str, Callable[[], Cache]], batch_size: int
) -> dict[str, torch.Tensor]:
    """Way to the nats, and right predictions, of each token: (2, streams, tokens)."""
    streams, decoded = len(ids), -(-len(ids) // batch_size) * (ids.shape[1] - 1)
    with tqdm(total=2 * streams + len(caches) * decoded, **BAR) as bar:
        through = {name: decode(model, ids, 0, make, batch_size, bar.update) for name, make in caches.items()}
        found = {WHOLE: read_whole(model, ids, bar.update), REREAD: reread(model, ids, context, bar.update)}
    found |= {name: torch.stack((each.nats, each.right.float())) for name, each in through.items()}
    return {name: found[name] for name in WAYS}


def report(predicted: dict[str, torch.Tensor], context: int, flags: argparse.Namespace, out: Output) -> None:
    """The loss by position of each way, as lines of results and as one table."""
    table = {}
    for name, values in predicted.items():
        for row in binned(position_sums(values), edges(context, values.shape[2])):
            out.row(way=name, **row)
            place = f"{row['from_context']:,}–{row['to_context']:,}"
            table.setdefault(place, {"context": place})[name] = row["loss"]
    print(f"\nLoss (nats a token) by tokens before the predicted one; the model was trained with {context:,}:")
    out.table(table.values(), {"context": "", **dict.fromkeys(WAYS, ".4f")})


def edges(context: int, length: int) -> list[int]:
    """Where the stretches of a table begin: within the context, shortly after it, and then a context each."""
    near = [0, context // 4, context // 2, context, context + context // 4, context + context // 2]
    return sorted({*near, *range(2 * context, length, context), length})


def draw(predicted: dict[str, torch.Tensor], context: int, out: Output) -> None:
    """The loss of each way by position, and by how much it is above that of what is read again.

    The text is the same for all, and so are its hard and easy places: below, they are gone.
    """
    with out.picture("loss-by-position", height=9) as figure:
        losses, above = figure.subplots(2, 1, sharex=True)
        length = predicted[WHOLE].shape[2]
        places = [*range(0, length, max(1, context // 8)), length]
        curves = {name: binned(position_sums(values), places) for name, values in predicted.items()}
        for name, rows in curves.items():
            ends = [row["to_context"] for row in rows]
            losses.plot(ends, [row["loss"] for row in rows], label=name)
            above.plot(ends, [row["loss"] - other["loss"] for row, other in zip(rows, curves[REREAD], strict=True)])
        for axes in (losses, above):
            axes.axvline(context, color="grey", linestyle="--", linewidth=1, label=f"trained context: {context:,}")
            axes.grid(alpha=0.25)
        losses.set(ylabel="loss (nats a token)")
        above.set(xlabel="tokens before the predicted one", ylabel=f"above {REREAD} (nats a token)")
        losses.legend()


def write_on(flags, model, tokenizer, ids: torch.Tensor, context: int, caches: dict, out: Output) -> None:
    """What each way writes past the context after the prompt, ids (1, tokens): into samples.txt, the ends printed."""
    sampling = sampling_arguments(flags.temperature, None, None)
    texts = {}
    for name in tqdm(WAYS, unit="sample", **BAR):
        torch.manual_seed(flags.seed)
        make = caches.get(name)
        grown = continue_ids(
            model,
            ids,
            flags.factor * context - ids.shape[1],
            ends=[],
            beyond_context="window" if name == REREAD else "extrapolate",
            make_cache=make and (lambda tokens, make=make: make()),
            **sampling,
        )
        texts[name] = decode_continuation(tokenizer, grown[0].tolist(), 0)
        out.row(way=name, sample=texts[name])
        print(f"\n── {name}, the end of {flags.factor * context:,} tokens ──\n{texts[name][-SHOWN:]}")
    whole = "\n\n".join(f"──── {name} ────\n{text}" for name, text in texts.items())
    write_whole(out.directory / "samples.txt", whole + "\n")
