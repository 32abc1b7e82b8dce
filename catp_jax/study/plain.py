"""Frozen dataclasses as JSON's plain values, and back with every type checked."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}
ACCEPTED: dict[Any, set[type]] = {kind: {kind} for kind in NAMES} | {float: {float, int}}


def unwritten(**options: Any) -> Any:
    """A field that stays in memory."""
    return dataclasses.field(metadata={"unwritten": True}, **options)


def to_plain(value: Any) -> Any:
    """A record, or what holds some, as JSON has it: tuples as lists, keys as texts."""
    return json.loads(json.dumps(value, default=_fields))


def from_plain(kind: type[T], value: Any) -> T:
    """The record of this kind in a JSON object.

    A field that is missing has its default. Raises ValueError with the key for a value of another
    type, and for keys that are missing or unknown.
    """
    return _record(kind, value, "")


def shown(value: Any) -> str:
    """A value as JSON, cut off where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in _written(type(record))}


@functools.cache
def _written(kind: type) -> list[dataclasses.Field[Any]]:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return [field for field in fields if not field.metadata.get("unwritten")]


_types = functools.cache(typing.get_type_hints)


def _record(kind: Any, value: Any, key: str) -> Any:
    place = key or "it"
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object, got {shown(value)}")
    hints, fields = _types(kind), {field.name: field for field in _written(kind)}
    missing = [
        name
        for name, field in fields.items()
        if name not in value
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{place} has no {', '.join(missing)}")
    if unknown := [name for name in value if name not in fields]:
        raise ValueError(f"{place} has the unknown {', '.join(unknown)}")
    prefix = f"{key}." if key else ""
    return kind(**{name: _value(hints[name], one, prefix + name) for name, one in value.items()})


def _value(kind: Any, value: Any, key: str) -> Any:
    """The value as its type has it."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any or (origin is Literal and value in parts):
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, key)
    if origin in (Union, types.UnionType):
        return _one_of(parts, value, key)
    if origin in (tuple, Sequence) and isinstance(value, list):
        return _items(parts[0], value, key)
    if origin is dict and isinstance(value, dict):
        return {
            _key(parts[0], name, key): _value(parts[1], one, f"{key}.{name}")
            for name, one in value.items()
        }
    if type(value) in ACCEPTED.get(kind, ()):
        return kind(value) if kind is float else value
    raise ValueError(f"{key} must be {_name(kind)}, got {shown(value)}")


def _items(kind: Any, values: list[Any], key: str) -> tuple[Any, ...]:
    accepted = ACCEPTED.get(kind)
    if accepted is not None and accepted >= {*map(type, values)}:  # there may be very many
        return (*map(float, values),) if kind is float else (*values,)
    return tuple(_value(kind, one, f"{key}[{number}]") for number, one in enumerate(values))


def _key(kind: Any, name: str, key: str) -> Any:
    """A key of an object, which JSON has as text."""
    if kind is str:
        return name
    try:
        return int(name)
    except ValueError:
        raise ValueError(f"keys of {key} must be whole numbers, got {name!r}") from None


def _one_of(kinds: Sequence[Any], value: Any, key: str) -> Any:
    rest = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(rest) < len(kinds):
        return None
    if len(rest) == 1:
        return _value(rest[0], value, key)
    for kind in rest:
        try:
            return _value(kind, value, key)
        except ValueError:
            continue
    names = " or ".join(_name(kind) for kind in kinds)
    raise ValueError(f"{key} must be {names}, got {shown(value)}")


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (tuple, Sequence):
        return "a list"
    return NAMES.get(kind, "an object")
