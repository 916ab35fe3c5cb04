"""What a run leaves behind beside the weights: loss.png, a sample, the model card, and what to type next."""

import math
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import SafetensorsParsingError

from ..config.recipe import Recipe, load_run_recipe
from ..data.sources import PYTHON_STDLIB, SYNTHETIC_CHAT
from ..model.loading import OUR_TYPES
from ..model.sampling import Rendered
from ..model.sizes import context_of
from ..system.addresses import public_name
from ..system.checkpoints import list_checkpoints, run_of, step_of
from ..system.errors import UserError, one_line
from ..system.files import read_json, write_picture
from ..system.shell import shell
from .metrics_file import read_metrics
from .model_card import CardFacts, model_card
from .uploads import is_own_file, weight_files

UNWRITTEN = "[More Information Needed]"  # what PEFT leaves to be filled in, in a card that nobody has written yet


def draw_losses(rows: list[dict], path: Path, title: str) -> None:
    """Train and validation loss over steps, the learning rate below, as a PNG."""
    from matplotlib.figure import Figure  # half a second that only the end of a run needs

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))

    def plot(axes, key: str, **style) -> None:
        points = [(row["step"], row[key]) for row in rows if row[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **style)

    plot(losses, "train_loss", marker=".", label="train")
    plot(losses, "eval_loss", marker=".", label="validation")
    plot(rate, "learning_rate", color="tab:green")
    if rows:
        best = min(rows, key=lambda row: row["eval_loss"])
        losses.axhline(best["eval_loss"], color="grey", linewidth=0.5)
        losses.set_title(f"{title}: best validation loss {best['eval_loss']:.4f} at step {best['step']:,}")
    losses.set_ylabel("loss (nats a token)")
    losses.legend()
    rate.set(xlabel="step", ylabel="learning rate")
    write_picture(path, figure)


# ---- the facts of a model card, read from the directory itself: at the end of a run, amid it, or long after it


def card_of(directory: Path) -> str:
    """The card that lies in a directory, or one made from what it holds where nobody has written any yet."""
    path = directory / "README.md"
    try:
        written = path.read_text(encoding="utf-8") if is_own_file(path, directory) else UNWRITTEN
        return model_card(facts_of(directory)) if UNWRITTEN in written else written
    except (SafetensorsParsingError, UnicodeDecodeError) as error:
        raise UserError(f"{directory} is damaged: {one_line(error)}; copy it again") from error


def facts_of(directory: Path) -> CardFacts:
    """The facts of a run, of one of its checkpoints, or of a directory that only holds a model."""
    run_dir = run_of(directory)
    if run_dir is None or (run_dir != directory and step_of(directory) < 0):
        return facts_of_model(directory)
    try:
        return facts_of_run(run_dir, directory)
    except UserError:  # a recipe of finetuning, which has other sections
        return facts_of_model(directory)


def facts_of_run(run_dir: Path, directory: Path | None = None) -> CardFacts:
    """The facts of what `acorn pretrain` grew, or of its checkpoint `directory`, with the figures of that step."""
    recipe, directory = load_run_recipe(run_dir), directory or run_dir
    data_dir, sources = recipe.data.get("data_dir"), sources_of(recipe)
    manifest = read_json(Path(data_dir, "manifest.json")) if data_dir else {}  # empty: it is on another machine
    rows = [row for row in read_metrics(run_dir) if directory == run_dir or row["step"] == step_of(directory)]
    best = recipe.best(rows)
    facts = facts_of_model(directory)
    facts.name = recipe.name if directory == run_dir else f"{recipe.name}, {directory.name}"
    start = recipe.model.get("model_name_or_path")
    begun = "from scratch" if start is None else f"from the weights of `{start}`"
    facts.about, facts.base_model = (
        f"A GPT of {count_parameters(directory):,} parameters, grown {begun} by Acorn.",
        start,
    )
    facts.license, facts.language = recipe.card_arguments().license, recipe.card_arguments().language
    facts.datasets, facts.text = datasets_of(recipe), ", ".join(sources)
    facts.prompt = recipe.sample_arguments().prompt or "\n"  # one that this vocabulary has
    facts.data = data_section(sources, manifest)
    facts.evaluated_on = "the whole validation split, in sequences that do not overlap"
    facts.results = "The run has not been evaluated yet."
    if best:
        facts.metrics = metrics_of(best)
        when = f"Measured at step {best['step']:,}, after {best['tokens']:,} tokens and {best['seconds']:,.0f} seconds."
        if best.get("mfu"):
            speed, share = best["tokens_per_second"], best["mfu"]
            when += f" Training took in {speed:,.0f} tokens a second, at {share:.1%} of the device's peak FLOP/s."
        facts.results = when + "\n\n![loss](loss.png)" * (run_dir / "loss.png").is_file()
    facts.command = recipe.command
    facts.limits.append(f"It was trained on {', '.join(f'`{source}`' for source in sources)} and knows nothing else.")
    if is_own_file(run_dir / "sample.txt", run_dir) and directory == run_dir:
        facts.sample = (run_dir / "sample.txt").read_text(encoding="utf-8")
    return facts


def facts_of_model(directory: Path) -> CardFacts:
    """What config.json and the weights say: enough for a card, with no figures and no claims."""
    if (directory / "adapter_config.json").is_file():
        return facts_of_adapter(directory)
    config = read_json(directory / "config.json")
    about = f"A causal language model (`{config.get('model_type')}`) of {count_parameters(directory):,} parameters."
    facts = CardFacts(directory.absolute().name, about, needs_remote_code=bool(config.get("auto_map")))
    context = context_of(config, None)
    facts.limits += [f"Its context is {context:,} tokens."] if context else []
    facts.max_new_tokens = fitting_length(context)
    facts.tags = ["acorn", "gpt"] if config.get("model_type") in OUR_TYPES else ["acorn"]
    return facts


def facts_of_adapter(directory: Path) -> CardFacts:
    """The same of an adapter: its kind and its base."""
    config = read_json(directory / "adapter_config.json")
    base, kind = str(config.get("base_model_name_or_path")), str(config.get("peft_type", "PEFT"))
    base_config = read_json(Path(base, "config.json"))
    return CardFacts(
        directory.absolute().name,
        f"An adapter ({kind}) of {count_parameters(directory):,} parameters for `{base}`.",
        base_model=base,
        library_name="peft",
        tags=["acorn", kind.lower()],
        needs_remote_code=bool(base_config.get("auto_map")),
        tokenizer="" if (directory / "tokenizer_config.json").is_file() else base,
        max_new_tokens=fitting_length(context_of(base_config, None)),
    )


def fitting_length(context: int | None) -> int:
    """How much a card's example may write: with learned positions more than the context is an error."""
    return min(100, context // 2) if context else 100


def count_parameters(directory: Path) -> int:
    """Numbers in the directory's safetensors files, tied ones counted once; the headers alone are read."""
    names = weight_files(directory, "model") + weight_files(directory, "adapter_model")
    paths = [directory / name for name in names if name.endswith(".safetensors") and (directory / name).is_file()]
    return sum(sum(get_local_safetensors_metadata(path).parameter_count.values()) for path in paths)


def sources_of(recipe: Recipe) -> list[str]:
    """Where the text came from: names of files, or ids of data sets."""
    names = []
    for part in recipe.data.get("mixture") or [recipe.data]:
        named = part.get("text_files") or part.get("data_files") or part.get("dataset") or []
        names += [public_name(str(name)) for name in (named if isinstance(named, list) else [named])]
    return names or [Path(str(recipe.data.get("data_dir"))).name]


def datasets_of(recipe: Recipe) -> list[str]:
    """The data sets among the sources, which may be on the Hub."""
    parts = recipe.data.get("mixture") or [recipe.data]
    return [part["dataset"] for part in parts if part.get("dataset") not in (None, PYTHON_STDLIB, SYNTHETIC_CHAT)]


def data_section(sources: list[str], manifest: dict) -> str:
    """Source, licence and sizes of the text."""
    licence = manifest.get("licence") or "not known to Acorn; ask the source before you pass the model on"
    lines = [f"Source: {', '.join(f'`{source}`' for source in sources)}.", f"Licence of the text: {licence}."]
    if manifest:
        train, validation = (manifest["splits"][split]["tokens"] for split in ("train", "validation"))
        vocabulary = f"vocabulary {manifest['vocab_size']:,}"
        lines.append(f"Train {train:,} tokens, validation {validation:,} tokens; {vocabulary}.")
    return "\n".join(lines)


def metrics_of(row: dict) -> dict[str, float]:
    """A line of metrics.jsonl as the card's metrics."""
    perplexity = math.exp(min(row["eval_loss"], 700))
    metrics = {"loss": row["eval_loss"], "perplexity": perplexity, "bits_per_byte": row["bits_per_byte"]}
    return metrics | ({"token_accuracy": row["token_accuracy"]} if row.get("token_accuracy") is not None else {})


def next_steps(run_dir: Path, prompt: str, step: int, what: str = "model", *more: tuple, **push: str) -> str:
    """What a person can type now, after `step` steps: of a chat, whose prompt is Rendered, to talk with it.

    more: the words of other commands; push: flags of the push.
    """
    chat = [shell("acorn", "chat", run_dir), shell("acorn", "serve", run_dir)]
    commands = [
        *(chat if isinstance(prompt, Rendered) else [shell("acorn", "generate", run_dir, prompt=prompt)]),
        shell("acorn", "evaluate", run_dir),
        *([shell("acorn", "resume", run_dir, max_steps=2 * step)] if list_checkpoints(run_dir) else []),
        *(shell("acorn", *words) for words in more),
        shell("acorn", "push", run_dir, "YOU/NAME", "--dry_run", **push),
    ]
    return "\n  ".join([f"The {what} is in {run_dir} (the best at the root). Next:", *commands])
