"""Drafts that the model verifies, several tokens a forward pass: a smaller run's, or what the text said before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from training.model.loading import load_model_and_tokenizer, without_adapter
from training.model.sampling import context_left
from training.model.sizes import text_config
from training.system.errors import UserError

from .strategies import STRATEGIES


def load_draft(name: str, model, tokenizer, values: dict[str, Any], **options):
    """The draft model of that name, which has the model's vocabulary; values: strategies by name.

    options: dtype and more of `load_model_and_tokenizer`'s. Raises UserError for another vocabulary.
    """
    draft, its_tokenizer = load_model_and_tokenizer(name, **options)
    own, its = tokenizer.get_vocab(), its_tokenizer.get_vocab()
    if own != its:
        differing = len(own.items() ^ its.items())
        raise UserError(
            f"assistant_model={name}: its vocabulary is another one ({differing} entries differ); take one that was "
            "trained with the model's tokenizer"
        )
    sizes = [text_config(each.config).vocab_size for each in (draft, model)]
    if sizes[0] != sizes[1]:
        raise UserError(f"assistant_model={name}: vocab_size={sizes[0]}, and the model's is {sizes[1]}; take another")
    asked = {key: value for key, value in values.items() if STRATEGIES[key].needs == "assistant"}
    draft.generation_config = GenerationConfig(**asked)  # where transformers looks for these
    return draft


def refuse_short_draft(name: str, draft, model, tokens: int) -> None:
    """Refuse a draft model that cannot read what the model does: `tokens`, or a window of them."""
    read, reads = min(tokens, context_left(model)), context_left(draft)
    if read > reads:
        raise UserError(
            f"assistant_model={name}: its context of {reads} tokens is shorter than the {read} that the model is to "
            "read; shorten --max_new_tokens, or take another"
        )


class Passes:
    """What drafts have saved: forward passes, and the tokens in them that were drafted and that were kept."""

    def __init__(self):
        self.passes = self.drafted = self.tokens = 0

    @property
    def accepted(self) -> int:
        return self.tokens - self.passes

    def __str__(self) -> str:
        rate = f" ({self.accepted / self.drafted:.0%})" if self.drafted else ""
        kept = f"{self.accepted} of {self.drafted} drafted tokens accepted{rate}"
        return f"drafts: {kept}; {self.tokens} tokens in {self.passes} forward passes"


@contextmanager
def counting_passes(model, passes: Passes) -> Iterator[None]:
    """Count the model's forward passes, and the tokens that are drafted in them."""
    base = without_adapter(model)

    def count(module, args, kwargs) -> None:
        passes.passes += 1
        passes.drafted += kwargs.get("logits_to_keep", 1) - 1  # of each drafted token, and of the one after them

    handle = base.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
