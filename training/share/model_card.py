"""The model card: what a directory says of itself, with metadata that the Hub's validators take.

Pretraining, finetuning and `acorn push` share it: fill a `CardFacts`, then `write_card(directory, facts)` (or
`model_card(facts)` for the text alone).
"""

import json
import math
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..config.publishing import NOT_CHOSEN, check_language, check_license, is_hub_id
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

    about: a sentence or two on what the model is. base_model: Hub id or path of what was finetuned, with the Hub's word
    for the relation: finetune, adapter, merge or quantized. datasets: names of data sets, of which Hub ids reach the
    metadata. text: what the text is called. data: Markdown on the text, its licence and its size. metrics: measured on
    `evaluated_on`, by the names in METRICS; metrics_before: the same before finetuning. results, training: Markdown
    below the table of metrics and below the command. needs_remote_code: the directory, or an adapter's base, brings
    its own code. tokenizer: where it is, if not in the directory. max_new_tokens: what the
    example writes. limits: a Markdown sentence each, added to those that hold for every model of this kind.
    """

    name: str
    about: str
    license: str | None = None
    language: list[str] = field(default_factory=list)
    base_model: str | None = None
    base_model_relation: str | None = None
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
    training: str = ""
    sample: str = ""
    limits: list[str] = field(default_factory=list)


def write_card(directory: Path, facts: CardFacts) -> None:
    """Write the card as the directory's README.md."""
    write_whole(directory / "README.md", model_card(facts))


def model_card(facts: CardFacts) -> str:
    """The card as Markdown below a block of metadata."""
    sections = {
        "Load it": loading(facts),
        "Data": facts.data,
        "Results": "\n\n".join(part for part in (results_table(facts), facts.results) if part),
        "Training": training(facts),
        "Limits": "\n".join(f"- {limit}" for limit in [*facts.limits, *usual_limits(facts)]),
        "Sample": "\n".join(f"    {line}" for line in facts.sample.splitlines()),
    }
    body = [f"# {facts.name}", facts.about, *(f"## {head}\n\n{text}" for head, text in sections.items() if text)]
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def metadata(facts: CardFacts) -> ModelCardData:
    """What the Hub reads of a card; only names that can be Hub ids are given as ids."""
    check_license(facts.license)
    check_language(facts.language)
    results = evaluation_results(facts)
    base_model = facts.base_model if is_hub_id(facts.base_model) else None
    return ModelCardData(
        license=facts.license or NOT_CHOSEN,
        language=facts.language or None,
        library_name=facts.library_name,
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=facts.base_model_relation if base_model else None,
        datasets=[name for name in facts.datasets if is_hub_id(name)] or None,
        tags=facts.tags,
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def evaluation_results(facts: CardFacts) -> list[EvalResult]:
    """The measured metrics as entries of the `model-index`; what is no number is left out."""
    hub_ids = [name for name in facts.datasets if is_hub_id(name)]
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=hub_ids[0] if hub_ids else "text",
            dataset_name=facts.text[:200],
            dataset_split="validation",
            metric_type=METRICS[name][0] if name in METRICS else name,
            metric_name=METRICS[name][1] if name in METRICS else name,
            metric_value=round(float(value), 6),
        )
        for name, value in facts.metrics.items()
        if value is not None and math.isfinite(value)
    ]


def results_table(facts: CardFacts) -> str:
    """The measured figures as Markdown, beside those from before finetuning where there are any."""
    if not facts.metrics:
        return ""
    names = [name for name, value in facts.metrics.items() if value is not None]
    heads = [METRICS[name][1] if name in METRICS else name for name in names]
    rows = {"before": facts.metrics_before, "after": facts.metrics} if facts.metrics_before else {"": facts.metrics}
    lines = [["", *heads] if facts.metrics_before else heads]
    for label, values in rows.items():
        cells = [_shown(name, values.get(name)) for name in names]
        lines.append([label, *cells] if facts.metrics_before else cells)
    lines.insert(1, ["---"] * len(lines[0]))
    return f"Measured on {facts.evaluated_on}:\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(name: str, value: float | None) -> str:
    return "–" if value is None else METRICS.get(name, ("", "", "{:.4f}"))[2].format(value)


def loading(facts: CardFacts) -> str:
    """Python that loads the model and writes with it."""
    trust = ", trust_remote_code=True" if facts.needs_remote_code else ""
    kind = "AutoPeftModelForCausalLM" if facts.library_name == "peft" else "AutoModelForCausalLM"
    imports = (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        if facts.library_name == "peft"
        else "from transformers import AutoModelForCausalLM, AutoTokenizer"
    )
    flag = " --trust_remote_code" * facts.needs_remote_code
    tokenizer = json.dumps(facts.tokenizer) if facts.tokenizer else "name"
    why = (
        "\n\n`trust_remote_code=True` because the modeling code travels with the weights: read it before you run it."
        if facts.needs_remote_code
        else ""
    )
    return f"""```python
{imports}

name = "{NAME_PLACEHOLDER}"
tokenizer = AutoTokenizer.from_pretrained({tokenizer}{trust})
model = {kind}.from_pretrained(name{trust})
inputs = tokenizer({json.dumps(facts.prompt or "Once")}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={facts.max_new_tokens}, do_sample=True, top_k=50)[0]))
```

With Acorn: `acorn generate {NAME_PLACEHOLDER}{flag}`.{why}"""


def training(facts: CardFacts) -> str:
    """The command, the versions, and what the caller adds."""
    if not facts.command:
        return facts.training
    versions = [f"{package} {installed}" for package in PACKAGES if (installed := _version(package))]
    text = f"```bash\n{facts.command}\n```\n\n{', '.join(versions)}; Python {platform.python_version()}."
    return f"{text}\n\n{facts.training}".rstrip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usual_limits(facts: CardFacts) -> list[str]:
    """What holds for every model of this kind."""
    limits = [
        "It continues text as its training text does, errors and prejudices included; nothing it says is checked.",
        "The figures are of one run with one seed.",
    ]
    if (facts.license or NOT_CHOSEN) == NOT_CHOSEN:
        limits.append("Nobody has chosen a licence for these weights yet: ask their author before you use them.")
    return limits
