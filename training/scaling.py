"""The loss of a size that nobody has trained yet, from runs of smaller ones, by a power law in compute."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling import GPTConfig

from .config.depth import block_parameters
from .config.recipe import SOURCE_KEYS, Recipe, load_run_recipe
from .data.corpus import INPUTS, find_manifest, load_corpus, text_digest
from .data.sources import fingerprint_sources, named_sources
from .data.tokenizers import DEFAULT_BPE_VOCAB_SIZE, load_tokenizer, tokenizer_hash
from .share.metrics_file import read_metrics
from .system.addresses import each_text, public_name
from .system.checkpoints import is_finished, reading
from .system.errors import UserError
from .system.files import read_json, write_picture
from .system.shell import shell

FEWEST_SIZES = 3  # two unknowns, and one size more to see whether they fit
# Of the loss above its floor, in compute: 0.154 where tokens and parameters grow alike (arXiv 2203.15556), and what
# other fits of small and of large models found (arXiv 2001.08361, 2401.02954, 2404.10102), for the uncertainty.
EXPONENT, EXPONENTS = 0.154, (0.05, 0.1, 0.154, 0.2, 0.25)


@dataclass(frozen=True)
class Point:
    """A trained run: parameters of its blocks, tokens it was trained on, its last validation loss, and its text."""

    name: str
    parameters: int
    tokens: int
    loss: float
    data_dir: str | None = None

    @property
    def compute(self) -> float:
        """FLOPs of the blocks' matrices in training: 6 a parameter and token."""
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class Law:
    """loss = floor + scale * compute^-exponent."""

    floor: float
    scale: float
    exponent: float

    def loss(self, compute):
        return self.floor + self.scale * np.asarray(compute, dtype=float) ** -self.exponent


def fit(points: list[Point], exponent: float = EXPONENT) -> Law:
    """Least squares for floor and scale; the exponent is given, as a few runs cannot tell it from the floor."""
    powers = np.array([point.compute for point in points]) ** -exponent
    columns = np.stack([np.ones_like(powers), powers], axis=1)
    (floor, scale), *_ = np.linalg.lstsq(columns, np.array([point.loss for point in points]), rcond=None)
    return Law(float(floor), float(scale), exponent)


def predict(points: list[Point], compute: float) -> tuple[float, float, float]:
    """(loss, the lowest and the highest) at so many FLOPs: the extremes over the exponents that others found."""
    losses = [float(fit(points, exponent).loss(compute)) for exponent in EXPONENTS]
    return float(fit(points).loss(compute)), min(losses), max(losses)


def misfit(points: list[Point]) -> float:
    """How far the runs lie from the law at most: far, where the smallest are too small for it."""
    law = fit(points)
    return max(abs(float(law.loss(point.compute)) - point.loss) for point in points)


def read_points(run_dirs: list[str]) -> list[Point]:
    """The runs that a law is fitted to; refuses those that are not finished, or not of one text and tokenizer."""
    points = [read_point(Path(name)) for name in run_dirs]
    if not points:
        return points
    sizes = {point.compute for point in points}
    if len(sizes) < FEWEST_SIZES:
        raise UserError(f"from_runs: {len(sizes)} sizes are too few for a fit; name finished runs of {FEWEST_SIZES}")
    inputs = read_json(Path(run_dirs[0], INPUTS))
    for name in run_dirs[1:]:
        refuse_unlike(name, run_dirs[0], inputs)
    return points


def refuse_unlike(run_dir: str, other: str, inputs: dict) -> None:
    """Refuse a run that was not grown from the inputs of another, as far as both are known."""
    held = read_json(Path(run_dir, INPUTS))
    changed = next((what for what in inputs if what in held and held[what] != inputs[what]), None)
    if changed is not None:
        raise UserError(f"from_runs: {changed} of {run_dir} is not that of {other}: their losses do not compare")


def refuse_other_text(recipe: Recipe, run_dirs: list[str]) -> None:
    """Refuse runs of another text or tokenizer than a recipe names, as far as that is known before it is prepared."""
    data = recipe.data_arguments()
    if find_manifest(data.data_dir) and not named_sources(data):
        prepared = load_corpus(data.data_dir).inputs
        for run_dir in run_dirs:
            refuse_unlike(run_dir, f"data_dir={data.data_dir}", prepared)
        return
    asked = text_in_words(data)
    for run_dir in run_dirs:
        held = text_in_words(load_run_recipe(Path(run_dir)).data_arguments())
        others = [key for key in asked if key in held and asked[key] != held[key]]
        for key in sorted(others, key=lambda key: asked[key] is None):  # what the recipe names says most
            if not has_contents(key, data, read_json(Path(run_dir, INPUTS))):
                what = f"{key}={asked[key]!r} of {recipe.name} is {held[key]!r} in {run_dir}"
                raise UserError(f"from_runs: {what}: their losses do not compare; name the runs' own")


def text_in_words(data) -> dict:
    """What data arguments, or the prepared tokens that they name instead, say of a text and its tokenizer."""
    sources, manifest = named_sources(data), find_manifest(data.data_dir)
    if sources:
        words = {key: each_text(getattr(data, key), public_name) or None for key in SOURCE_KEYS}
        words |= {"dataset_config": data.dataset_config, "dataset_split": data.dataset_split}
        tokenizer, size = data.tokenizer, data.tokenizer_vocab_size
    elif manifest:
        sources, words = [manifest["sources"]["kind"]], {}
        tokenizer, size = manifest["tokenizer"]["name"], manifest["tokenizer_choice"].get("vocab_size")
    else:
        return {}
    words |= {"kind of source": sources[0], "tokenizer": tokenizer}
    return words | ({"tokenizer_vocab_size": size or DEFAULT_BPE_VOCAB_SIZE} if tokenizer == "bpe" else {})


def has_contents(key: str, data, inputs: dict) -> bool:
    """Whether files of this disk, under another name, are what a run was grown from."""
    if key in ("text_files", "data_files") and getattr(data, key):
        return text_digest(fingerprint_sources(data)) == inputs.get("the text")
    is_folder = key == "tokenizer" and Path(data.tokenizer).is_dir()
    return is_folder and tokenizer_hash(load_tokenizer(data.tokenizer)) == inputs.get("the tokenizer")


def read_point(run_dir: Path) -> Point:
    """What one run says of itself."""
    recipe, rows = load_run_recipe(run_dir), read_metrics(run_dir)
    steps = recipe.training.get("max_steps", -1)
    if not rows or rows[-1]["step"] < steps or not is_finished(run_dir):
        at = f"step {rows[-1]['step']:,}" if rows else "its beginning"
        raise UserError(f"from_runs: {run_dir} stopped at {at}; finish it with `{shell('acorn', 'resume', run_dir)}`")
    with reading(str(run_dir), "config.json"):
        config = GPTConfig.from_pretrained(run_dir)
    return Point(
        str(run_dir), block_parameters(config), rows[-1]["tokens"], rows[-1]["eval_loss"], recipe.data.get("data_dir")
    )


def draw_law(points: list[Point], compute: float, path: Path, truth: float | None = None) -> None:
    """The runs, the fitted law with its band, and the predicted loss, as a PNG; truth: the loss that it came to be."""
    from matplotlib.figure import Figure  # half a second that only a picture needs

    axes = (figure := Figure(figsize=(7, 5), layout="constrained")).subplots()
    ends = [point.compute for point in points] + [compute]
    xs = np.geomspace(min(ends), max(ends), 200)
    curves = np.array([fit(points, exponent).loss(xs) for exponent in EXPONENTS])
    law, (loss, low, high) = fit(points), predict(points, compute)
    axes.fill_between(xs, curves.min(axis=0), curves.max(axis=0), alpha=0.2, label="other exponents")
    axes.plot(xs, law.loss(xs), label=f"{law.floor:.3f} + {law.scale:.3g} / compute^{law.exponent}")
    axes.plot([point.compute for point in points], [point.loss for point in points], "o", label="runs")
    axes.errorbar([compute], [loss], [[loss - low], [high - loss]], fmt="s", label=f"predicted {loss:.4f}")
    if truth is not None:
        axes.plot([compute], [truth], "*", markersize=12, label=f"measured {truth:.4f}")
    axes.set(xscale="log", xlabel="FLOPs in the blocks", ylabel="validation loss (nats a token)")
    axes.legend()
    write_picture(path, figure)
