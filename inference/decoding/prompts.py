"""Prompts as they are given: a text, the file that holds it, standard input, or a JSONL file of many."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from training.system.errors import UserError

OWN_FIELDS = ("sample", "text", "tokens", "logprobs", "finish_reason")  # what a sample's line of JSON adds


class Prompt(NamedTuple):
    """A text to continue, how a refusal names it, and what else its line of JSON holds."""

    text: str
    name: str
    fields: dict


def read_prompt(prompt: str) -> str:
    """The prompt itself, the text of the file it names after FILE:, or for `-` all of standard input."""
    if prompt == "-":
        return decode(sys.stdin.buffer.read(), "--prompt -")
    if not prompt.startswith("FILE:"):
        return prompt
    path = Path(prompt.removeprefix("FILE:"))
    try:
        return decode(path.read_bytes(), f"--prompt FILE:{path}")
    except OSError as error:
        raise UserError(f"--prompt FILE:{path}: {error.strerror}") from error


def decode(raw: bytes, name: str) -> str:
    """The text of bytes in UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}") from error


def read_prompts(name: str) -> list[Prompt]:
    """The prompts of a JSONL file, or for `-` of standard input: an object a line, with the text as `prompt`.

    Raises UserError that names the line, before anything is generated.
    """
    if name == "-":
        return list(prompts_of(sys.stdin.buffer, "--prompts -"))
    try:
        with Path(name).open("rb") as file:
            return list(prompts_of(file, f"--prompts {name}"))
    except OSError as error:
        raise UserError(f"--prompts {name}: {error.strerror}") from error


def prompts_of(lines: BinaryIO, name: str) -> Iterator[Prompt]:
    """Yield the prompt of each line that is not blank; a file without one is refused."""
    found = 0
    for number, line in enumerate(lines, 1):
        place = f"{name}, line {number}"
        if not (text := decode(line, place).strip()):
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'{place}: must be an object with a text as its prompt, such as {{"prompt": "Once"}}')
        if taken := [name for name in OWN_FIELDS if name in row]:
            raise UserError(f"{place}: {taken[0]} is a name that `acorn generate` writes; rename it")
        found += 1
        yield Prompt(row["prompt"], place, row)
    if not found:
        raise UserError(f"{name}: is empty; put an object with a prompt on each line")
