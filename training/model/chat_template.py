"""A tokenizer's chat template: from messages to the text that a model reads, in bounded time and memory."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from ..system.errors import UserError, log_once, one_line

RENDER_SECONDS = 5  # for one conversation: a template is a program, and may not end
RENDER_BYTES = 1 << 30  # which it may take in addition: `'x' * 10**10` would take all there is


def render_messages(
    tokenizer, where: str, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
) -> str:
    """The text that the chat template makes of messages; what the template refuses is refused with file and line.

    where: what a refusal names. tools: what the assistant may call, as JSON schemas.
    """
    if any(message["role"] == "tool" for message in messages) and not knows_tools(tokenizer):
        messages = [message | {"role": "user"} if message["role"] == "tool" else message for message in messages]
    try:
        with bounded():
            return tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except TimeoutError:
        why = f"has not come to an end in {RENDER_SECONDS} seconds"
        raise UserError(f"{where}: the tokenizer's chat template {why}; give the tokenizer another") from None
    except Exception as error:  # a template is a program: what it raises is of every class
        raise UserError(f"{where}: the tokenizer's chat template refuses it: {one_line(error)}") from error


@lru_cache(maxsize=8)
def end_of_turn(tokenizer) -> int | None:
    """The special token with which the chat template ends an answer; not every model's config says so of its text."""
    answer, text = "THE-ANSWER", ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    with suppress(UserError):  # of a template that takes no such chat, or of none
        text = render_messages(tokenizer, "a chat", turns)
    after = text.rpartition(answer)[2]
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
    places = {after.find(token.content): number for number, token in added if token.special and token.content in after}
    return places[min(places)] if places else None


@lru_cache(maxsize=8)
def knows_tools(tokenizer) -> bool:
    """Whether the chat template shows what a tool answers; where it does not, it is given as the user's turn."""
    turns = [("user", "a"), ("assistant", "b"), ("tool", "TOOL-TURN"), ("assistant", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    shown = ""
    with suppress(Exception), bounded():  # as in `render`
        shown = tokenizer.apply_chat_template(messages, tokenize=False)
    if "TOOL-TURN" not in shown:
        log_once("the tokenizer's chat template has no turns of tools: they are given as the user's")
    return "TOOL-TURN" in shown


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError or MemoryError in what takes more than a template may.

    The time is kept in the main thread where the system has timers, the memory on Linux.
    """

    def stop(*_):
        raise TimeoutError

    with ExitStack() as undo:
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            undo.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, stop))
            undo.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
        with suppress(ImportError, OSError):
            import resource

            held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
            soft, hard = before = resource.getrlimit(resource.RLIMIT_AS)
            limits = [size for size in (held + RENDER_BYTES, soft, hard) if size != resource.RLIM_INFINITY]
            undo.callback(resource.setrlimit, resource.RLIMIT_AS, before)
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        yield
