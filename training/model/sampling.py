"""The one sampler: a prompt to ids, and text from a model by generate(), past the context too."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers.generation import BaseStreamer, GenerationConfig

from ..data.encoding import THE_PROMPT, encode_documents
from ..data.tokenizers import begin_ids
from ..system.errors import UserError, one_line
from ..system.flags import check_number
from .sizes import context_of

# ---- from text to ids and back


class Rendered(str):
    """Text that a chat template made: all its special tokens are spelled out, one that begins a text among them."""


def encode_prompt(tokenizer, text: str, name: str = THE_PROMPT) -> list[int]:
    """Ids of a text that is to be continued, the same that training makes of a document's beginning.

    Unlike in a document, special tokens that the text spells out are read as such. Nothing is put at the end; what a
    tokenizer puts at the beginning is put there, unless the text is Rendered. An empty one starts a document.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    if isinstance(text, Rendered) or any(token.special and token.content in text for token in added):
        ids = encode_spelled(tokenizer, text, name)["input_ids"]
    else:
        ids = encode_documents(tokenizer, [text], [name])[0].tolist()
    begin = [] if isinstance(text, Rendered) else begin_ids(tokenizer)
    ids = ids if ids[: len(begin)] == begin else begin + ids
    return ids or [first_id(tokenizer)]


def encode_spelled(tokenizer, text: str, name: str, **options) -> dict:
    """What the tokenizer makes of a text whose special tokens are spelled out; it adds none of its own."""
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
    except Exception as error:  # the only class that `tokenizers` raises
        raise UserError(f"{name}: the tokenizer cannot encode it ({one_line(error)})") from error


def decode_continuation(tokenizer, ids: list[int], start: int) -> str:
    """The text of `ids[start:]` after that of `ids[:start]`.

    Decoded as a whole and then cut: what is decoded alone loses its first space, or the half of a character.
    """
    plainly = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (tokenizer.decode(part, **plainly) for part in (ids[:start], ids))
    return whole[len(os.path.commonprefix((before, whole))) :]  # noqa: RUF071 (by characters, as it is meant)


def first_id(tokenizer) -> int:
    """What starts a document: the end-of-text token, else a line break (as in nanoGPT), else entry 0."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    return vocabulary.get("\n", vocabulary.get("Ċ", 0))  # Ċ: the line break in byte-level alphabets


# ---- sampling


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


def stop_tokens(model) -> list[int]:
    """The tokens at which the model's text ends; models name none, one or several."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


@contextmanager
def own_generation(model) -> Iterator[None]:
    """Let generate() take of the model's generation config the special tokens alone: how to sample is said here.

    A foreign one may hold what streaming cannot do, such as beams, or strings to stop at.
    """
    holder = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = holder.generation_config
    tokens = {name: getattr(kept, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    holder.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        holder.generation_config = kept


@torch.no_grad()
def continue_ids(model, input_ids: torch.Tensor, max_new_tokens: int, streamer=None, **generation) -> torch.Tensor:
    """`input_ids`, (samples, tokens), with up to `max_new_tokens` more.

    Where the context is full the model goes on from its last half, as a person would reread; generation: transformers'
    generate() arguments. A sample ends at a token of `stop_tokens` and is filled with the first of them.
    """
    context, stops = context_left(model), stop_tokens(model)
    fill = stops[0] if stops else None
    ids, target = input_ids, input_ids.shape[1] + max_new_tokens
    has_ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
    while ids.shape[1] < target and not has_ended.all():
        window = ids if ids.shape[1] < context else ids[:, -max(1, context // 2) :]
        new_tokens = min(max(1, context - window.shape[1]), target - ids.shape[1])
        with own_generation(model):
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
    texts, stops = [], set(stop_tokens(model))
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
