"""A safe YAML 1.2 loader and dumper for configuration files: plain values only, with limits on size and depth.

PyYAML implements YAML 1.1; here `1e-4` is a number, `no` and `off` are strings, `010` is ten, and a duplicate key is an
error. Depth and expanded aliases (the "billion laughs" attack) are counted before anything is built, and values that no
setting can have (NaN, integers beyond 64 bits, NUL characters, lone surrogates) raise an error with their key.
"""

import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from unimm.errors import UserError, one_line, shown

MAX_BYTES = 100_000
MAX_DEPTH = 40
MAX_VALUES = 20_000
"""Values per file, with aliases expanded."""
MAX_INTEGER = 2**63 - 1


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML text into None, mappings, lists, strings, numbers and booleans.

    Args:
        name: name of the text in messages.

    Raises:
        UserError: invalid YAML, too large or too deeply nested, or with a value of another type.
    """
    try:
        _require_bounded(text, name)
        tree = yaml.load(text, Loader=_Loader)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{name} is not valid YAML: {one_line(error)[:300]}.") from None
    require_plain(tree, name)
    return tree


def dump_yaml(tree: Any) -> str:
    """Return YAML text that `load_yaml` parses back into `tree`."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _require_bounded(text: str, name: str) -> None:
    """Raise UserError if the text is too long, too deeply nested, or too large once its aliases are expanded."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{name} has {len(text)} characters, more than {MAX_BYTES}: it is no file of settings.")
    values, sizes = 0, dict[str, int]()
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UserError(f"{name}: the alias *{event.anchor:.60} stands before the end of what it names.")
            values += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes |= {anchor: values - before} if anchor else {}
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
        if len(opened) > MAX_DEPTH:
            raise UserError(f"{name} is nested more than {MAX_DEPTH} deep.")
        if values > MAX_VALUES:
            raise UserError(f"{name} holds more than {MAX_VALUES} values, with its aliases written out.")


def require_plain(tree: Any, name: str) -> None:
    """Raise UserError if a key or value at any depth is one that no setting can have."""
    left: list[tuple[str, Any, int]] = [("", tree, 0)]
    while left:
        key, value, depth = left.pop()
        where = f"{key[:200]} in {name}" if key else name
        if depth > MAX_DEPTH:
            raise UserError(f"{where} is nested more than {MAX_DEPTH} deep.")
        if isinstance(value, dict):
            for inner, item in value.items():
                if not isinstance(inner, str | int | float | bool | None):
                    raise UserError(f"{where} has the key {shown(inner)}, which is no word.")
                left.append((f"{key}.{inner}" if key else str(inner), item, depth + 1))
                left.append((f"a key in {key}" if key else "a key", inner, depth + 1))
        elif isinstance(value, list):
            left += [(f"{key}[{n}]", item, depth + 1) for n, item in enumerate(value)]
        elif (reason := _refused(value)) is not None:
            raise UserError(f"{where} {reason}.")


def _refused(value: Any) -> str | None:
    """Return why a single value is invalid, None if it is valid."""
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            return f"is {shown(value)}, which holds a character that no text has"
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"is {value}, and must be a finite number"
    if isinstance(value, int):
        return None if abs(value) <= MAX_INTEGER else "is a whole number of more than 64 bits"
    return None if value is None else f"is a {type(value).__name__}; settings are words, numbers, lists and mappings"


class _Loader(yaml.SafeLoader):
    """A SafeLoader with YAML 1.2 numbers and booleans that rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if all(isinstance(key, Hashable) for key in keys) and len(set(keys)) < len(keys):
            twice = min(str(key) for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[:80]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > len(str(MAX_INTEGER)) + 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"a whole number of {len(text)} digits, more than 64 bits", node.start_mark
            )
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes by the rules `_Loader` parses with."""


_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"^(?:[-+]?(?:\.\d+|\d[\d_]*(?:\.\d*)?)(?:[eE][-+]?\d+)?|[-+]?\.(?i:inf)|\.(?i:nan))$")
_INTEGER = re.compile(r"^(?:[-+]?\d[\d_]*|0o[0-7]+|0x[0-9a-fA-F]+)$")


def _use_yaml_12(cls: Any) -> None:
    replaced = [f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp")]
    kept = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in cls.yaml_implicit_resolvers.items()
    }
    cls.yaml_implicit_resolvers = kept
    cls.add_implicit_resolver(replaced[0], _BOOL, list("tTfF"))
    cls.add_implicit_resolver(replaced[1], _INTEGER, list("-+0123456789"))
    cls.add_implicit_resolver(replaced[2], _FLOAT, list("-+.0123456789"))


_use_yaml_12(_Loader)
_use_yaml_12(_Dumper)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
