"""Build typed dataclasses from plain values (parsed YAML) with strict validation, and convert them back.

Errors name the key and what was expected: unknown keys list the nearest known ones, wrong types the value and the
expected type, numbers out of range the range. Supported are nested dataclasses (Hugging Face's too), Optional and other
unions, list, tuple, dict, Literal, Enum and Path; values of any other type are passed to the dataclass unchanged.

A field declares its range in its annotation (`Count`, `Annotated[float, Range(above=0)]`), also within lists and
unions. Fields inherited from a third-party dataclass get theirs from a class attribute `RANGES`, {field: range};
renamed fields keep their old names in `FORMER`, {former name: name}; `section.name` if they moved into a section.
"""

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from unimm.errors import UserError, one_line, shown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of valid numbers: at least `least`, at most `most`, greater than `above`, less than `below`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)


Count = Annotated[int, Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
Rate = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, most=1)]
Decay = Annotated[float, Range(least=0, below=1)]

SECRET_FIELDS = frozenset({"hub_token", "push_to_hub_token"})
"""Fields whose values are never written to a file."""


def known_keys(cls: Any) -> list[str]:
    """Return the names of the fields that a user may set: the constructor's, except inherited ones that the class does
    not use and lists in `UNUSED`."""
    unused: frozenset[str] = getattr(cls, "UNUSED", frozenset())
    return sorted(field.name for field in dataclasses.fields(cls) if field.init and field.name not in unused)


def used_when(condition: Callable[[Any], Any], needs: str) -> dict[str, Any]:
    """Return metadata for a field that is used only if `condition` holds for its dataclass; `needs` is the condition in
    words. `build` raises if the field is not at its default and the condition does not hold."""
    return {"used_when": condition, "needs": needs}


def refuse_unused(instance: Any, names: Iterable[str], needs: str, *, prefix: str) -> None:
    """Raise UserError for the first of the fields `names` that is not at its default, though nothing uses it without
    what `needs` says."""
    for field in dataclasses.fields(instance):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if field.name in names and (value := getattr(instance, field.name)) != default:
            raise UserError(
                f"{prefix}{field.name} is {plain(value)!r}, and nothing reads it without {needs}: set that too, or "
                f"leave {prefix}{field.name} at {plain(default)!r}."
            )


def _refuse_idle(instance: Any, prefix: str) -> None:
    for field in dataclasses.fields(instance):
        condition = field.metadata.get("used_when")
        if condition is not None and not condition(instance):
            refuse_unused(instance, [field.name], field.metadata["needs"], prefix=prefix)


def build(cls: type[T], tree: Mapping[Any, Any], *, key: str, source: str) -> T:
    """Build the dataclass `cls` from `tree`.

    Args:
        key: dotted name of this part, empty at the top level.
        source: where `tree` came from, for messages.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or a ValueError of the constructor.
    """
    known = known_keys(cls)
    prefix = f"{key}." if key else ""
    tree = _renamed(tree, getattr(cls, "FORMER", {}))
    for name in tree:
        if name not in known:
            word = str(name)[:80]
            close = difflib.get_close_matches(word, known, n=1)
            hint = f" (did you mean {prefix}{close[0]}?)" if close else ""
            nearest = difflib.get_close_matches(word, known, n=3, cutoff=0.0)
            raise UserError(f"Unknown key {prefix}{word} in {source}{hint}; nearest: {', '.join(nearest)}.")
    hints = hints_of(cls)
    values = {name: _coerce(hints[name], value, key=f"{prefix}{name}", source=source) for name, value in tree.items()}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise UserError(f"{prefix}{field.name} is missing in {source}.")
    try:
        built = cls(**values)
        _refuse_idle(built, prefix)
        return built
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{key or cls.__name__} in {source}: {one_line(error)}") from error


def _renamed(tree: Mapping[Any, Any], former: Mapping[str, str]) -> dict[Any, Any]:
    """Return `tree` with the present names of former keys, also those that moved into a section (`section.key`). A
    former key beside the present one stays, so that it is refused."""
    renamed = {name: dict(value) if isinstance(value, Mapping) else value for name, value in tree.items()}
    for name, present in former.items():
        *sections, last = present.split(".")
        place = renamed
        for section in sections:
            below = place.get(section)
            place = {} if below is None else below
            if below is None and name in renamed:
                renamed[section] = place
        if name in renamed and isinstance(place, dict) and last not in place:
            place[last] = renamed.pop(name)
    return renamed


def hints_of(cls: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass's fields with their ranges."""
    ranges: Mapping[str, Range] = getattr(cls, "RANGES", {})
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: Annotated[hint, ranges[name]] if name in ranges else hint for name, hint in hints.items()}


class _Mismatch(Exception):
    """A value does not fit its annotation; `_coerce`, which knows the key, turns it into a `UserError`."""


def _coerce(hint: Any, value: Any, *, key: str, source: str) -> Any:
    try:
        return _convert(hint, value, key, source)
    except _Mismatch:
        raise UserError(f"{key} in {source} is {shown(value)}, expected {_describe(hint)}.") from None


def _convert(hint: Any, value: Any, key: str, source: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        converted = _convert(arguments[0], value, key, source)
        for bounds in arguments[1:]:
            if isinstance(bounds, Range) and _is_number(converted) and converted not in bounds:
                raise UserError(f"{key} in {source} is {converted}, and must be {bounds}.")
        return converted
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, key, source)
    if origin is Literal:
        return _require(any(value == choice and type(value) is type(choice) for choice in arguments), value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        tree = _require(isinstance(value, dict) or value is None, value) or {}
        return build(hint, tree, key=key, source=source)
    container = origin or hint
    if container in (list, tuple, dict, Sequence, Mapping):
        return _convert_container(container, arguments, value, key, source)
    return _convert_scalar(hint, value)


def _convert_union(options: Sequence[Any], value: Any, key: str, source: str) -> Any:
    if value is None:
        return _require(type(None) in options, value)
    options = [option for option in options if option is not type(None)]
    exact = [option for option in options if type(value) is _bare(option)]  # else `int | float` turns 1.0 into 1
    for option in exact or options:
        try:
            return _convert(option, value, key, source)
        except _Mismatch:
            continue
    raise _Mismatch


def _convert_container(container: Any, arguments: Sequence[Any], value: Any, key: str, source: str) -> Any:
    if container in (dict, Mapping):
        _require(isinstance(value, dict), value)
        key_hint, value_hint = arguments or (Any, Any)
        names = [_coerce(key_hint, name, key=key, source=source) for name in value]
        items = [_coerce(value_hint, item, key=f"{key}.{name}", source=source) for name, item in value.items()]
        return dict(zip(names, items, strict=True))
    _require(isinstance(value, list | tuple), value)
    hints = list(arguments) or [Any]
    if container is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(arguments) != len(value):
            raise UserError(f"{key} in {source} has {len(value)} items, expected {len(arguments)}.")
    else:
        hints = [hints[0]] * len(value)
    pairs = enumerate(zip(hints, value, strict=True))
    items = [_coerce(hint, item, key=f"{key}[{i}]", source=source) for i, (hint, item) in pairs]
    return tuple(items) if container is tuple else items


def _convert_scalar(hint: Any, value: Any) -> Any:
    number = _is_number(value)
    if hint is float:
        return float(_require(number, value))
    if hint is int:  # YAML parses 1e5 as a float, but users mean a step count
        return int(_require(number and math.isfinite(value) and value == value // 1, value))
    if hint is Path:
        return Path(_require(isinstance(value, str | Path), value))
    if hint in (bool, str, type(None)):
        return _require(isinstance(value, hint), value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _require(value in [member.value for member in hint], value)
    return value  # Any, or a type that only its own constructor can check


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bare(hint: Any) -> Any:
    """Return the annotation without its range."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _require(fits: bool, value: Any) -> Any:
    if not fits:
        raise _Mismatch
    return value


def _describe(hint: Any) -> str:
    hint = _bare(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in arguments)
    if hint is type(None):
        return "null"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        names = known_keys(hint)
        return f"keys of {hint.__name__} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint).replace("typing.", "")


def plain(value: Any) -> Any:
    """Convert the value to dict, list, str, number, bool or None, so that `build` restores the same dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.name in known_keys(value)]
        return {name: None if name in SECRET_FIELDS else plain(getattr(value, name)) for name in names}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {plain(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    to_dict: Callable[[], Any] | None = getattr(value, "to_dict", None)
    return plain(to_dict()) if to_dict is not None else str(value)
