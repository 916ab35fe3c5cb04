"""A value of YAML or of a flag, in the type of the field that it is for."""

import types
import typing

import yaml

from ..system.errors import UserError
from .strict_yaml import load

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def coerce(key: str, value: typing.Any, hint: typing.Any) -> typing.Any:
    """Turn a YAML value or a flag's string into the type of its field; UserError names key, value and type."""
    kinds = kinds_of(hint)
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none") and type(None) in kinds):
        if type(None) in kinds:
            return None
        raise UserError(f"{key}: needs a value")
    for kind in kinds:
        converted = _convert(key, value, kind)
        if converted is not None:
            return converted
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None))
    raise UserError(f"{key}={value!r:.80}: expected {wanted}")


def from_words(key: str, words: list[str], hint: typing.Any) -> typing.Any:
    """The value that the words after a flag stand for; without any a switch is turned on."""
    if not words and bool in kinds_of(hint):
        return True
    if not words:
        raise UserError(f"--{key}: needs a value: --{key} VALUE")
    is_yaml = len(words) == 1 and words[0].startswith("[")
    return words if is_list(hint) and not is_yaml else " ".join(words)


def kinds_of(hint: typing.Any) -> tuple:
    """The types that a field may hold."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_list(hint: typing.Any) -> bool:
    """Whether a field may hold a list."""
    return any(typing.get_origin(kind) is list for kind in kinds_of(hint))


def _convert(key: str, value: typing.Any, kind: typing.Any) -> typing.Any:
    """`value` as `kind`, or None where it is not one."""
    if kind is bool:
        return value if isinstance(value, bool) else WORDS.get(str(value).lower())
    if isinstance(value, bool):  # which Python takes for an int, too
        return None
    if kind in (int, float):
        return _number(value, kind)
    origin = typing.get_origin(kind) or kind
    if origin in (list, dict) and isinstance(value, str) and value.startswith(("[", "{")):
        try:
            value = load(value)
        except yaml.YAMLError:
            return None
    if origin is list:
        (of,) = typing.get_args(kind) or (typing.Any,)
        values = value if isinstance(value, list) else [value]
        return values if of is typing.Any else [coerce(key, entry, of) for entry in values]
    return value if isinstance(origin, type) and isinstance(value, origin) else None


def _number(value: typing.Any, kind: type) -> int | float | None:
    try:
        number = float(value.replace("_", "")) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, OverflowError):
        return None
    if kind is float:
        return number
    return value if isinstance(value, int) else int(number) if number.is_integer() else None
