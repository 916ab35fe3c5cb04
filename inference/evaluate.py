"""`acorn evaluate MODEL [--text_files …]`: the losses of a model on what its run held out, or on any text."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling.segment_memory import memory_obstacle
from training.data.dataset import EvaluationRows, Rows
from training.loop.evaluation import PositionSums, evaluate_rows
from training.model.devices import best_device, refuse_emulated
from training.model.loading import OUR_TYPES, load_model_and_tokenizer, without_adapter
from training.system.addresses import each_text, public_text
from training.system.errors import UserError, one_line, quiet_libraries, run_main
from training.system.files import check_output
from training.system.flags import FlagParser

from .measuring.by_position import draw_positions, position_rows, position_table
from .measuring.card import check_card, text_results, update_card
from .measuring.harness import OF_TASKS, Harness, add_harness_flags, card_results, task_table
from .measuring.texts import TEXT, Measured, add_text_flags, refuse_idle_text, rows_to_measure

EPILOG = """examples:
  acorn evaluate runs/quickstart                          the validation split of its run
  acorn evaluate runs/quickstart --text_files my.txt --stride 64
  acorn evaluate runs/quickstart/checkpoint-225 --dataset python-stdlib
  acorn evaluate runs/quickstart --by_position loss-by-position.png
  acorn evaluate runs/my-gpt2 --tasks hellaswag,lambada_openai --update_card

With --stride sequences overlap, and each token but those of the first is predicted from at least
block_size - stride tokens of context: what the model can do on a long text, for block_size/stride times the
work. Loss by position is clearest without it, when there are as many tokens at each position."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags."""
    parser = FlagParser(
        prog="acorn evaluate",
        description="Print loss, perplexity, bits per byte and token accuracy of a model as one JSON line: on the "
        "validation split of its run, on another text, or on prepared tokens; or a model's results on tasks of "
        "EleutherAI's harness.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", help="run directory, checkpoint, model directory, adapter or Hub id")
    add_text_flags(add)
    add("--block_size", type=int, help="tokens per sequence (default: the model's context)")
    add("--stride", type=int, help="tokens from one sequence to the next (default: block_size, none read twice)")
    add("--memory_length", type=int, help="tokens of memory before each sequence (default: the model's memory_length)")
    add("--by_position", type=Path, help="PNG file for the loss by position in the context; its table on stderr")
    add_harness_flags(add)
    add("--per_device_eval_batch_size", type=int, default=32, help="sequences per batch")
    add("--bf16", action="store_true", help="compute the logits in bf16 (default: in the type of the weights)")
    add("--force_precision", action="store_true", help="use a type even if the device only emulates it")
    add("--save", help="JSON file, or directory for one, in which to save the results with date and versions")
    add("--update_card", action="store_true", help="add the results to the model card, README.md in the directory")
    add("--trust_remote_code", action="store_true", help="run model code from the Hub")
    flags = parser.parse_args(argv)
    check(flags, parser)
    return flags


def check(flags: argparse.Namespace, parser: FlagParser) -> None:
    """Refuse flags that would be read and ignored, and files that could not be written in the end."""
    refuse_idle_text(flags)
    if flags.tasks is not None:
        for name in (*TEXT, "data_dir", "stride", "by_position", "memory_length"):
            if getattr(flags, name):
                raise UserError(f"--{name}: cannot be combined with --tasks, whose texts are their own; leave it out")
    for name in OF_TASKS:
        if getattr(flags, name) != parser.get_default(name) and not flags.tasks:
            raise UserError(f"--{name}: has no effect without --tasks")
    if flags.by_position:
        check_output("--by_position", flags.by_position, (".png",))
    if flags.save:
        check_output("--save", Path(flags.save))
        if Path(flags.save).is_file():
            raise UserError(f"--save={flags.save}: is there already; name another file, or a folder for many")
    if flags.update_card:
        check_card(flags)


def main(argv: list[str] | None = None) -> None:
    """Print what the flags ask for, figures of a text or results of tasks, as one JSON line."""
    flags = parse(argv)
    quiet_libraries()
    if flags.bf16 and not flags.force_precision:
        mend = "leave it out, or override with --force_precision"
        refuse_emulated("--bf16", best_device().type, torch.bfloat16, mend)
    harness = Harness(flags) if flags.tasks is not None else None
    model, tokenizer = load_model_and_tokenizer(flags.model, "auto", flags.trust_remote_code, flags.force_precision)
    if harness:
        results = harness.measure(model, tokenizer)
        for_card = card_results(results)
        print(task_table(results), file=sys.stderr)
    else:
        measured = rows_to_measure(flags, model, tokenizer)
        results = measure(flags, model, measured)
        for_card = text_results(flags, measured, results)
    if flags.save:
        save(flags, results)
    if flags.update_card:
        update_card(Path(flags.model), for_card)
    print(json.dumps(results))


def measure(flags: argparse.Namespace, model, measured: Measured) -> dict:
    """The figures of a model on rows, and where it is asked for their table and picture by position."""
    batch_size, rows = flags.per_device_eval_batch_size, measured.rows
    device = next(model.parameters()).device.type
    autocast = (lambda: torch.autocast(device, torch.bfloat16)) if flags.bf16 else nullcontext
    sums = PositionSums(len(rows[0]["input_ids"])) if flags.by_position else None
    memory_length = memory_of(flags, model, rows)
    batches = -(-len(rows) // batch_size)
    with tqdm(total=batches, unit="batch", leave=False, file=sys.stderr, disable=None) as bar:
        results = evaluate_rows(
            model,
            rows,
            measured.num_bytes,
            batch_size,
            autocast,
            on_batch=bar.update,
            by_position=sums,
            memory_length=memory_length,
        )
    results |= {"tokens": measured.tokens, "bytes": measured.num_bytes}
    if sums is not None:
        results["by_position"] = position_rows(sums.sums)
        draw_positions(sums, flags.by_position, f"{flags.model} on {measured.name}")
        print(f"{position_table(results['by_position'])}\nThe picture is in {flags.by_position}.", file=sys.stderr)
    return results


def memory_of(flags: argparse.Namespace, model, rows: Rows) -> int:
    """How many tokens of memory adjacent rows are read with: the model's own, unless the flags say otherwise."""
    config, given = without_adapter(model).config, flags.memory_length
    are_adjacent = isinstance(rows, EvaluationRows) and rows.stride == rows.context_length
    if given is None:
        return getattr(config, "memory_length", 0) if are_adjacent else 0
    if given and config.model_type not in OUR_TYPES:
        raise UserError(f"--memory_length={given}: only Acorn's own models have a memory; leave it out")
    if given and (obstacle := memory_obstacle(config)):
        raise UserError(f"--memory_length={given}: {obstacle}")
    if given and not are_adjacent:
        raise UserError(f"--memory_length={given}: is for sequences that follow each other; leave it or --stride out")
    return given


def save(flags: argparse.Namespace, results: dict) -> None:
    """Keep the results as the `evaluate` library does: with what was evaluated, the time and the versions."""
    import evaluate  # half a second that a plain evaluation need not wait for

    evaluate.saving._git_commit_hash = lambda: None  # fails without git, and prints `fatal` outside of a repository
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items() if value}
    try:
        evaluate.save(flags.save, **each_text(given, public_text) | results)
    except OSError as error:
        raise UserError(f"--save={flags.save}: {one_line(error)}; name a file or folder that can be written") from error


if __name__ == "__main__":
    run_main(main)
