"""The one way a command is printed: every word as a shell takes it, so that what is pasted does what was meant."""

import shlex
from pathlib import PurePath


def shell(*words: object, **flags: object) -> str:
    """A command line for bash or zsh of these words and of `--name value` for each flag, all on one line.

    Nothing in it is expanded, split or run, and words of line breaks and other unseen characters become $'…'. A path or
    value that begins with a dash is written so that no parser takes it for a flag.
    """
    line = [_quoted(f"./{word}" if isinstance(word, PurePath) and str(word)[0] == "-" else str(word)) for word in words]
    for name, value in flags.items():
        line.append(f"--{name}{'=' if str(value).startswith('-') else ' '}{_quoted(str(value))}")
    return " ".join(line)


def _quoted(word: str) -> str:
    return shlex.quote(word) if word.isprintable() else "$'" + "".join(map(_escaped, word)) + "'"


def _escaped(character: str) -> str:
    """A character within $'…': as it is, behind a backslash, or as the bytes of its UTF-8."""
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    names = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return names.get(character) or "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
