"""What a request of the OpenAI protocol may say: every field checked, and none that is read and ignored."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from training.model.sizes import text_config
from training.system.errors import UserError, unknown

from ..decoding.strategies import STRATEGIES, generate_arguments, read_all, refuse_unknown_ids, settle

INVALID = "invalid_request_error"  # the protocol's name for what the client can mend


class Refusal(Exception):
    """An answer that is an error: HTTP status, message, and the protocol's type, code and name of the field."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, kind: str = INVALID
    ):
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    def body(self) -> dict:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


MOST_ENTRIES = 1024  # of a list that every token is held against


class Kind(NamedTuple):
    """The values that a field takes: in words, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e38  # NaN is not


def _is_stops(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return 1 <= len(texts) <= 16 and all(isinstance(text, str) and 1 <= len(text) <= 1000 for text in texts)


def _is_bias(value: Any) -> bool:
    is_fit = isinstance(value, dict) and len(value) <= MOST_ENTRIES
    return is_fit and all(
        key.isascii() and key.isdigit() and len(key) < 12 and _is_number(bias) and -100 <= bias <= 100
        for key, bias in value.items()
    )


def _is_no_text(value: Any) -> bool:
    return not (isinstance(value, str) or (isinstance(value, list) and len(value) > MOST_ENTRIES))


NUMBER = Kind("a finite number", _is_number)
SEED = Kind("a whole number of 64 bits", lambda value: type(value) is int and -(2**63) <= value < 2**63)
PENALTY = Kind("a number from -2 to 2", lambda value: _is_number(value) and -2 <= value <= 2)
COUNT = Kind("a whole number above 0", lambda value: type(value) is int and value > 0)
TEXT = Kind("a text", lambda value: isinstance(value, str))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
STOPS = Kind("a text, or a list of 1 to 16 texts, of 1 to 1,000 characters each", _is_stops)
BIAS = Kind(f"an object of at most {MOST_ENTRIES} token ids and numbers from -100 to 100", _is_bias)
STREAM_OPTIONS = Kind(
    '{"include_usage": true} or false', lambda value: isinstance(value, dict) and set(value) <= {"include_usage"}
)
OBJECTS = Kind("a list of objects", lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value))
ANY = Kind("anything", lambda value: True)
NO_TEXT = Kind(f"no text, and no list of more than {MOST_ENTRIES} entries", _is_no_text)  # a flag's value is a text

# What `acorn generate` has beyond the protocol, under transformers' names (a client's `extra_body`).
NEITHER = ("do_sample", "temperature", "top_p", "max_new_tokens", "stop_strings", "num_beams", "num_return_sequences")
EXTRAS = {name: NO_TEXT for name, row in STRATEGIES.items() if row.needs in ("", "sampling") and name not in NEITHER}
# The fields of both kinds of request.
SHARED = {
    "model": TEXT,
    "stream": SWITCH,
    "stream_options": STREAM_OPTIONS,  # the usage comes with the last piece, asked for or not
    "max_tokens": COUNT,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "frequency_penalty": PENALTY,
    "presence_penalty": PENALTY,
    "logit_bias": BIAS,
    "stop": STOPS,
    "seed": SEED,
    # a client's own notes, without meaning for the text
    "user": TEXT,
    "metadata": ANY,
    "safety_identifier": ANY,
    "prompt_cache_key": ANY,
    **EXTRAS,
}
FIELDS = {
    "completions": {**SHARED, "prompt": ANY},
    "chat": {**SHARED, "messages": ANY, "max_completion_tokens": COUNT, "tools": OBJECTS},
}
# What the protocol has and this server has not: the values that ask for nothing.
ABSENT = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False, 0), "top_logprobs": (0,),
    "response_format": ({"type": "text"},), "tool_choice": ("auto",), "parallel_tool_calls": (True,),
    "modalities": (["text"],), "service_tier": ("auto", "default"), "store": (False,), "audio": (),
    "function_call": (), "functions": (), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (),
}  # fmt: skip
# What continuous batching does for each request; the rest it would do for all of them.
BATCHED = {"temperature", "top_p", "top_k"}
DRAWN = {*EXTRAS, "temperature", "top_p", "frequency_penalty", "presence_penalty", "logit_bias", "seed"}
LONGEST = 1024  # tokens of an answer whose request names no number


@dataclass
class Wish:
    """What a request wants drawn: at most so many tokens (None: as fit), by generate()'s arguments, up to a stop.

    penalties: the protocol's of frequency and presence. is_answer: in a chat. ends: the tokens that end it.
    """

    max_new_tokens: int | None = None
    generation: dict = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    seed: int | None = None
    penalties: tuple[float, float] = (0.0, 0.0)
    is_answer: bool = False
    ends: list[int] = field(default_factory=list)


# `transformers chat` says how to draw in one field, the JSON of a GenerationConfig: what the protocol calls otherwise.
PROTOCOL_NAMES = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}


def unfold(body: dict) -> dict:
    """The same request, where what a `generation_config` says is said by fields of its own."""
    rest = {name: value for name, value in body.items() if name != "generation_config"}
    if rest == body:
        return body
    try:
        said = json.loads(body["generation_config"])
        settings = {PROTOCOL_NAMES.get(name, name): value for name, value in said.items()}
    except (TypeError, ValueError, AttributeError) as error:
        message = "generation_config: must be the text of a JSON object"
        raise Refusal(400, message, "invalid_value", "generation_config") from error
    settings.pop("transformers_version", None)
    if settings.pop("do_sample", True) is False:
        settings["temperature"] = 0
    return {**settings, **rest}


def refuse_broken_text(body: dict) -> None:
    """Refuse halves of pairs of UTF-16, which JSON can spell and no UTF-8 can."""
    for name, value in body.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            name = name.encode("utf-8", "replace").decode()
            raise Refusal(400, f"{name}: holds half of a character, no UTF-8", "invalid_value", name) from error


def check_fields(body: dict, kind: str) -> dict:
    """The fields of a request that say something, each of its kind; Refusal for what is unknown, wrong or not there."""
    refuse_broken_text(body)
    given = {name: value for name, value in body.items() if value is not None}
    fields = FIELDS[kind]
    for name, value in given.items():
        if name in ABSENT:
            if not any(type(value) is type(none) and value == none for none in ABSENT[name]):
                raise Refusal(400, f"{name}: this server does not have it; leave it out", "unsupported", name)
        elif name not in fields:
            raise Refusal(400, str(unknown("field", name, fields)), "unknown_field", name)
        elif not fields[name].holds(value):
            raise Refusal(400, f"{name}={str(value)[:100]}: must be {fields[name].words}", "invalid_value", name)
    return {name: value for name, value in given.items() if name not in ABSENT}


def read_wish(given: dict, model, is_batched: bool) -> Wish:
    """What checked fields ask for; where they say nothing, it is to sample from all tokens at temperature 1."""
    for name in DRAWN - BATCHED if is_batched else ():
        if name in given:
            why = "continuous batching does this for no single request; leave it out, or serve without that flag"
            raise Refusal(400, f"{name}: {why}", "unsupported", name)
    stop, most = given.get("stop", []), given.get("max_completion_tokens", given.get("max_tokens"))
    try:
        generation = read_strategies(given, model, most or LONGEST)
    except UserError as error:
        name = re.match(r"\w*", str(error))[0]
        raise Refusal(400, str(error), "invalid_value", name if name in DRAWN else None) from error
    return Wish(
        max_new_tokens=most,
        generation=generation,
        stops=[stop] if isinstance(stop, str) else stop,
        seed=given.get("seed"),
        penalties=(given.get("frequency_penalty", 0.0), given.get("presence_penalty", 0.0)),
    )


def read_strategies(given: dict, model, most: int) -> dict:
    """generate()'s arguments, checked as those of `acorn generate`; at temperature 0 how to sample says nothing."""
    values = read_all({name: given[name] for name in (*EXTRAS, "temperature", "top_p") if name in given})
    if is_greedy := values.get("temperature") == 0:
        values = {name: value for name, value in values.items() if STRATEGIES[name].needs != "sampling"}
    values |= {"do_sample": not is_greedy, "max_new_tokens": most}
    values = settle(values, file={"top_k": 0})
    refuse_unknown_ids(values, model)
    generation, size = generate_arguments(values), text_config(model.config).vocab_size
    if given.get("logit_bias"):
        biases = {(int(token),): float(bias) for token, bias in given["logit_bias"].items()}
        if max(biases) >= (size,):
            raise UserError(f"logit_bias: the model has no token {max(biases)[0]}; its ids end with {size - 1}")
        generation["sequence_bias"] = biases
    return generation


def fit_context(wish: Wish, prompt_tokens: int, context_length: int) -> None:
    """Give the answer a length that fits the context with its prompt; Refusal where what is asked for does not."""
    room = context_length - prompt_tokens
    if room < (wish.max_new_tokens or 1):
        asked = f" and max_tokens={wish.max_new_tokens}" if wish.max_new_tokens else ""
        message = f"the model's context is {context_length} tokens, and the prompt has {prompt_tokens}{asked}"
        raise Refusal(
            400, f"{message}; shorten one of them", "context_length_exceeded", "max_tokens" if asked else None
        )
    wish.max_new_tokens = wish.max_new_tokens or min(LONGEST, room)


# ---- what the model is asked


def read_prompt(given: dict) -> str:
    """The one prompt of a completion."""
    prompt = given.get("prompt", "")
    prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not isinstance(prompt, str):
        raise Refusal(400, "prompt: must be one text; ask once for each", "invalid_value", "prompt")
    return prompt


ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(given: dict) -> list[dict]:
    """The messages of a chat as a chat template takes them: texts alone."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages: must be a list of at least one message", "invalid_value", "messages")
    return [_read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> dict:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise Refusal(
            400, f"{where}: must be an object whose role is one of {', '.join(ROLES)}", "invalid_value", where
        )
    content, calls = message.get("content"), message.get("tool_calls") or []
    if content is None and calls and role == "assistant":
        content = ""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        content = None if None in parts else " ".join(map(str, parts))
    if not isinstance(content, str):
        raise Refusal(400, f"{where}.content: must be a text; this model reads nothing else", "invalid_value", where)
    read = {"role": "system" if role == "developer" else role, "content": content}
    read |= {"tool_calls": _read_calls(calls, where)} if calls else {}
    return read | {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}


def _read_calls(calls: Any, where: str) -> list[dict]:
    """An assistant's calls of tools, with their arguments as objects, as templates take them."""
    try:
        functions = [dict(call["function"]) for call in calls]
        for function in functions:
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
        return [{"type": "function", "function": function} for function in functions]
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        message = f"{where}.tool_calls: must be calls with a function's name and arguments as JSON"
        raise Refusal(400, message, "invalid_value", where) from error
