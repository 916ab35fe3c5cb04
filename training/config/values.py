"""Values as people write them: YAML 1.2 without surprises, and each value in the type of its field.

YAML's plain values are 1.2's, no key is given twice, no code is run, and no few lines mean millions of values.
"""

import re
import types
import typing

import yaml

from ..system.errors import UserError

MOST_VALUES = 10_000  # in one document, each alias counted with all that it stands for
MOST_BYTES = 1_000_000

# YAML 1.2's core schema. PyYAML's own is 1.1, where `no` is false, 010 is 8, 1:30 is 90 and 1e-3 is text.
PLAIN = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain values of YAML 1.2, which refuses a key that is given twice."""

    yaml_implicit_resolvers = {}

    def compose_document(self):
        node = super().compose_document()
        _count(node, {})
        return node

    def construct_yaml_int(self, node):
        return int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10)


def _count(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values a node stands for; raises YAMLError for too many, for a loop and for a key given twice."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an anchor holds itself")
        return sizes[id(node)]
    sizes[id(node)] = 0
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {key.value!r} is given twice (again in line {line})")
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        children = [part for pair in node.value for part in pair]
    sizes[id(node)] = 1 + sum(_count(child, sizes) for child in children)
    if sizes[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"stands for more than {MOST_VALUES:,} values")
    return sizes[id(node)]


class Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would read as something else than text."""

    yaml_implicit_resolvers = {first: list(pairs) for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _kind, (_pattern, _first) in PLAIN.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def load(text: str) -> object:
    """The value of one YAML document; raises yaml.YAMLError, and that only."""
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"is longer than {MOST_BYTES:,} characters")
    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise yaml.YAMLError("is nested too deeply") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:  # a key that is a list, an impossible character
        raise yaml.YAMLError(str(error)) from error


def dump(value: object) -> str:
    """Text that `load`, and a reader of YAML 1.1, read as the same value."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


# ---- in the type of a field

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
