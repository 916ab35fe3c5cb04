"""What every experiment of `acorn lab` does alike: grow the runs it needs, keep its figures, print and draw them."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers

from training.config.recipe import Recipe, load_recipe_file, read_section
from training.data.corpus import Corpus
from training.data.dataset import Tokens
from training.grown import grown
from training.model.loading import add_loading_flags, load_model_and_tokenizer, loading_options
from training.model.sampling import context_left
from training.system.errors import UserError, log
from training.system.files import making, write_picture
from training.system.shell import shell

from ..decoding.batches import has_virtual_tokens
from ..measuring.kv_report import Streams, cut_streams
from ..measuring.texts import add_text_flags, refuse_idle_text, rows_to_measure

RESULTS = "results.jsonl"
UNFINISHED = RESULTS + ".part"  # its name until the experiment has come to its end
RUNS = "runs"  # folder of what is grown for an experiment
STREAMS, SMOKE_STREAMS = 64, 16  # of text, decoded at once
SMALL = {"n_layer": 3, "n_embd": 64, "n_head": 4, "block_size": 64, "initializer_range": 0.0625}
BAR = {"leave": False, "file": sys.stderr, "disable": None}  # of progress, as tqdm takes it


class Output:
    """An experiment's directory: results.jsonl, a PNG a picture, runs/; what was grown before it was stopped is kept.

    The first line of results.jsonl says what was asked and the versions, each other is one `row`.
    """

    def __init__(self, directory: Path, asked: dict, command: str):
        self.directory, self.command = directory, command
        self.asked = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}
        self.rows: list[dict] = []
        self.pictures: list[Path] = []
        self._refuse_taken()

    def row(self, **fields) -> dict:
        """Keep a line of results: in the file at once, and in `rows`."""
        new, path = not self.rows, self.directory / UNFINISHED
        self.directory.mkdir(parents=True, exist_ok=True)
        with path.open("w" if new else "a", encoding="utf-8") as file:
            lines = [*([self._begun()] if new else []), fields]
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.rows.append(fields)
        return fields

    def table(self, rows: Iterable[dict], columns: dict[str, str]) -> None:
        """Print rows on stdout. columns: field to its format, such as ".4f"; what a row lacks stays empty."""
        cells = [list(columns)] + [[_cell(row.get(name), form) for name, form in columns.items()] for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:  # words to the left, figures to the right
            first, *others = zip(line, widths, strict=True)
            print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())

    @contextmanager
    def picture(self, name: str, width: float = 9, height: float = 6) -> Iterator:
        """Yield an empty matplotlib Figure, inches wide and high; then write it into the directory as NAME.png."""
        from matplotlib.figure import Figure  # half a second that only the end of an experiment needs

        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path = self.directory / f"{name}.png"
        self.directory.mkdir(parents=True, exist_ok=True)
        write_picture(path, figure)
        self.pictures.append(path)

    def finish(self) -> None:
        """Give the results their name, and say where everything is."""
        if self.rows:
            (self.directory / UNFINISHED).replace(self.directory / RESULTS)
        files = [self.directory / RESULTS, *self.pictures] if self.rows else self.pictures
        print(f"\nWritten: {', '.join(map(str, files))}")

    def _begun(self) -> dict:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return self.asked | {"command": self.command, "versions": versions}

    def _refuse_taken(self) -> None:
        """Refuse, before anything long, a directory that holds anything but what this experiment left unfinished."""
        shown = f"output_dir={self.directory}"
        with making(self.directory, shown):
            held = [path.name for path in self.directory.iterdir() if not path.name.startswith(".")]
        if held and RESULTS not in held and UNFINISHED not in held and held != [RUNS]:
            raise UserError(f"{shown}: is there already, and not empty; choose another --output_dir")
        if RESULTS in held:
            raise UserError(f"{shown}: holds the results of an experiment; choose another --output_dir")
        if UNFINISHED in held:
            self._go_on(shown)

    def _go_on(self, shown: str) -> None:
        """Take up what was stopped, if the same was asked."""
        with (self.directory / UNFINISHED).open(encoding="utf-8") as file:
            first = file.readline()
        begun = json.loads(first) if first.endswith("}\n") else {}
        other = [name for name, value in self.asked.items() if begun.get(name) != value]
        if other:
            command = begun.get("command", "another command")
            raise UserError(
                f"{shown}: holds what `{command}` left unfinished, with another {other[0]}; choose another --output_dir"
            )
        log(f"{self.directory} holds what was stopped: what has been grown there is taken, and measured anew")


def _cell(value, form: str) -> str:
    return "" if value is None else format(value, form)


# ---- runs that an experiment needs


def grow(out: Output, name: str, recipe: str, **sections: dict) -> Path:
    """Train a recipe into `runs/NAME` of the experiment's directory, as `grown` does; return where.

    sections: what differs from the recipe, such as model={"n_layer": 2}, training={"max_steps": 300}.
    """

    def build() -> Recipe:
        changed = load_recipe_file(recipe)
        changed.update({section: read_section(section, values) for section, values in sections.items()})
        changed.start_from_another(sections.get("data", {}))
        changed.check()
        changed.command = out.command
        return changed

    return grown(out.directory / RUNS / name, build)


def grow_small(out: Output) -> Path:
    """Grow the small rotary model on which an experiment shows what happens past the context; return where."""
    training = {"max_steps": 300, "tokens_per_step": 2048, "eval_steps": 300}
    return grow(out, "base", "quickstart", model=SMALL, training=training)


# ---- a model and what it is measured on


def add_model_flags(add: Callable) -> None:
    """The flags of an experiment that measures a model on running text; `add` is a parser's add_argument."""
    add("model", help="run directory, checkpoint, adapter, model directory or Hub id")
    add("--length", type=int, help="tokens of a stream of text; their last half counts (default: the model's context)")
    add_stream_flags(add)


def add_stream_flags(add: Callable) -> None:
    """The flags that say what text is decoded, by how much of it at once, and how the model is loaded."""
    add("--streams", type=int, help=f"streams of text at most (default: {STREAMS}; with --smoke {SMOKE_STREAMS})")
    add("--batch_size", type=int, default=16, help="streams decoded at once")
    add_text_flags(add)
    add_loading_flags(add)


def most_streams(flags: argparse.Namespace) -> int:
    """How many streams of text there are at most."""
    return getattr(flags, "streams", None) or (SMOKE_STREAMS if flags.smoke else STREAMS)


def load(flags: argparse.Namespace):
    """(model, tokenizer) that the flags name; an adapter's virtual tokens would be in no cache that is given."""
    model, tokenizer = load_model_and_tokenizer(flags.model, **loading_options(flags))
    if has_virtual_tokens(model):
        raise UserError(f"{flags.model}: has virtual tokens, which a given cache lacks; measure its base, or a LoRA")
    return model, tokenizer


def held_out_streams(flags: argparse.Namespace, model, tokenizer) -> Streams:
    """Streams of the text that the flags name, or of what the model's run held out."""
    context = context_left(model)
    length = context if flags.length is None else flags.length
    if not 4 <= length <= context:
        raise UserError(f"length={length}: must be between 4 and the model's context, {context}")
    ids, bytes_per_token = held_out_ids(flags, model, tokenizer)
    return cut_streams(ids, length, most_streams(flags), bytes_per_token)


def held_out_ids(flags: argparse.Namespace, model, tokenizer) -> tuple[torch.Tensor, float]:
    """(token ids (tokens,), UTF-8 bytes a token) of the text the flags name, or of what the run held out."""
    refuse_idle_text(flags)
    unread = argparse.Namespace(**{"block_size": None, "stride": None} | vars(flags))
    measured = rows_to_measure(unread, model, tokenizer)
    tokens = getattr(measured.rows, "tokens", None)
    if tokens is None:  # of conversations, which do not follow one another
        raise UserError(f"{flags.model}: what its run held out is no running text; give --text_files")
    return ids_of(tokens), measured.num_bytes / measured.tokens


def validation_ids(corpus: Corpus) -> tuple[torch.Tensor, float]:
    """The same of the validation split of a run's text."""
    ids = ids_of(corpus.tokens("validation"))
    return ids, corpus.manifest["splits"]["validation"]["bytes"] / len(ids)


def ids_of(tokens: Tokens) -> torch.Tensor:
    """All of the ids in order, (tokens,)."""
    return torch.from_numpy(np.asarray(tokens.sequence(0, len(tokens)), dtype=np.int64))


def next_command(*words: object, **flags: object) -> None:
    """Say what to type next."""
    print(f"Type next: {shell('acorn', *words, **flags)}")
