"""What a finetuning run leaves to read: loss.png, the samples side by side, and the model card."""

import shutil
import textwrap
from pathlib import Path

from training.model.loading import load_config
from training.share.model_card import CardFacts
from training.share.report import data_section, metrics_of, sources_of
from training.system.shell import shell

from .data import Examples

WIDEST = 160


def card_facts(recipe, corpus, facts: dict, first: dict | None, best: dict) -> CardFacts:
    """What the model card says: the base and its figures before, the figures after, and both samples."""
    is_whole, card, base = facts["adapter"] == "full", recipe.card_arguments(), facts["base_model"]
    trained, total = facts["trained_parameters"], facts["parameters"]
    share = f"{trained:,} of {total:,} parameters ({trained / total:.2%})"
    about = (
        f"`{base}`, finetuned by Acorn: all {total:,} parameters trained."
        if is_whole
        else f"A {facts['adapter']} adapter for `{base}`, trained by Acorn: {share}."
    )
    before = {"Before": facts["sample_before"], "After": facts["sample_after"]}
    samples = "\n\n".join(f"{name}:\n\n{textwrap.indent(text, '    ')}" for name, text in before.items() if text)
    config = load_config(base, recipe.model_arguments().trust_remote_code)
    return CardFacts(
        name=recipe.name,
        about=about,
        license=card.license,
        language=card.language,
        base_model=base,
        base_model_relation="finetune" if is_whole else "adapter",
        datasets=sources_of(recipe),
        library_name="transformers" if is_whole else "peft",
        tags=["acorn", facts["adapter"]],
        needs_remote_code=bool(getattr(config, "auto_map", None)),
        prompt=facts["question"],
        data=data_section(sources_of(recipe), corpus.manifest) + _what_counts(corpus),
        evaluated_on="the held-out part of the data" + (", answers alone" if isinstance(corpus, Examples) else ""),
        metrics=metrics_of(best),
        metrics_before=metrics_of(first) if first else {},
        results=f"Best at step {best['step']:,}; {cost(facts)}.\n\n![loss](loss.png)"
        + (f"\n\nThe same prompt before and after:\n\n{samples}" if samples else ""),
        command=recipe.command,
        training="All arguments are in `recipe.yaml`.",
    )


def _what_counts(corpus) -> str:
    if not isinstance(corpus, Examples):
        return ""
    train = corpus.manifest["splits"]["train"]
    return f"\nThe loss is on the answers alone: {train['answer_tokens']:,} of the {train['tokens']:,} training tokens."


def cost(facts: dict) -> str:
    """Time and memory in words."""
    memory = f"{facts['peak_memory_bytes'] / 1e9:.2f} GB of {'GPU ' if facts['device'] == 'cuda' else ''}memory at most"
    return f"{facts['seconds']:,.0f} seconds, {memory}"


def summary(run_dir: Path, facts: dict, prompt: str) -> str:
    """The figures before and after, what they cost, and what to type next."""
    before, after = facts["perplexity_before"], facts["perplexity_after"]
    shown = f"{before:,.3f} before, {after:,.3f} after" if before else f"{after:,.3f} after"
    worse = before is not None and after >= before
    lines = [
        f"perplexity on held-out text: {shown} (step {facts['best_step']:,})"
        + ("; it did not get better: lower --learning_rate, or give more text" if worse else ""),
        f"{facts['trained_parameters']:,} of {facts['parameters']:,} parameters trained; {cost(facts)}",
        f"The {'model' if facts['adapter'] == 'full' else 'adapter'} is in {run_dir} (the best at the root). Next:",
        f"  {shell('acorn', 'generate', run_dir, prompt=prompt)}",
        f"  {shell('acorn', 'resume', run_dir)} --max_steps …",
    ]
    if facts["adapter"] not in ("full", "prompt", "prefix"):
        lines.append(f"  {shell('acorn', 'merge', run_dir, Path(f'{run_dir}-merged'))}")
    return "\n".join([*lines, f"  {shell('acorn', 'push', run_dir, 'YOU/NAME', '--dry_run')}"])


def side_by_side(before: str, after: str, width: int | None = None) -> str:
    """Two texts in two columns."""
    width = min(width or shutil.get_terminal_size((100, 24)).columns, WIDEST)
    column = max(20, (width - 3) // 2)
    left, right = ([line for text in side.splitlines() for line in _wrap(text, column)] for side in (before, after))
    height = max(len(left), len(right))
    pairs = zip(left + [""] * (height - len(left)), right + [""] * (height - len(right)), strict=True)
    heads = f"{'before':<{column}} │ after"
    rule = "─" * column + "─┼─" + "─" * column
    return "\n".join([heads, rule, *(f"{a:<{column}} │ {b}".rstrip() for a, b in pairs)])


def _wrap(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, drop_whitespace=False) or [""]
