"""What a run leaves behind beside the weights: loss.png, a sample, the model card, and what to type next."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from .callbacks import read_metrics


PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate")


def write_report(run_dir: Path, recipe, corpus, model, sample: str) -> None:
    """loss.png, sample.txt and README.md (the model card) in `run_dir`, from its metrics.jsonl."""
    rows = read_metrics(run_dir)
    draw_losses(rows, run_dir / "loss.png", recipe.name)
    write_whole(run_dir / "sample.txt", sample)
    write_whole(run_dir / "README.md", model_card(recipe, corpus, model, rows, sample))


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that no reader meets half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def draw_losses(rows: list[dict], path: Path, title: str) -> None:
    """Train and validation loss over steps, the learning rate below, as a PNG."""
    from matplotlib.figure import Figure  # half a second that only the end of a run needs

    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for key, label in (("train_loss", "train"), ("eval_loss", "validation")):
        points = [(row["step"], row[key]) for row in rows if row[key] is not None]
        losses.plot(*zip(*points, strict=True), marker=".", label=label) if points else None
    best = min(rows, key=lambda row: row["eval_loss"], default=None)
    if best:
        losses.axhline(best["eval_loss"], color="grey", linewidth=0.5)
        losses.set_title(f"{title}: best validation loss {best['eval_loss']:.4f} at step {best['step']:,}")
    losses.set_ylabel("loss (nats a token)")
    losses.legend()
    rates = [(row["step"], row["learning_rate"]) for row in rows if row["learning_rate"] is not None]
    rate.plot(*zip(*rates, strict=True), color="tab:green") if rates else None
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)


def model_card(recipe, corpus, model, rows: list[dict], sample: str) -> str:
    """The README.md of a run directory, with the Hub's metadata on top."""
    best = min(rows, key=lambda row: row["eval_loss"]) if rows else {}
    splits, parameters = corpus.manifest["splits"], model.num_parameters()
    licence = corpus.manifest.get("licence")
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [acorn, gpt]"]
    figures = [
        f"| {name} | {best[key]:,.4f} |"
        for name, key in (("validation loss (nats a token)", "eval_loss"), ("bits per byte", "bits_per_byte"))
        if key in best
    ]
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return "\n".join(
        [
            "---",
            *metadata,
            "---",
            "",
            f"# {recipe.name}",
            "",
            f"A GPT of {parameters:,} parameters, grown from scratch by [Acorn](https://pypi.org/project/acorn-gpt/).",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            'write = pipeline("text-generation", "PATH-OR-ID-OF-THIS-DIRECTORY", trust_remote_code=True)',
            f"print(write({json.dumps(recipe.sample.get('prompt', 'Once'))}, max_new_tokens=100)[0]['generated_text'])",
            "```",
            "",
            "## Data",
            "",
            f"Source: `{source_line(recipe)}`" + (f", licence {licence}." if licence else "."),
            f"Train {splits['train']['tokens']:,} tokens, validation {splits['validation']['tokens']:,} tokens; "
            f"vocabulary {corpus.manifest['vocab_size']:,}.",
            "",
            "## Results",
            "",
            "| on the whole validation split | |",
            "| --- | --- |",
            *figures,
            "",
            (
                f"Best at step {best['step']:,} after {best['tokens']:,} tokens, "
                f"{best['seconds']:,.0f} s into the run.\n\n![loss](loss.png)"
                if best
                else "The run ended before its first evaluation."
            ),
            "",
            "## Training",
            "",
            f"Command: `{recipe.command}`",
            "",
            f"{versions}; Python {platform.python_version()}. All arguments are in `recipe.yaml`.",
            "",
            "## Sample",
            "",
            *(f"    {line}" for line in sample.splitlines()),
            "",
        ]
    )


def source_line(recipe) -> str:
    """Where the text came from, in one line."""
    data = recipe.data
    if data.get("mixture"):
        return "a mixture of " + ", ".join(str(entry) for entry in data["mixture"])
    named = data.get("text_files") or data.get("data_files") or [data.get("dataset") or data.get("data_dir")]
    return ", ".join(str(name) for name in named)


def next_steps(run_dir: Path, prompt: str) -> str:
    """What a person can type now."""
    return "\n".join(
        [
            f"The model is in {run_dir} (best validation loss at the root). Next:",
            f"  acorn generate {run_dir} --prompt {json.dumps(prompt)}",
            f"  acorn evaluate {run_dir}",
            f"  acorn resume {run_dir} --max_steps …",
        ]
    )
