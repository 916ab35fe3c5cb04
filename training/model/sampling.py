"""The one sampler: a prompt to ids, and text from a model by generate(), past the context too."""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import Cache
from transformers.generation import BaseStreamer, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from modeling.compat import CACHE_NAME

from ..data.encoding import THE_PROMPT, encode_documents
from ..data.tokenizers import begin_ids
from ..system.errors import UserError, one_line
from ..system.flags import check_number
from .loading import without_adapter
from .sizes import context_of
from .windows import reading_windows

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
    return ids or [first_id(tokenizer, name)]


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


def first_id(tokenizer, name: str) -> int:
    """What starts a document: the end-of-text token, else a line break (as in nanoGPT); refused where there is none."""
    if tokenizer.eos_token_id is not None:
        return tokenizer.eos_token_id
    vocabulary = tokenizer.get_vocab()
    breaks = [vocabulary[token] for token in ("\n", "Ċ") if token in vocabulary]  # Ċ: in byte-level alphabets
    if not breaks:
        raise UserError(f"{name}: is empty, and the tokenizer has no token that starts a text; give some text")
    return breaks[0]


# ---- where a text ends

KEPT = 8  # tokens before the new ones that are decoded with them


def before_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of `stop_strings` in it, or all of it."""
    return text[: min((place for string in stop_strings if (place := text.find(string)) >= 0), default=len(text))]


def begun_stop(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of `stop_strings`."""
    lengths = (n for string in stop_strings for n in range(1, len(string)) if text.endswith(string[:n]))
    return max(lengths, default=0)


class StopStrings(StoppingCriteria):
    """Ends a row once its text after the first `start` tokens holds one of `stop_strings`, whatever tokens spell it.

    transformers' own StopStringCriteria also takes what begins in the prompt for one, and reads tokens as text apart
    from their neighbours.
    """

    def __init__(self, tokenizer, start: int, stop_strings: Sequence[str]):
        self.tokenizer, self.start, self.stop_strings = tokenizer, start, tuple(stop_strings)
        self.longest = max(len(string.encode()) for string in stop_strings)  # in tokens too: each holds a byte or more
        self.seen = start

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """input_ids: (rows, tokens). Returns (rows,), true where a row is to end."""
        first = max(self.start, self.seen - self.longest)
        left = max(0, first - KEPT)
        self.seen = input_ids.shape[1]
        ends = [self._ends(row, first - left) for row in input_ids[:, left:].tolist()]
        return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)

    def _ends(self, row: list[int], start: int) -> bool:
        text = decode_continuation(self.tokenizer, row, start)
        return before_stop(text, self.stop_strings) != text


class Stops(NamedTuple):
    """Texts that end a sample, and the tokenizer that reads its tokens."""

    tokenizer: Any
    strings: Sequence[str]

    def criteria(self, start: int) -> StoppingCriteriaList:
        """What tells generate() to stop at one after the first `start` tokens."""
        return StoppingCriteriaList([StopStrings(self.tokenizer, start, self.strings)])


class Sample(NamedTuple):
    """What was generated after a prompt."""

    text: str
    tokens: list[int]  # the end-of-text token, or those of a stop string, among them
    finish_reason: str  # as in OpenAI's protocol: "stop" at an end of text or a stop string, else "length"


def cut_sample(tokenizer, ids: list[int], start: int, ends: Sequence[int] = (), stop_strings=()) -> Sample:
    """What `ids[start:]` say up to the first token of `ends`, or before the first of `stop_strings`."""
    places = (place + 1 for place in range(start, len(ids)) if ids[place] in ends)
    end = next(places, None)
    whole = decode_continuation(tokenizer, ids[:end], start)
    text = before_stop(whole, stop_strings)
    if text == whole:
        return Sample(text, ids[start:end], "length" if end is None else "stop")

    def holds_stop(length: int) -> bool:
        text = decode_continuation(tokenizer, ids[:length], start)
        return before_stop(text, stop_strings) != text

    lengths = range(start + 1, len(ids[:end]) + 1)
    return Sample(text, ids[start : lengths[bisect_left(lengths, True, key=holds_stop)]], "stop")


# ---- sampling


class TextPrinter(BaseStreamer):
    """Hands the text after `prompt_ids` to `write` as it comes, over several generate() calls; `finish` ends it.

    Tokens are decoded together with those before them, which give them their spaces, and held back while a character
    is half there, or while one of `stop_strings` may be: the text ends before the first of those.
    """

    def __init__(self, tokenizer, prompt_ids: list[int], write: Callable[[str], object], stop_strings=()):
        self.tokenizer, self.ids, self.write = tokenizer, list(prompt_ids), write
        self.written = len(self.ids)
        self.is_prompt_next = True
        self.stop_strings, self._held, self._has_stopped = tuple(stop_strings), "", False

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
        if not self._has_stopped:
            self.write(self._held)
        self._held = ""

    def _new_text(self) -> str:
        first = max(0, self.written - KEPT)
        return decode_continuation(self.tokenizer, self.ids[first:], self.written - first)

    def _write(self, text: str) -> None:
        self.written = len(self.ids)
        if self._has_stopped:
            return
        self._held += text
        whole = before_stop(self._held, self.stop_strings)
        self._has_stopped = whole != self._held
        begun = 0 if self._has_stopped else begun_stop(whole, self.stop_strings)
        self._held = whole[len(whole) - begun :]
        self.write(whole[: len(whole) - begun])


def prompt_tensor(tokenizer, prompt: str, context_length: int | None, name: str = "prompt") -> torch.Tensor:
    """Ids (1, tokens) of a prompt; refuses what the model cannot read whole. name: how a refusal names it."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        why = f"is not UTF-8 (at character {error.start})"
        shown = f"prompt={prompt!r}" if name == "prompt" else name
        raise UserError(f"{shown}: {why}; type it in UTF-8, or give it as FILE:path") from error
    ids = encode_prompt(tokenizer, prompt, THE_PROMPT if name == "prompt" else name)
    if context_length is not None and len(ids) > context_length:
        raise UserError(f"{name}: {len(ids)} tokens do not fit the model's context of {context_length}; shorten it")
    return torch.tensor([ids])


def stop_tokens(model) -> list[int]:
    """The tokens at which the model's text ends; models name none, one or several."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


@contextmanager
def own_generation(model, ends: Sequence[int]) -> Iterator[None]:
    """Let generate() take of the model's generation config the special tokens alone: how to sample is said here.

    A foreign one may hold what streaming cannot do, such as beams, or strings to stop at. ends: in place of its
    end-of-text tokens.
    """
    holder = without_adapter(model)
    kept = holder.generation_config
    tokens = {"bos_token_id": kept.bos_token_id, "pad_token_id": kept.pad_token_id, "eos_token_id": list(ends) or None}
    holder.generation_config = GenerationConfig(**tokens)
    try:
        yield
    finally:
        holder.generation_config = kept


BEYOND_CONTEXT = ("window", "extrapolate")
DRAFTS = ("assistant_model", "prompt_lookup_num_tokens")  # generate()'s arguments for drafts, which it then verifies


@torch.no_grad()
def continue_ids(
    model,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    streamer=None,
    attention_mask: torch.Tensor | None = None,
    ends: Sequence[int] | None = None,
    stops: Stops | None = None,
    beyond_context: str = "window",
    make_cache: Callable[[int], Cache] | None = None,
    **generation,
) -> torch.Tensor:
    """`input_ids`, (rows, tokens), with up to `max_new_tokens` more.

    attention_mask: (rows, tokens), zero where a row is padded on the left. ends: the tokens that end a row, which is
    filled with the first of them; None: the model's own. stops: texts that end a row too. beyond_context: where the
    context is full the model goes on from its last half ("window"), or at positions it has not been trained on
    ("extrapolate"); one with a memory just goes on. make_cache: tokens to an empty cache that holds them; None:
    generate()'s own. generation: transformers' generate() arguments.
    """
    ends = stop_tokens(model) if ends is None else ends
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    settings = {"streamer": streamer, "pad_token_id": ends[0] if ends else None, **generation}
    context, length = context_left(model), input_ids.shape[1] + max_new_tokens
    fits = length + (generation.get("prompt_lookup_num_tokens") or 0) <= context
    if fits or beyond_context == "extrapolate" or reads_on(model, {"make_cache": make_cache, **generation}):
        reading = nullcontext()
    elif any(generation.get(name) is not None for name in DRAFTS):
        return continue_by_windows(model, input_ids, max_new_tokens, context, ends, stops, settings)
    else:
        reading = reading_windows(model, context)
    if make_cache is not None:
        settings[CACHE_NAME] = make_cache(length if isinstance(reading, nullcontext) else context)
    settings |= {"stopping_criteria": stops.criteria(input_ids.shape[1])} if stops else {}
    with own_generation(model, ends), reading:
        return model.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, **settings)


def continue_by_windows(
    model, ids: torch.Tensor, max_new_tokens: int, context: int, ends, stops: Stops | None, settings: dict
) -> torch.Tensor:
    """One row, (1, tokens), with up to `max_new_tokens` more, by calls of generate() that each stay in one window.

    For drafts: they are verified in one pass, and may not reach from one window into the next. Those of prompt lookup
    are not held to the length that is asked for; so a window's last tokens are written without them.
    """
    plain = {name: value for name, value in settings.items() if name not in DRAFTS}
    reach = settings.get("prompt_lookup_num_tokens") or 0
    prompt_length, least = ids.shape[1], settings.get("min_new_tokens") or 0
    target, start = prompt_length + max_new_tokens, 0
    while True:
        if ids.shape[1] - start > context:
            start = ids.shape[1] - max(1, context // 2)
        window = ids[:, start:]
        drafted = context + 1 - reach - window.shape[1]
        left = drafted if drafted > 0 else context + 1 - window.shape[1]
        asked = min(left, target - ids.shape[1])
        own = {"max_new_tokens": asked, "min_new_tokens": min(asked, max(0, least + prompt_length - ids.shape[1]))}
        own |= {"stopping_criteria": stops.criteria(max(0, prompt_length - start))} if stops else {}
        with own_generation(model, ends):
            mask = torch.ones_like(window)
            grown = model.generate(window, attention_mask=mask, **(settings if drafted > 0 else plain) | own)
        new = grown[:, window.shape[1] :]
        ids = torch.cat((ids, new), dim=1)
        if ids.shape[1] >= target or new.shape[1] < asked or int(new[0, -1]) in ends:
            return ids


def continuations(model, tokenizer, ids: torch.Tensor, start: int) -> list[str]:
    """The text of each row of ids, (samples, tokens), from `start` to where it ends."""
    return [cut_sample(tokenizer, row, start, stop_tokens(model)).text for row in ids.tolist()]


def context_left(model) -> int:
    """The context in tokens, less what the virtual tokens of a prompt or prefix adapter take of it."""
    adapter = getattr(model, "active_peft_config", None)
    return context_of(model.config) - (getattr(adapter, "num_virtual_tokens", 0) or 0)


def reads_on(model, generation: dict[str, Any]) -> bool:
    """Whether generate(), with these arguments, goes past the context by itself: with a memory of what came before."""
    others = any(generation.get(name) is not None for name in ("make_cache", "cache_implementation", *DRAFTS))
    return getattr(without_adapter(model).config, "memory_length", 0) > 0 and not others


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
