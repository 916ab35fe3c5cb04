"""Where conversations and prompt–completion pairs come from: text files, JSONL, parquet and Hub sets."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from training.errors import UserError, one_line
from training.tables import find_data_files, load_rows
from training.text_files import find_text_files, read_parts

SPEAKER = re.compile(r"^(System|User|Assistant):[ \t]?(.*)$")
SEPARATOR = re.compile(r"^(-{3,}|={3,}|\*{3,})\s*$")
# What other sets call the three roles.
ROLES = {
    "system": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
}  # fmt: skip
MESSAGE_COLUMNS = ("messages", "conversations")


class Conversation(NamedTuple):
    """Messages ({"role", "content"}) from the first turn to the last; `where` names file and line."""

    where: str
    messages: list[dict]


class Pair(NamedTuple):
    """A text that is given and one that is learned; `where` names file and line."""

    where: str
    prompt: str
    completion: str


def read_text(path: Path, name: str) -> str:
    """A whole file as text; an empty, binary or wrongly encoded one is refused."""
    return "".join(text for text, _ in read_parts(path, name))


# ---- what the data is


def find_format(data) -> str:
    """The format that the data arguments name or that the files show: text, pairs or chat."""
    if data.data_format != "auto":
        return data.data_format
    if data.text_files:
        return "chat" if all(starts_as_chat(path) for _, path in find_text_files(data.text_files)) else "text"
    if data.data_files or (data.dataset and data.dataset != "python-stdlib"):
        columns = next(iter(rows(data)), ("", {}))[1]
        if data.messages_column in columns or any(name in columns for name in MESSAGE_COLUMNS):
            return "chat"
        if data.prompt_column in columns and data.completion_column in columns:
            return "pairs"
    return "text"


def starts_as_chat(path: Path) -> bool:
    """Whether a text file's first line with words opens a turn, and an answer follows somewhere."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
        match = SPEAKER.match(first.lstrip("\ufeff"))
        return bool(match and match[1] != "Assistant" and any(line.startswith("Assistant:") for line in file))


# ---- rows of tables


def rows(data) -> Iterator[tuple[str, dict]]:
    """Yield (file and line, row) of the JSONL and parquet files, or of the data set."""
    if not data.data_files:
        for number, row in enumerate(load_rows(data)):
            yield f"{data.dataset}, row {number + 1}", row
        return
    for path in find_data_files(data.data_files):
        yield from parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield the objects of a JSONL file, or of a JSON file that is one list."""
    text = read_text(path, str(path))
    if text.lstrip().startswith("["):
        lines = enumerate(_json(text, str(path)), 1)
        places = ((f"{path}, entry {number}", entry) for number, entry in lines)
    else:
        lines = enumerate(text.splitlines(), 1)
        places = ((f"{path}, line {n}", _json(line, f"{path}, line {n}")) for n, line in lines if line.strip())
    for where, row in places:
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds {type(row).__name__}, not an object with columns")
        yield where, row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); mend the file") from error


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield the rows of a parquet file."""
    from datasets import load_dataset

    try:
        for number, row in enumerate(load_dataset("parquet", data_files=str(path), split="train", streaming=True)):
            yield f"{path}, row {number + 1}", row
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"data_files={str(path)!r}: can not be read ({one_line(error)}); mend the file") from error


# ---- pairs


def read_pairs(data) -> Iterator[Pair]:
    """Yield the prompt–completion pairs of the tables, checked."""
    if not (data.data_files or data.dataset):
        raise UserError("data_format=pairs: pairs come from --data_files (JSONL, parquet) or --dataset")
    for where, row in rows(data):
        values = [row.get(column) for column in (data.prompt_column, data.completion_column)]
        for column, value in zip((data.prompt_column, data.completion_column), values, strict=True):
            if not isinstance(value, str):
                what = "there is none" if column not in row else f"it holds {type(value).__name__}, not text"
                raise UserError(f"{where}: column {column!r}: {what}; the row has {', '.join(row)}")
        if not values[1].strip():
            raise UserError(f"{where}: the completion is empty; fill it in or remove the row")
        yield Pair(where, *values)


# ---- conversations


def read_conversations(data) -> Iterator[Conversation]:
    """Yield the conversations of the text files or tables, checked."""
    if data.text_files:
        for name, path in find_text_files(data.text_files):
            for conversation in conversations_of_text(read_text(path, name), name):
                yield check_turns(conversation)
        return
    for where, row in rows(data):
        yield check_turns(Conversation(where, messages_of_row(row, where, data.messages_column)))


def conversations_of_text(text: str, name: str) -> Iterator[Conversation]:
    """Yield the conversations of a `User:`/`Assistant:` text.

    A line that begins with `User:`, `Assistant:` or `System:` opens a message, and the lines up to the next such line
    belong to it. Where the file has lines of three dashes, equals signs or asterisks, those end a conversation; where
    it has none, a blank line does when the next line that is not blank begins `User:` or `System:`.
    """
    lines = text.lstrip("\ufeff").splitlines()
    has_separators = any(SEPARATOR.match(line) for line in lines)
    started, messages, after_blank = 1, [], False
    for number, line in enumerate(lines, 1):
        match = SPEAKER.match(line)
        opens = not has_separators and after_blank and match and match[1] != "Assistant"
        ends = bool(SEPARATOR.match(line)) or opens
        if ends and messages:
            yield Conversation(f"{name}, line {started}", messages)
            messages = []
        if match:
            started = started if messages else number
            messages = [*messages, {"role": match[1].lower(), "content": match[2], "line": number}]
        elif line.strip() and not SEPARATOR.match(line):
            if not messages:
                raise UserError(f"{name}, line {number}: a chat begins with User: or System:, not {line[:40]!r}")
            messages[-1]["content"] += f"\n{line}"
        elif messages and not line.strip():
            messages[-1]["content"] += "\n"
        after_blank = not line.strip()
    if messages:
        yield Conversation(f"{name}, line {started}", messages)


def messages_of_row(row: dict, where: str, column: str | None) -> list[dict]:
    """The messages of a table's row, under the names that OpenAI's format or ShareGPT's gives them."""
    names = [column] if column else MESSAGE_COLUMNS
    messages = next((row[name] for name in names if row.get(name) is not None), None)
    if not isinstance(messages, list):
        raise UserError(f"{where}: no list of messages in {' or '.join(names)}; the row has {', '.join(row)}")
    return [message_of(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]


def message_of(message: Any, where: str) -> dict:
    """One message as {"role", "content"}."""
    if not isinstance(message, dict):
        raise UserError(f"{where}: holds {type(message).__name__}, not an object with role and content")
    role = message.get("role") or message.get("from")
    content = message["content"] if message.get("content") is not None else message.get("value")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: its content is {type(content).__name__}, not text")
    if str(role).lower() not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    return {"role": ROLES[str(role).lower()], "content": content}


def check_turns(conversation: Conversation) -> Conversation:
    """Refuse roles out of order, empty messages and conversations without an answer, naming file and line."""
    where, messages = conversation
    expected = "user"
    for number, message in enumerate(messages, 1):
        place = f"{where.rsplit(', line', 1)[0]}, line {message['line']}" if "line" in message else where
        role = message["role"]
        if role == "system" and number == 1:
            pass
        elif role != expected:
            raise UserError(f"{place}: message {number} is the {role}'s where the {expected}'s turn is; mend the order")
        else:
            expected = "assistant" if role == "user" else "user"
        if not message["content"].strip():
            raise UserError(f"{place}: message {number} ({role}) is empty; fill it in or remove it")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{where}: the conversation has no assistant turn, so there is nothing to learn; remove it")
    plain = [{"role": message["role"], "content": message["content"].strip()} for message in messages]
    return Conversation(where, plain)
