"""The model card: what a directory says of itself, with metadata that the Hub's validators take."""

import json
import math
import platform
import textwrap
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config.publishing import NOT_CHOSEN, check_language, check_license, is_hub_id
from ..system.errors import UserError, one_line
from ..system.files import write_whole

# Stands in a card for the name that the model is loaded by; `acorn push` puts the repository's id in its place.
NAME_PLACEHOLDER = "PATH-OR-ID-OF-THIS-DIRECTORY"
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "peft")
# our name: (the Hub's metric type, in words, how it is shown)
METRICS = {
    "loss": ("loss", "loss (nats a token)", "{:.4f}"),
    "perplexity": ("perplexity", "perplexity", "{:.3f}"),
    "bits_per_byte": ("bits_per_byte", "bits per byte", "{:.4f}"),
    "token_accuracy": ("accuracy", "token accuracy", "{:.4f}"),
}


@dataclass
class CardFacts:
    """What a card says; `name` and `about` are needed, and what is left empty is left out.

    about: a sentence or two on what the model is. base_model: Hub id or path of what was finetuned. datasets: names of
    data sets, of which Hub ids reach the metadata. text: what the text is called. data: Markdown on the text, its
    licence and its size. metrics: measured on `evaluated_on`, by the names in METRICS; metrics_before: the same before
    finetuning. results: Markdown below the table of metrics. needs_remote_code: the directory, or an adapter's base,
    brings its own code. tokenizer: where it is, if not in the directory. max_new_tokens: what the example writes.
    limits: a Markdown sentence each, added to those that hold for every model of this kind.
    """

    name: str
    about: str
    license: str | None = None
    language: list[str] = field(default_factory=list)
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    text: str = "text"
    library_name: str = "transformers"
    tags: list[str] = field(default_factory=lambda: ["acorn", "gpt"])
    needs_remote_code: bool = False
    tokenizer: str = ""
    max_new_tokens: int = 100
    prompt: str = "Once"
    data: str = ""
    evaluated_on: str = "the validation split"
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_before: dict[str, float] = field(default_factory=dict)
    results: str = ""
    command: str = ""
    sample: str = ""
    limits: list[str] = field(default_factory=list)


TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ about }}

## Load it

```python
{% if library_name == "peft" -%}
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
{%- else -%}
from transformers import AutoModelForCausalLM, AutoTokenizer
{%- endif %}

name = "{{ placeholder }}"
tokenizer = AutoTokenizer.from_pretrained({{ tokenizer }}{{ trust }})
model = Auto{{ "Peft" if library_name == "peft" }}ModelForCausalLM.from_pretrained(name{{ trust }})
inputs = tokenizer({{ prompt }}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={{ max_new_tokens }}, do_sample=True, top_k=50)[0]))
```

With Acorn: `acorn generate {{ placeholder }}{{ " --trust_remote_code" if trust }}`.
{%- if trust %}

`trust_remote_code=True` because the modeling code travels with the weights: read it before you run it.
{%- endif %}
{%- for head, text in sections.items() if text %}

## {{ head }}

{{ text }}
{%- endfor %}
"""
LIMITS = [  # of every model of this kind
    "It continues text as its training text does, errors and prejudices included; nothing it says is checked.",
    "The figures are of one run with one seed.",
]
UNLICENSED = "Nobody has chosen a licence for these weights yet: ask their author before you use them."


def write_card(directory: Path, facts: CardFacts) -> None:
    """Write the card as the directory's README.md."""
    write_whole(directory / "README.md", model_card(facts))


def model_card(facts: CardFacts) -> str:
    """The card as Markdown below a block of metadata."""
    limits = facts.limits + LIMITS + [UNLICENSED] * ((facts.license or NOT_CHOSEN) == NOT_CHOSEN)
    packages = [f"{package} {version(package)}" for package in PACKAGES if find_spec(package)]
    versions = f"{', '.join(packages)}; Python {platform.python_version()}."
    command = f"```bash\n{facts.command}\n```\n\n{versions}\n\nAll arguments are in `recipe.yaml`."
    sections = {
        "Data": facts.data,
        "Results": "\n\n".join(part for part in (results_table(facts), facts.results) if part),
        "Training": command if facts.command else "",
        "Limits": "\n".join(f"- {limit}" for limit in limits),
        "Sample": textwrap.indent(facts.sample, "    ", lambda line: True).rstrip("\n"),
    }
    card = ModelCard.from_template(
        metadata(facts),
        template_str=TEMPLATE,
        placeholder=NAME_PLACEHOLDER,
        trust=", trust_remote_code=True" if facts.needs_remote_code else "",
        sections=sections,
        **vars(facts)
        | {
            "tokenizer": json.dumps(facts.tokenizer) if facts.tokenizer else "name",
            "prompt": json.dumps(facts.prompt or "Once"),
        },
    )
    return card.content + "\n"


def metadata(facts: CardFacts) -> ModelCardData:
    """What the Hub reads of a card; only names that can be Hub ids are given as ids, and only numbers as results."""
    check_license(facts.license)
    check_language(facts.language)
    datasets = [name for name in facts.datasets if is_hub_id(name)]
    base_model = facts.base_model if is_hub_id(facts.base_model) else None
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=facts.text[:200],
            dataset_split="validation",
            metric_type=METRICS.get(name, (name,))[0],
            metric_name=METRICS.get(name, ("", name))[1],
            metric_value=round(float(value), 6),
        )
        for name, value in facts.metrics.items()
        if value is not None and math.isfinite(value)
    ]
    return ModelCardData(
        license=facts.license or NOT_CHOSEN,
        language=facts.language or None,
        library_name=facts.library_name,
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=("adapter" if facts.library_name == "peft" else "finetune") if base_model else None,
        datasets=datasets or None,
        tags=facts.tags,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def add_results(text: str, name: str, results: list[EvalResult]) -> str:
    """A card with more results in its metadata; they take the place of the same figures from before.

    name: the model's, where the card has none yet. What else is in the card stays as it is. Raises UserError for
    metadata that cannot be read.
    """
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"README.md: the metadata on top cannot be read: {one_line(error)}") from error
    new = {_figure(result) for result in results}
    kept = [result for result in card.data.eval_results or [] if _figure(result) not in new]
    card.data.eval_results = kept + results
    card.data.model_name = card.data.model_name or name
    return card.content


def _figure(result: EvalResult) -> tuple:
    """What a result is of: the text or task, the metric, and how it was measured."""
    return (*result.unique_identifier, result.metric_type, str(result.metric_args))


def results_table(facts: CardFacts) -> str:
    """The measured figures as Markdown, beside those from before finetuning where there are any."""
    columns = [(name, *METRICS.get(name, (name, name, "{:.4f}"))) for name, v in facts.metrics.items() if v is not None]
    if not facts.metrics:
        return ""

    def row(values: dict[str, float]) -> list[str]:
        shown = ((values.get(name), form) for name, _, _, form in columns)
        return ["–" if value is None else form.format(value) for value, form in shown]

    lines = [[words for _, _, words, _ in columns], row(facts.metrics)]
    if facts.metrics_before:
        rows = {"": lines[0], "before": row(facts.metrics_before), "after": lines[1]}
        lines = [[label, *cells] for label, cells in rows.items()]
    lines.insert(1, ["---"] * len(lines[0]))
    return f"Measured on {facts.evaluated_on}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
