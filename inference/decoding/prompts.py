"""Prompts as they are given: a text, or the file that holds it."""

from pathlib import Path

from training.system.errors import UserError


def read_prompt(prompt: str) -> str:
    """The prompt itself, or the text of the file it names after FILE:."""
    if not prompt.startswith("FILE:"):
        return prompt
    path = Path(prompt.removeprefix("FILE:"))
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt FILE:{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt FILE:{path}: not UTF-8 at byte {error.start}") from error
