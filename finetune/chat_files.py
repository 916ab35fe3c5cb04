"""Where conversations and prompt–completion pairs come from: text files, tables of rows and Hub sets."""

import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

from training.data.documents import HubSet, Tables, TextFiles
from training.data.files import DAMAGED, damaged, open_bytes, read_text
from training.data.rows import Row, why_not_utf8
from training.data.sources import SYNTHETIC_CHAT, named_sources
from training.system.errors import UserError

from .synthetic_chat import conversations

SPEAKER = re.compile(r"^(System|User|Assistant):[ \t]?(.*)$", re.DOTALL)
SEPARATOR = re.compile(r"^(-{3,}|={3,}|\*{3,})\s*$")
# What other sets call the four roles. A tool's turn is context: the loss is on the assistant's alone.
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "function_response": "tool",
    "function-response": "tool", "tool_response": "tool",
}  # fmt: skip
# Whose turn may follow whose; None: the beginning.
FOLLOWS = {
    None: ("user", "system"), "system": ("user",), "user": ("assistant", "tool"), "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}  # fmt: skip
MESSAGE_COLUMNS = ("messages", "conversations", "conversation", "dialog")
# (what is given, more of it that may be empty, what is learned), under the names of the commonest sets
PAIR_COLUMNS = (
    ("prompt", None, "completion"),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
    ("query", None, "response"),
    ("input", None, "output"),
)


class Conversation(NamedTuple):
    """Messages ({"role", "content"}) from the first turn to the last; `where` names file and line.

    tools: what the assistant may call, as JSON schemas, for the chat template.
    """

    where: str
    messages: list[dict]
    tools: list[dict] | None = None


class Pair(NamedTuple):
    """A text that is given and one that is learned; `where` names file and line."""

    where: str
    prompt: str
    completion: str


class BadRow(Exception):
    """What is wrong with one row or conversation, in words."""


# ---- what the data is


def find_format(data) -> str:
    """The format that the data arguments name or that the files show: text, pairs or chat."""
    if named_sources(data) == [SYNTHETIC_CHAT]:
        if data.data_format not in ("auto", "chat"):
            raise UserError(f"data_format={data.data_format!r}: {SYNTHETIC_CHAT} is a chat; leave it out")
        return "chat"
    if data.data_format != "auto":
        return data.data_format
    if data.text_files:
        source = TextFiles(data)
        return "chat" if all(starts_as_chat(source, *file) for file in source.files) else "text"
    if data.data_files or (data.dataset and data.dataset != "python-stdlib"):
        values = next((row.values for _, _, row in tables(data).rows()), {})
        if data.messages_column in values or has_messages(values):
            return "chat"
        if pair_columns(data, values):
            return "pairs"
    return "text"


def has_messages(values: dict) -> bool:
    """Whether a row holds messages: under a name of theirs, or as a prompt and a completion that are lists of them."""
    is_conversational = isinstance(values.get("prompt"), list) and isinstance(values.get("completion"), list)
    return is_conversational or any(name in values for name in MESSAGE_COLUMNS)


def pair_columns(data, values: dict) -> tuple[str, str | None, str] | None:
    """The columns of a pair: those that the data arguments name, or those of a known set that the row has."""
    named = (data.prompt_column, None, data.completion_column)
    known = [named] if (named[0], named[2]) != ("prompt", "completion") else PAIR_COLUMNS
    return next((names for names in known if all(name in values for name in names if name)), None) or next(
        (names for names in known if names[0] in values and names[2] in values), None
    )


def starts_as_chat(source: TextFiles, name: str, path) -> bool:
    """Whether a text file's first line with words opens a turn, and an answer follows; one to be skipped may."""
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="replace") as file:
            first = next((line for line in file if line.strip()), "")
            match = SPEAKER.match(first)
            return bool(match and match[1] != "Assistant" and any(line.startswith("Assistant:") for line in file))
    except DAMAGED as error:
        source.skip_file(name, damaged(name, error))
        return True


def tables(data, skipped: dict | None = None) -> Tables:
    """The tables or the data set that the data arguments name."""
    return (Tables if data.data_files else HubSet)(data, skipped)


def rows_as(make, data, skipped: dict) -> Iterator:
    """Yield what `make(values, where)` makes of each row; where it says BadRow, the row is refused or skipped."""
    source = tables(data, skipped)
    for name, _, row in source.rows():
        try:
            yield make(row.values, f"{name}, {row.place}")
        except BadRow as error:
            source.skip_row(name, row, str(error))


# ---- pairs


def read_pairs(data, skipped: dict) -> Iterator[Pair]:
    """Yield the prompt–completion pairs of the tables, checked."""
    if not (data.data_files or data.dataset):
        raise UserError("data_format=pairs: pairs come from --data_files or --dataset")
    return rows_as(lambda values, where: pair_of(data, values, where), data, skipped)


def pair_of(data, values: dict, where: str) -> Pair:
    """One row as a pair; an instruction, its input if it has one and the answer are parted by empty lines."""
    columns = pair_columns(data, values) or (data.prompt_column, None, data.completion_column)
    for column in (columns[0], columns[2]):
        if not isinstance(values.get(column), str):
            what = "there is none" if column not in values else f"it holds {type(values[column]).__name__}, not text"
            raise BadRow(f"column {column!r}: {what}; the row has {', '.join(map(str, values))}")
    prompt, more, completion = values[columns[0]], values.get(columns[1]) or "", values[columns[2]]
    if not isinstance(more, str):
        raise BadRow(f"column {columns[1]!r}: it holds {type(more).__name__}, not text")
    if not completion.strip():
        raise BadRow("the completion is empty")
    if columns[0] != data.prompt_column:
        prompt = "".join(f"{part.strip()}\n\n" for part in (prompt, more) if part.strip())
    return Pair(where, as_utf8(prompt), as_utf8(completion))


def as_utf8(text: str) -> str:
    """The text, which may hold no half of a character."""
    if why := why_not_utf8(text):
        raise BadRow(f"{text[:20]!r} {why}")
    return text


# ---- conversations


def read_conversations(data, skipped: dict) -> Iterator[Conversation]:
    """Yield the conversations of the text files or tables, checked, or those that are made here."""
    if named_sources(data) == [SYNTHETIC_CHAT]:
        made = enumerate(conversations(), 1)
        return (Conversation(f"{SYNTHETIC_CHAT}, conversation {number}", messages) for number, messages in made)
    if not data.text_files:
        return rows_as(lambda values, where: conversation_of(data, values, where), data, skipped)
    source = TextFiles(data, skipped)
    return chain.from_iterable(conversations_of_file(source, *file) for file in source.files)


def conversation_of(data, values: dict, where: str) -> Conversation:
    """One row as a conversation; tools are JSON schemas, or the text of a list of them, as TRL takes them."""
    tools = read_cell(values.get("tools"))
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow(f"column 'tools': {str(tools)[:40]!r} is not a list of JSON schemas")
    return check_turns(Conversation(where, messages_of_row(values, data.messages_column), tools or None))


def read_cell(value: Any) -> Any:
    """A cell; one of CSV that holds JSON is read."""
    with suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def conversations_of_file(source: TextFiles, name: str, path) -> Iterator[Conversation]:
    """Yield the conversations of a text file, checked."""
    try:
        text = "".join(text for text, _ in read_text(path, name))
    except UserError as error:
        source.skip_file(name, error)
        return
    for number, conversation in enumerate(conversations_of_text(text, name)):
        try:
            yield check_turns(conversation)
        except BadRow as error:
            place = conversation.where.removeprefix(f"{name}, ")
            source.skip_row(name, Row(number, place, {}), str(error))


def conversations_of_text(text: str, name: str) -> Iterator[Conversation]:
    """Yield the conversations of a `User:`/`Assistant:` text.

    A line that begins with `User:`, `Assistant:` or `System:` opens a message, and the lines up to the next such line
    belong to it, with their line breaks. Where the file has lines of three dashes, equals signs or asterisks, those end
    a conversation; where it has none, a blank line does when the next line that is not blank begins `User:` or
    `System:`.
    """
    lines = list(io.StringIO(text, newline=""))  # ended by \n, \r or \r\n, as the rows of tables are
    has_separators = any(SEPARATOR.match(line) for line in lines)
    started, messages, after_blank = 1, [], False
    for number, line in enumerate(lines, 1):
        match = SPEAKER.match(line)
        opens = not has_separators and after_blank and match and match[1] != "Assistant"
        ends = bool(SEPARATOR.match(line)) or opens
        if ends and messages:
            yield Conversation(f"{name}, line {started}", messages)
            messages = []
        if match or (not messages and line.strip() and not ends):
            started = started if messages else number
            role, content = (match[1].lower(), match[2]) if match else (None, line)
            messages = [*messages, {"role": role, "content": content, "line": number}]
        elif messages:
            messages[-1]["content"] += line
        after_blank = not line.strip()
    if messages:
        yield Conversation(f"{name}, line {started}", messages)


def messages_of_row(values: dict, column: str | None) -> list[dict]:
    """The messages of a table's row, under the names that OpenAI's format, ShareGPT's or TRL's gives them."""
    names = [column] if column else MESSAGE_COLUMNS
    messages = next((values[name] for name in names if values.get(name) is not None), None)
    if messages is None and has_messages(values):
        messages = [*values["prompt"], *values["completion"]]
    messages = read_cell(messages)
    if not isinstance(messages, list):
        raise BadRow(f"no list of messages in {' or '.join(names)}; the row has {', '.join(map(str, values))}")
    found = [message_of(message, f"message {number}") for number, message in enumerate(messages, 1)]
    system = values.get("system")  # ShareGPT's may lie beside the turns
    has_own = isinstance(system, str) and system.strip() and not (found and found[0]["role"] == "system")
    return [{"role": "system", "content": system}, *found] if has_own else found


def message_of(message: Any, where: str) -> dict:
    """One message as {"role", "content"}; a call of a tool without words is its JSON."""
    if not isinstance(message, dict):
        raise BadRow(f"{where} holds {type(message).__name__}, not an object with role and content")
    named = message.get("role") or message.get("from")
    role = ROLES.get(str(named).lower())
    if role is None:
        raise BadRow(f"{where} has the unknown role {named!r}; known are {', '.join(ROLES)}")
    content = message["content"] if message.get("content") is not None else message.get("value")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    calls = message.get("tool_calls") or message.get("function_call")
    if calls and not content:
        content = json.dumps(calls, ensure_ascii=False)
    if role == "tool" and isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise BadRow(f"{where}: its content is {type(content).__name__}, not text")
    return {"role": role, "content": content}


def check_turns(conversation: Conversation) -> Conversation:
    """Refuse roles out of order, empty messages and conversations without an answer, naming message and line."""
    messages, before = conversation.messages, None
    for number, message in enumerate(messages, 1):
        line = f" (line {message['line']})" if "line" in message else ""
        role, expected = message["role"], FOLLOWS[before]
        if role is None:
            raise BadRow(f"a chat begins with User: or System:, not {message['content'].strip()[:40]!r}{line}")
        if role not in expected:
            raise BadRow(f"message {number}{line} is the {role}'s where the {expected[0]}'s turn is")
        if not message["content"].strip():
            raise BadRow(f"message {number}{line} ({role}) is empty")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("the conversation has no assistant turn, so there is nothing to learn")
    plain = [{"role": message["role"], "content": as_utf8(message["content"].strip())} for message in messages]
    return conversation._replace(messages=plain)
