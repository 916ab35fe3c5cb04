"""What of a text a model reads when the text is longer than its context: the strategies of generate() see all of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import DynamicCache

from modeling.compat import CACHE_NAME

from .sizes import context_of, text_config


def has_learned_positions(model) -> bool:
    """Whether the model looks positions up in a table, which ends with its context (ours and GPT-2's; OPT adds two)."""
    context, tokens = context_of(model.config), model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return any(context <= table.num_embeddings < context + 8 for table in tables)


def rope_types(config) -> list[str]:
    """The kinds of scaling of a model's rotary positions: none, one, or one for each kind of layer."""
    parameters = getattr(text_config(config), "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [rope["rope_type"] for rope in each if "rope_type" in rope]


@contextmanager
def reading_windows(model, context: int) -> Iterator[None]:
    """Let generate() go past the model's context: the model is given a window of at most `context` tokens.

    generate() asks the model's `prepare_inputs_for_generation` for every forward pass; here that function is given the
    window alone. Beams, penalties and criteria of stopping know nothing of it, and see the whole text.
    """
    asked = asked_by_generate(model)
    had_own, whole = "prepare_inputs_for_generation" in vars(asked), asked.prepare_inputs_for_generation
    asked.prepare_inputs_for_generation = Window(model.config, whole, context)
    try:
        yield
    finally:
        if had_own:
            asked.prepare_inputs_for_generation = whole
        else:
            del asked.prepare_inputs_for_generation


def asked_by_generate(model):
    """Whose function generate() asks: of an adapter that adds virtual tokens PEFT's own, else the base's."""
    adapter = getattr(model, "active_peft_config", None)
    return model if adapter is None or adapter.is_prompt_learning else model.get_base_model()


class Window:
    """`prepare_inputs_for_generation` that reads at most `context` tokens of each row.

    Where a row is longer, its window begins anew at the last half of the context, as a person would reread, and the
    cache is filled again. Each row's window depends on that row alone, so that a batch writes what its rows would.
    """

    def __init__(self, config, prepare, context: int):
        self.config, self.prepare, self.context = config, prepare, context
        self.starts: list[int] | None = None  # where each row's window begins
        self.has_moved = False

    def __call__(self, input_ids, next_sequence_length=None, attention_mask=None, **kwargs) -> dict:
        """input_ids: (rows, tokens), the whole text. attention_mask: (rows, tokens), zero where a row is padded."""
        length = input_ids.shape[1]
        if self.starts is None:
            self.starts = [0] * len(input_ids) if attention_mask is None else (attention_mask == 0).sum(1).tolist()
        if any(length - start > self.context for start in self.starts):
            again = length - max(1, self.context // 2)
            self.starts = [again if length - start > self.context else start for start in self.starts]
            self.has_moved, next_sequence_length = True, None
            if kwargs.get(CACHE_NAME) is not None:
                kwargs[CACHE_NAME] = self._emptied(kwargs[CACHE_NAME])
        if self.has_moved:
            first = min(self.starts)
            starts = torch.tensor(self.starts, device=input_ids.device)[:, None]
            positions = torch.arange(first, length, device=input_ids.device) - starts
            is_padded = any(start != first for start in self.starts)
            input_ids, attention_mask = input_ids[:, first:], (positions >= 0).long() if is_padded else None
            if "position_ids" in kwargs:
                kwargs["position_ids"] = positions.clamp(min=0)
        return self.prepare(
            input_ids, next_sequence_length=next_sequence_length, attention_mask=attention_mask, **kwargs
        )

    def _emptied(self, cache):
        if isinstance(cache, DynamicCache):  # whose own reset() keeps the length, before transformers 5.18
            return DynamicCache(config=text_config(self.config))
        cache.reset()
        return cache
