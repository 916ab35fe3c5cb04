"""Addresses of texts as others may see them: without what may be a secret."""

import re
from collections.abc import Callable
from typing import Any

SCHEME = r"\b(?:[A-Za-z][A-Za-z0-9+.-]*://|https?:/)"  # a path made of an address has one slash
USER = re.compile(rf"({SCHEME})[^\s/?#]*@")
QUERY = re.compile(rf"({SCHEME}[^\s?#'\"]*)[?#][^\s'\"]*")
ADDRESS = re.compile(r"https?://", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Say whether a name is an http(s) address and no path."""
    return bool(ADDRESS.match(name))


def public_name(name: str) -> str:
    """Return an address without user, password, query and fragment, which may hold secrets; other names as they are."""
    return public_text(re.split(r"[?#]", name, maxsplit=1)[0] if is_address(name) else name)


def public_text(text: str) -> str:
    """Return a text with every address in it made public."""
    return QUERY.sub(r"\1", USER.sub(r"\1", text)) if ":/" in text else text


def each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return lists and dicts with `change` applied to every text in them, keys apart."""
    if isinstance(value, dict):
        return {key: each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [each_text(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value
