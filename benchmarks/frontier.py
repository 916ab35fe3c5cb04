"""The board of FRONTIER.md: how soon, how low and in how few steps does a small GPT learn Tiny Shakespeare?

    python benchmarks/frontier.py time      --text tinyshakespeare.txt --nanogpt nanoGPT
    python benchmarks/frontier.py data      --text tinyshakespeare.txt --runs DIR [--tune] [--flags "--max_steps 2000"]
    python benchmarks/frontier.py optimizer --text tinyshakespeare.txt --runs DIR --mark 1.95 --steps 200 260 340
    python benchmarks/frontier.py screen    --text tinyshakespeare.txt --runs DIR --try "decay: --weight_decay 0.3"

Prints one JSON line. `time`: whole processes to nanoGPT's CPU loss on the full validation split, the two sides in
alternation. `data`: the lowest loss with any number of epochs; the validation split is read once, at the end, and with
--tune not at all. `optimizer`: the steps to a loss, of one model, data and batch. `screen`: what a set of flags is
worth on a 0.8 M model, seed by seed against the same recipe without it. The last two, and --tune, learn from the
training part alone, and are measured on its last tenth. A run that is finished in --runs is not trained again.
"""

import argparse
import hashlib
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.contenders import WHOLE, Acorn, NanoGPT, alternate, setting
from training.config.command_line import load_recipe
from training.data.corpus import load_corpus
from training.data.dataset import IGNORED, EvaluationRows, collate_rows
from training.grown import grown
from training.model.loading import load_causal_lm
from training.share.metrics_file import read_metrics
from training.system.errors import UserError, quiet_libraries, run_main, unknown

MARK = 1.8983  # nanoGPT's CPU recipe on the full validation split
FIRST_SEED = 1337  # nanoGPT's
QUIET = "--max_new_tokens 0"
# Of a text of a million characters 30,000 are read, 7.7 times in the 300 steps of the recipe, and 20,000 held out.
REPEATED = (0.05, "--validation_fraction 0.4")
# What a contender of the optimizer track changes in the recipe; with --contender come its tuned rates.
CONTENDERS = {"adamw": "--optimizer adamw", "muon": "--optimizer muon", "normuon": "--optimizer normuon"}


# ---- runs


class Board:
    """Runs of one recipe on a text, kept by what made them."""

    def __init__(self, text: Path, recipe: str, runs: Path, seeds: int):
        self.text, self.recipe, self.runs = text, recipe, runs
        self.seeds = range(FIRST_SEED, FIRST_SEED + seeds)
        self.tokens = runs / f"tokens-{hash_of(text.read_text(encoding='utf-8'))}"

    def run(self, flags: str, seed: int) -> Path:
        """The directory of a finished run with these flags: evaluated once, at its end."""
        flags = merged(QUIET, "--eval_steps 1000000", flags, f"--seed {seed}")
        place = self.runs / f"{self.recipe}-{hash_of(f'{self.tokens.name} {flags}')}"
        argv = [self.recipe, "--text_files", str(self.text), "--data_dir", str(self.tokens), *flags.split()]
        return grown(place, lambda: load_recipe("pretrain", argv))

    def losses(self, flags: str) -> list[float]:
        """The loss of each seed at the end of its run."""
        return [read_metrics(self.run(flags, seed))[-1]["eval_loss"] for seed in self.seeds]


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def merged(*lines: str) -> str:
    """Flags of several lines as one, a later value in the place of an earlier one."""
    values: dict[str, list[str]] = {}
    for line in lines:
        name = None
        for word in line.split():
            if word.startswith("--"):
                name = word
                values[name] = []
            elif name is None:
                raise UserError(f"flags={line!r}: must begin with a flag, as in --max_steps 100")
            else:
                values[name].append(word)
    return " ".join(" ".join([name, *given]) for name, given in values.items())


def training_part(text: Path, folder: Path, share: float = 1.0) -> Path:
    """The first `share` of the nine tenths that are trained on, as a text of its own, whose last tenth is held out."""
    characters = text.read_text(encoding="utf-8")
    path = folder / f"training-part-{share}.txt"
    path.write_text(characters[: int(share * int(0.9 * len(characters)))], encoding="utf-8")
    return path


# ---- figures


def summary(losses: list[float]) -> dict:
    """Mean and standard deviation of losses, and each of them."""
    figures = {"mean": statistics.mean(losses), "deviation": statistics.stdev(losses)}
    return {name: round(value, 4) for name, value in figures.items()} | {"losses": [round(loss, 4) for loss in losses]}


def paired(losses: list[float], base: list[float]) -> dict:
    """The mean difference of losses seed by seed, and its standard error."""
    differences = [a - b for a, b in zip(losses, base, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return {"difference": round(statistics.mean(differences), 4), "standard_error": round(error, 4)}


def p_value(losses: list[float], mark: float) -> float:
    """How likely losses this far under the mark are, were their mean above it: a one-sided t-test."""
    freedom = len(losses) - 1
    t = (statistics.mean(losses) - mark) / (statistics.stdev(losses) / len(losses) ** 0.5)
    # Student's density with t = sqrt(freedom) tan(angle) is a power of the cosine
    angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    return float(density[angles < math.atan(t / freedom**0.5)].sum() / density.sum())


def steps_to(mark: float, steps: list[int], losses: list[float]) -> float | None:
    """Where the loss as a function of the logarithm of a run's steps comes to the mark; None where it does not."""
    points = list(zip(map(math.log, steps), losses, strict=True))
    for (x, above), (x_next, under) in itertools.pairwise(points):
        if above > mark >= under:
            return round(math.exp(x + (x_next - x) * (above - mark) / (above - under)), 1)
    return None


@torch.no_grad()
def ensemble_loss(runs: list[Path], tokens: Path, batch_size: int = 32) -> float:
    """The loss of the mean of the models' probabilities, over the whole validation split."""
    models = [load_causal_lm(str(run)) for run in runs]
    rows = EvaluationRows(load_corpus(tokens).tokens("validation"), models[0].config.max_position_embeddings)
    nats = counted = 0.0
    for start in range(0, len(rows), batch_size):
        batch = collate_rows(rows.__getitems__(range(start, min(start + batch_size, len(rows)))))
        log_shares = [model(batch["input_ids"], use_cache=False).logits.float().log_softmax(-1) for model in models]
        mean = torch.stack(log_shares).logsumexp(0) - math.log(len(models))
        labels = batch["shift_labels"].flatten()
        nats += torch.nn.functional.nll_loss(mean.flatten(0, 1), labels, reduction="sum").item()
        counted += (labels != IGNORED).sum().item()
    return nats / counted


# ---- tracks


def time_track(flags: argparse.Namespace, workspace: Path) -> dict:
    """Wall seconds of whole processes, nanoGPT's beside ours, and how sure it is that the mean loss is at the mark."""
    acorn, losses = Acorn(flags.text, workspace), []
    seeds = iter(range(FIRST_SEED, FIRST_SEED + flags.seeds))
    acorn.prepare(flags.recipe)  # as nanoGPT's prepare.py has

    def ours() -> float:
        rows, seconds = acorn.pretrain(flags.recipe, merged(flags.flags, f"--seed {next(seeds)}"))
        losses.append(min(row["eval_loss"] for row in rows))
        return seconds

    contenders = [ours]
    if flags.nanogpt is not None:
        nanogpt = NanoGPT(flags.nanogpt, flags.text, workspace)
        contenders.append(lambda: nanogpt.train(WHOLE)[1])
    seconds, *theirs = alternate(flags.seeds, *contenders)
    figures = summary(losses) | {"mark": MARK, "p_value": p_value(losses, MARK), "seconds": rounded(seconds)}
    if theirs:
        ratios = [a / b for a, b in zip(seconds, theirs[0], strict=True)]
        figures |= {"nanogpt_seconds": rounded(theirs[0]), "nanogpt_loss": nanogpt.validation_loss()}
        figures |= {"time_ratio": round(statistics.median(ratios), 4)}
    return figures | {"median_seconds": round(statistics.median(seconds), 2)}


def rounded(seconds: list[float]) -> list[float]:
    return [round(value, 2) for value in seconds]


def data_track(flags: argparse.Namespace, workspace: Path) -> dict:
    """The losses of the seeds, and that of their ensemble."""
    text = training_part(flags.text, flags.runs) if flags.tune else flags.text
    board = Board(text, flags.recipe, flags.runs, flags.seeds)
    figures = summary(board.losses(flags.flags)) | {"measured_on": "training part" if flags.tune else "validation"}
    runs = [board.run(flags.flags, seed) for seed in board.seeds]
    return figures | {"ensemble": round(ensemble_loss(runs, board.tokens), 4)}


def optimizer_track(flags: argparse.Namespace, workspace: Path) -> dict:
    """For each contender the losses of its runs of so many steps, and the steps of each seed to the mark."""
    contenders, all_steps = CONTENDERS | named(flags.contender), sorted(set(flags.steps))
    if missing := [name for name in flags.only or () if name not in contenders]:
        raise unknown("contender", missing[0], contenders)
    board, figures = Board(training_part(flags.text, flags.runs), flags.recipe, flags.runs, flags.seeds), {}
    for name in tqdm(flags.only or contenders, unit="contender"):
        lines = [merged(flags.flags, contenders[name], f"--max_steps {steps}") for steps in all_steps]
        losses = [board.losses(line) for line in lines]  # of each number of steps, by seed
        crossed = [steps_to(flags.mark, all_steps, list(own)) for own in zip(*losses, strict=True)]
        reached = [steps for steps in crossed if steps is not None]
        figures[name] = {"flags": contenders[name], "steps_to_mark": crossed, "reached": len(reached)}
        figures[name] |= {str(steps): summary(found) for steps, found in zip(all_steps, losses, strict=True)}
        if reached:
            figures[name]["mean_steps"] = round(statistics.mean(reached), 1)
    return {"mark": flags.mark, "contenders": figures}


def screen(flags: argparse.Namespace, workspace: Path) -> dict:
    """Each set of flags against none, seed by seed."""
    ingredients = named(getattr(flags, "try"))  # a malformed one is refused before anything is trained
    share, held_out = REPEATED if flags.repeated else (1.0, "")
    board = Board(training_part(flags.text, flags.runs, share), flags.recipe, flags.runs, flags.seeds)
    common, figures = merged(held_out, flags.flags), {}
    base = board.losses(common)
    for name, line in tqdm(ingredients.items(), unit="ingredient"):
        losses = board.losses(merged(common, line))
        figures[name] = {"flags": line} | paired(losses, base) | summary(losses)
    return {"base": {"flags": flags.flags} | summary(base), "repeated": flags.repeated, "ingredients": figures}


def named(lines: list[str]) -> dict[str, str]:
    """Name to flags, from lines of the form "NAME: --flag value"."""
    if bad := [line for line in lines if not line.partition(":")[2].strip().startswith("--")]:
        raise UserError(f'{bad[0]!r}: give a name and flags, as in "decay: --weight_decay 0.3"')
    return {name.strip(): flags.strip() for name, _, flags in (line.partition(":") for line in lines)}


TRACKS = {"time": time_track, "data": data_track, "optimizer": optimizer_track, "screen": screen}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the track that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tracks = parser.add_subparsers(dest="track", required=True)
    parsers = {name: tracks.add_parser(name, help=track.__doc__.splitlines()[0]) for name, track in TRACKS.items()}
    for name, track in parsers.items():
        recipe = "shakespeare-char-fast" if name == "data" else "shakespeare-char-cpu-fast"
        track.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare")
        track.add_argument("--recipe", default=recipe, help="default: %(default)s")
        track.add_argument("--flags", default="", help="more flags of acorn pretrain, for every run")
        track.add_argument(
            "--seeds", type=int, default=3 if name in ("data", "screen") else 8, help="default: %(default)s"
        )
        if name != "time":
            track.add_argument("--runs", type=Path, required=True, help="where runs are kept, and found again")
    parsers["time"].add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parsers["data"].add_argument("--tune", action="store_true", help="on the last tenth of the training part")
    parsers["optimizer"].add_argument("--mark", type=float, required=True, help="the loss to come to")
    parsers["optimizer"].add_argument("--steps", type=int, nargs="+", required=True, help="of a run, in any order")
    parsers["optimizer"].add_argument("--contender", action="append", default=[], help='another: "NAME: --flag value"')
    parsers["optimizer"].add_argument("--only", nargs="+", help="these contenders alone")
    parsers["screen"].add_argument("--try", action="append", default=[], required=True, help='"NAME: --flag value"')
    parsers["screen"].add_argument("--repeated", action="store_true", help="30,000 characters, many times over")
    flags = parser.parse_args(argv)
    flags.flags = merged(flags.flags)
    if not flags.text.is_file():
        raise UserError(f"text={str(flags.text)!r}: there is no such file")
    if flags.seeds < 2:
        raise UserError(f"seeds={flags.seeds}: a spread needs at least 2")
    return flags


def main(argv: list[str] | None = None) -> None:
    """Play a track and print its line."""
    quiet_libraries()
    flags = parse(argv)
    with tempfile.TemporaryDirectory() as temporary:
        flags.text = flags.text.absolute()
        if "runs" in flags:
            flags.runs = flags.runs.absolute()
            flags.runs.mkdir(parents=True, exist_ok=True)
        figures = TRACKS[flags.track](flags, Path(temporary))
    about = {"benchmark": "frontier", "track": flags.track, "recipe": flags.recipe, "flags": flags.flags}
    print(json.dumps(about | setting() | figures))


if __name__ == "__main__":
    run_main(main)
