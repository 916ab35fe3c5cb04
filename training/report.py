"""What a run leaves behind beside the weights: loss.png, a sample, the model card, and what to type next."""

import json
import platform
from importlib.metadata import version
from pathlib import Path

from .callbacks import read_metrics
from .files import replace_whole, write_whole

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate")


def write_report(run_dir: Path, recipe, corpus, model, sample: str) -> None:
    """loss.png, sample.txt and README.md (the model card) in `run_dir`, from its metrics.jsonl."""
    rows = read_metrics(run_dir)
    draw_losses(rows, run_dir / "loss.png", recipe.name)
    write_whole(run_dir / "sample.txt", sample)
    write_whole(run_dir / "README.md", model_card(recipe, corpus, model, rows, sample))


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
    replace_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [acorn, gpt]
---

# {name}

A GPT of {parameters:,} parameters, grown from scratch by Acorn (`pip install acorn-gpt`).

```python
from transformers import pipeline

write = pipeline("text-generation", "PATH-OR-ID-OF-THIS-DIRECTORY", trust_remote_code=True)
print(write({prompt}, max_new_tokens=100)[0]["generated_text"])
```

## Data

Source: `{source}`{licence}.
Train {train_tokens:,} tokens, validation {validation_tokens:,} tokens; vocabulary {vocab_size:,}.

## Results

On the whole validation split, in non-overlapping windows:

{results}

## Training

Command: `{command}`

{versions}; Python {python}. All arguments are in `recipe.yaml`.

## Sample

{sample}
"""


def model_card(recipe, corpus, model, rows: list[dict], sample: str) -> str:
    """The README.md of a run directory, with the Hub's metadata on top."""
    splits, licence = corpus.manifest["splits"], corpus.manifest.get("licence")
    return CARD.format(
        name=recipe.name,
        parameters=model.num_parameters(),
        prompt=json.dumps(recipe.sample_arguments().prompt or "Once"),
        source=source_line(recipe),
        licence=f", licence {licence}" if licence else "",
        train_tokens=splits["train"]["tokens"],
        validation_tokens=splits["validation"]["tokens"],
        vocab_size=corpus.manifest["vocab_size"],
        results=results_table(rows),
        command=recipe.command,
        versions=", ".join(f"{package} {version(package)}" for package in PACKAGES),
        python=platform.python_version(),
        sample="\n".join(f"    {line}" for line in sample.splitlines()),
    )


def results_table(rows: list[dict]) -> str:
    """The best evaluation's figures as Markdown."""
    if not rows:
        return "The run ended before its first evaluation."
    best = min(rows, key=lambda row: row["eval_loss"])
    return (
        "| loss (nats a token) | bits per byte | step | tokens seen | seconds |\n| --- | --- | --- | --- | --- |\n"
        f"| {best['eval_loss']:.4f} | {best['bits_per_byte']:.4f} | {best['step']:,} | {best['tokens']:,} "
        f"| {best['seconds']:,.0f} |\n\n![loss](loss.png)"
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
