"""The one sampler: text from a model by generate(), past the context too."""

from collections.abc import Callable

import torch
from transformers.generation import BaseStreamer

from ..data.tokenizers import decode_continuation, encode_prompt
from ..system.errors import UserError
from ..system.ranges import check_number
from .hardware import context_of


class TextPrinter(BaseStreamer):
    """Hands the text after `prompt_ids` to `write` as it comes, over several generate() calls; `finish` ends it.

    Tokens are decoded together with those before them, which give them their spaces, and held back while a character
    is half there.
    """

    KEPT = 8  # tokens before the new ones that are decoded with them

    def __init__(self, tokenizer, prompt_ids: list[int], write: Callable[[str], object]):
        self.tokenizer, self.ids, self.write = tokenizer, list(prompt_ids), write
        self.written = len(self.ids)
        self.is_prompt_next = True

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt_next:  # generate() begins with what it was given
            self.is_prompt_next = False
            return
        self.ids += value.flatten().tolist()
        text = self._new_text()
        if not text.endswith("\ufffd"):
            self._write(text)

    def end(self) -> None:
        self.is_prompt_next = True  # generate() ends here, but the text may go on in the next window

    def finish(self) -> None:
        self._write(self._new_text())

    def _new_text(self) -> str:
        first = max(0, self.written - self.KEPT)
        return decode_continuation(self.tokenizer, self.ids[first:], self.written - first)

    def _write(self, text: str) -> None:
        self.written = len(self.ids)
        self.write(text)


def prompt_tensor(tokenizer, prompt: str, context_length: int) -> torch.Tensor:
    """Ids (1, tokens) of a prompt; refuses what the model cannot read whole."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        why = f"is not UTF-8 (at character {error.start})"
        raise UserError(f"prompt={prompt!r}: {why}; type it in UTF-8, or give it as FILE:path") from error
    ids = encode_prompt(tokenizer, prompt)
    if len(ids) > context_length:
        raise UserError(f"prompt: {len(ids)} tokens do not fit the model's context of {context_length}; shorten it")
    return torch.tensor([ids])


def stops_of(model) -> list[int]:
    """The tokens at which the model's text ends; models name none, one or several."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


@torch.no_grad()
def continue_ids(model, input_ids: torch.Tensor, max_new_tokens: int, streamer=None, **generation) -> torch.Tensor:
    """`input_ids`, (samples, tokens), with up to `max_new_tokens` more.

    Where the context is full the model goes on from its last half, as a person would reread; generation: transformers'
    generate() arguments. A sample ends at a token of `stops_of` and is filled with the first of them.
    """
    context, stops = context_left(model), stops_of(model)
    fill = stops[0] if stops else None
    ids, target = input_ids, input_ids.shape[1] + max_new_tokens
    has_ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    while ids.shape[1] < target and not has_ended.all():
        window = ids if ids.shape[1] < context else ids[:, -max(1, context // 2) :]
        new_tokens = min(max(1, context - window.shape[1]), target - ids.shape[1])
        grown = model.generate(
            window,
            attention_mask=torch.ones_like(window),
            max_new_tokens=new_tokens,
            streamer=streamer,
            pad_token_id=fill,
            **generation,
        )
        new = grown[:, window.shape[1] :]
        if stops:
            new = torch.where(has_ended, fill, new)
            has_ended |= torch.isin(new, torch.tensor(stops, device=new.device)).any(dim=1, keepdim=True)
        ids = torch.cat((ids, new), dim=1)
    return ids


def continuations(model, tokenizer, ids: torch.Tensor, start: int) -> list[str]:
    """The text of each row of ids, (samples, tokens), from `start` to where it ends."""
    texts, stops = [], set(stops_of(model))
    for row in ids.tolist():
        end = next((place for place in range(start, len(row)) if row[place] in stops), len(row))
        texts.append(decode_continuation(tokenizer, row[: end + 1], start))
    return texts


def context_left(model) -> int:
    """The context in tokens, less what the virtual tokens of a prompt or prefix adapter take of it."""
    adapter = getattr(model, "active_peft_config", None)
    return context_of(model.config) - (getattr(adapter, "num_virtual_tokens", 0) or 0)


def sampling_arguments(temperature: float, top_k: int | None, top_p: float | None, **more) -> dict:
    """generate()'s arguments; a temperature of 0 is greedy."""
    numbers = {"temperature": temperature, "top_k": top_k, "top_p": top_p, **more}
    for name, value in numbers.items():
        check_number(name, value)
    if temperature == 0:
        return {"do_sample": False, **more}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0, **more}


def sample_text(model, tokenizer, sample, seed: int, **more) -> str:
    """Prompt and continuation as `sample` (SampleArguments) says, leaving the random state as it was.

    more: transformers' generate() arguments.
    """
    ids = prompt_tensor(tokenizer, sample.prompt, context_left(model)).to(model.device)
    generation = sampling_arguments(sample.temperature, sample.top_k, sample.top_p, **more)
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        grown = continue_ids(model, ids, sample.max_new_tokens, **generation)
    model.train(was_training)
    return sample.prompt + continuations(model, tokenizer, grown, ids.shape[1])[0]
