"""Conversations and pairs → token ids, and which of them count in the loss: the assistant's answers alone."""

import copy
import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from training.data.encoding import encode_documents
from training.data.reading import log_once
from training.data.tokenizers import begin_ids
from training.model.sampling import encode_prompt, encode_spelled
from training.system.errors import UserError, one_line

from .chat_files import Conversation, Pair

RENDER_SECONDS = 5  # for one conversation: a template is a program, and may not end
RENDER_BYTES = 1 << 30  # which it may take in addition: `'x' * 10**10` would take all there is
# For tokenizers without a template of their own. It needs no new tokens: the end-of-text token ends an answer.
PLAIN_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- 'Assistant:' }}"
    "{%- generation %}{{- ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}"
    "{%- elif message['role'] == 'user' %}{{- 'User: ' + message['content'] | trim }}"
    "{%- elif message['role'] == 'system' %}{{- 'System: ' + message['content'] | trim }}"
    "{%- elif message['role'] == 'tool' %}{{- 'Tool: ' + message['content'] | trim }}"
    "{%- else %}{{- raise_exception('roles are system, user, assistant and tool') }}"
    "{%- endif %}"
    "{{- '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
)


class Example(NamedTuple):
    """ids: int64 [tokens]; counts: bool [tokens], those whose prediction is in the loss; where: file and line."""

    ids: np.ndarray
    counts: np.ndarray
    where: str


def with_template(tokenizer):
    """The tokenizer, with the plain template where it has none of its own."""
    if not tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        begin = tokenizer.decode(begin_ids(tokenizer))
        tokenizer.chat_template = f"{{{{- {begin!r} }}}}{PLAIN_TEMPLATE}" if begin else PLAIN_TEMPLATE
    return tokenizer


def render(tokenizer, messages: list[dict], where: str, add_generation_prompt: bool = False) -> str:
    """The text that the chat template makes of messages; what the template refuses is refused with file and line."""
    if any(message["role"] == "tool" for message in messages) and not knows_tools(tokenizer):
        messages = [message | {"role": "user"} if message["role"] == "tool" else message for message in messages]
    try:
        with at_most(RENDER_SECONDS), at_most_memory(RENDER_BYTES):
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TimeoutError:
        why = f"has not come to an end in {RENDER_SECONDS} seconds"
        raise UserError(f"{where}: the tokenizer's chat template {why}; give the tokenizer another") from None
    except Exception as error:  # a template is a program: what it raises is of every class
        raise UserError(f"{where}: the tokenizer's chat template refuses it: {one_line(error)}") from error


@functools.lru_cache(maxsize=8)
def knows_tools(tokenizer) -> bool:
    """Whether the chat template shows what a tool answers; where it does not, it is given as the user's turn."""
    turns = [("user", "a"), ("assistant", "b"), ("tool", "TOOL-TURN"), ("assistant", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        with at_most(RENDER_SECONDS), at_most_memory(RENDER_BYTES):
            shown = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # as in `render`
        shown = ""
    if "TOOL-TURN" in shown:
        return True
    log_once("the tokenizer's chat template has no turns of tools: they are given as the user's")
    return False


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, where the system has timers and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def at_most_memory(size: int) -> Iterator[None]:
    """Raise MemoryError in what takes more than `size` bytes in addition, on Linux."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (held + size, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def answer_spans(tokenizer, messages: list[dict], text: str, where: str) -> list[tuple[int, int]]:
    """Where in the rendered `text` each answer lies, (first, last + 1) in characters, its end-of-turn token included.

    An answer is what the template adds to the prompt before it; template text after the end-of-turn token is not.
    """
    specials = [token for token in tokenizer.all_special_tokens if token]
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:number], where, add_generation_prompt=True)
        after = render(tokenizer, messages[: number + 1], where)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{where}: the chat template rewrites earlier turns, so what is an answer cannot be told; "
                "give the tokenizer another chat_template"
            )
        answer = after[len(before) :]
        ends = [answer.rfind(token) + len(token) for token in specials if token in answer]
        spans.append((len(before), len(before) + (max(ends) if ends else len(answer))))
    return spans


def encode_messages(tokenizer, messages: list[dict], where: str) -> Example:
    """One conversation through the chat template, as `apply_chat_template` tokenizes it."""
    text = render(tokenizer, messages, where)
    spans = answer_spans(tokenizer, messages, text, where)
    encoded = encode_spelled(tokenizer, text, where, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    counts = np.zeros(len(starts), dtype=bool)
    for first, end in spans:
        counts |= (starts >= first) & (starts < end)
    return Example(np.array(encoded["input_ids"], dtype=np.int64), counts, where)


def encode_conversation(tokenizer, conversation: Conversation, limit: int) -> list[Example]:
    """The conversation as examples of at most `limit` predicted tokens each.

    One that is longer is split before a user's turn, as late as fits, and every part begins with the system message if
    there is one; a single exchange that does not fit is cut every `limit` tokens. Parts without an answer are left out.
    """
    where, messages = conversation
    whole = encode_messages(tokenizer, messages, where)
    if not whole.counts[1:].any():
        raise UserError(f"{where}: the tokenizer's chat template leaves no answer; give the tokenizer another")
    if len(whole.ids) <= limit + 1:
        return [whole]
    system = messages[:1] if messages[0]["role"] == "system" else []
    parts: list[list[dict]] = []
    for exchange in exchanges(messages[len(system) :]):
        longer = [*(parts[-1] if parts else []), *exchange]
        if parts and len(encode_messages(tokenizer, system + longer, where).ids) <= limit + 1:
            parts[-1] = longer
        else:
            parts.append(exchange)
    pieces = [piece for part in parts for piece in cut(encode_messages(tokenizer, system + part, where), limit)]
    return [piece for piece in pieces if piece.counts[1:].any()]


def exchanges(messages: list[dict]) -> list[list[dict]]:
    """The messages in groups that each begin with a user's turn."""
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    return [messages[start:end] for start, end in zip(starts, [*starts[1:], len(messages)], strict=True)]


def encode_pair(tokenizer, pair: Pair, limit: int) -> list[Example]:
    """Prompt, completion and the end-of-text token; the loss is on the last two. What is too long is cut.

    The two are tokenized apart, the prompt as it will be when the model is asked.
    """
    prompt = encode_prompt(tokenizer, pair.prompt, pair.where)
    completion = encode_documents(tokenizer, [pair.completion], [pair.where])[0]
    ids = np.concatenate((prompt, completion, [tokenizer.eos_token_id])).astype(np.int64)
    counts = np.arange(len(ids)) >= len(prompt)
    return [piece for piece in cut(Example(ids, counts, pair.where), limit) if piece.counts[1:].any()]


def cut(example: Example, limit: int) -> list[Example]:
    """Consecutive pieces of at most `limit` predicted tokens; the last token of one is the first of the next."""
    starts = range(0, max(1, len(example.ids) - 1), limit)
    return [
        Example(example.ids[at : at + limit + 1], example.counts[at : at + limit + 1], example.where) for at in starts
    ]


def preview(example: Example, tokenizer) -> str:
    """The example token by token, with a mark at those that count in the loss."""
    lines = [f"{example.where}: {len(example.ids)} tokens, {int(example.counts[1:].sum())} of them in the loss (●)", ""]
    for number, (token, counted) in enumerate(zip(example.ids.tolist(), example.counts, strict=True)):
        mark = "●" if counted and number else " "
        lines.append(f"  {number:>5}  {token:>7}  {mark}  {tokenizer.decode([token])!r}")
    return "\n".join(lines)
