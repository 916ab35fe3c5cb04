"""The logits of any causal LM, a chunk of tokens at a time, so that those of a whole batch are never there at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from modeling.loss import CHUNK_ELEMENTS


def chunked_logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], num_labels: int, full_batch: int
) -> Iterator[torch.Tensor]:
    """Yield the logits of each row's last `num_labels` tokens, (tokens, vocabulary), row after row.

    The blocks run once over the whole batch; what follows them (head, softcap, scale) is the model's own code, run on a
    chunk of their states at a time. A model whose blocks cannot be run apart gets a few rows at a time instead. The
    number of forwards follows from `full_batch` rows and not from those that are here: sharded processes keep in step.
    """
    decoder = decoder_of(model)
    logits = full_batch * num_labels * (model if decoder is None else decoder).config.vocab_size
    pieces = -(-logits // chunk_elements(inputs["input_ids"].device))
    output = None if pieces == 1 or decoder is None else _output(model, decoder, inputs)
    if output is None:
        for rows, count in _few_rows(inputs, min(pieces, full_batch)):
            yield model(**rows, use_cache=False).logits[:count, -num_labels:].flatten(0, 1)
        return
    # Virtual tokens have been read by now: their wrapper would put them before each chunk again.
    has_virtual = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    head = model.get_base_model() if has_virtual else model
    for states in output.last_hidden_state[:, -num_labels:].flatten(0, 1).tensor_split(pieces):
        output.last_hidden_state = states[None]
        with _answering(decoder, output):
            yield head(input_ids=torch.zeros_like(states[None, :, 0], dtype=torch.long), use_cache=False).logits[0]


def chunk_elements(device: torch.device) -> int:
    """Logits of one chunk: on a CPU few enough for its caches, elsewhere enough to keep it busy."""
    return CHUNK_ELEMENTS // 8 if device.type == "cpu" else CHUNK_ELEMENTS


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The part of a causal LM that ends in hidden states, under an adapter too; None where there is none."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    return None if decoder is inner else decoder


def _few_rows(inputs: dict[str, torch.Tensor], pieces: int) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Yield (rows, how many of them count) `pieces` times; none is run as one that does not count."""
    split = {key: value.tensor_split(pieces) for key, value in inputs.items()}
    for index in range(pieces):
        count = len(split["input_ids"][index])
        yield {key: values[index] if count else inputs[key][:1] for key, values in split.items()}, count


def _output(model: nn.Module, decoder: nn.Module, inputs: dict[str, torch.Tensor]):
    """What the blocks give in one forward of the model, whose head sees a single token; None if it cannot be had."""
    found = []

    def shorten(module, args, output):
        states = getattr(output, "last_hidden_state", None)
        found.append((output, states))
        if states is not None:
            output.last_hidden_state = states[:1, :1]

    handle = decoder.register_forward_hook(shorten)
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    if len(found) != 1 or found[0][1] is None:
        return None
    output, output.last_hidden_state = found[0]
    return output


@contextmanager
def _answering(module: nn.Module, output) -> Iterator[None]:
    """Let a module's forward give `output`, whatever it is asked."""
    own = module.__dict__.get("forward")  # Accelerate puts its own there
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
