"""The one sampler: text from a model by generate(), past the context too."""

from collections.abc import Callable

import torch
from transformers import TextStreamer

from .errors import UserError
from .hardware import context_of
from .tokenizers import encode_documents, tokenizer_kind


class TextPrinter(TextStreamer):
    """Hands finished pieces of text to `write`, over several generate() calls; `finish` flushes the rest."""

    def __init__(self, tokenizer, write: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)

    def end(self) -> None:
        # generate() ends here, but the text may go on in the next window.
        self.next_tokens_are_prompt = True

    def finish(self) -> None:
        super().end()


def encode_prompt(tokenizer, prompt: str, context_length: int) -> torch.Tensor:
    """Ids (1, tokens) of a prompt; an empty one starts a document. Refuses what the model cannot read whole."""
    if tokenizer_kind(tokenizer) == "char":
        ids = encode_documents(tokenizer, [prompt], ["the prompt"])[0].tolist()
    else:
        ids = tokenizer(prompt)["input_ids"] if prompt else []
    ids = ids or [first_id(tokenizer)]
    if len(ids) > context_length:
        raise UserError(f"prompt: {len(ids)} tokens do not fit the model's context of {context_length}; shorten it")
    return torch.tensor([ids])


def first_id(tokenizer) -> int:
    """What starts a document: the end-of-text token, else a line break (as in nanoGPT), else entry 0."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get("\n", vocabulary.get("Ċ", 0))  # Ċ: the line break in byte-level alphabets


@torch.no_grad()
def continue_ids(model, input_ids: torch.Tensor, max_new_tokens: int, streamer=None, **generation) -> torch.Tensor:
    """`input_ids`, (samples, tokens), with up to `max_new_tokens` more.

    Where the context is full the model goes on from its last half, as a person would reread; generation: transformers'
    generate() arguments. A sample ends at the end-of-text token and is filled with it.
    """
    context, eos = context_left(model), model.generation_config.eos_token_id
    ids, target = input_ids, input_ids.shape[1] + max_new_tokens
    while ids.shape[1] < target:
        window = ids if ids.shape[1] < context else ids[:, -max(1, context // 2) :]
        new_tokens = min(max(1, context - window.shape[1]), target - ids.shape[1])
        grown = model.generate(
            window,
            attention_mask=torch.ones_like(window),
            max_new_tokens=new_tokens,
            streamer=streamer,
            pad_token_id=eos,
            **generation,
        )
        new = grown[:, window.shape[1] :]
        if eos is not None:
            ended = (ids[:, input_ids.shape[1] :] == eos).any(dim=1, keepdim=True)
            new = torch.where(ended, eos, new)
        ids = torch.cat((ids, new), dim=1)
        if eos is not None and (ids[:, input_ids.shape[1] :] == eos).any(dim=1).all():
            break
    return ids


def context_left(model) -> int:
    """The context in tokens, less what the virtual tokens of a prompt or prefix adapter take of it."""
    adapter = getattr(model, "active_peft_config", None)
    return context_of(model.config) - (getattr(adapter, "num_virtual_tokens", 0) or 0)


def sampling_arguments(temperature: float, top_k: int | None, top_p: float | None, **more) -> dict:
    """generate()'s arguments; a temperature of 0 is greedy."""
    if temperature < 0:
        raise UserError(f"temperature={temperature}: must be 0 (greedy) or more")
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k={top_k}: must be 0 (all tokens) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1")
    if more.get("repetition_penalty", 1.0) <= 0:
        raise UserError(f"repetition_penalty={more['repetition_penalty']}: must be above 0 (1 changes nothing)")
    if temperature == 0:
        return {"do_sample": False, **more}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0, **more}


def sample_text(model, tokenizer, sample, seed: int) -> str:
    """Prompt and continuation as `sample` (SampleArguments) says, leaving the random state as it was."""
    ids = encode_prompt(tokenizer, sample.prompt, context_left(model)).to(model.device)
    generation = sampling_arguments(sample.temperature, sample.top_k, sample.top_p)
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        grown = continue_ids(model, ids, sample.max_new_tokens, **generation)[0]
    model.train(was_training)
    return sample.prompt + tokenizer.decode(grown[ids.shape[1] :], skip_special_tokens=True)
