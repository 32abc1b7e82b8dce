"""Records as JSON's plain values, and back with every key and type checked."""

import functools
import json
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from catp_jax.messages import short

T = TypeVar("T")


class Record:
    """What a frozen dataclass derives from that stands in a file: its keys and types, and those of
    the dataclasses in it, are exact.
    """

    __pydantic_config__: ClassVar = ConfigDict(
        strict=True, extra="forbid", ser_json_inf_nan="constants"
    )


def to_plain(record: Record) -> dict[str, Any]:
    """A record as JSON has it: tuples as lists, keys as texts."""
    return _adapter(type(record)).dump_python(record, mode="json")


def from_plain(kind: type[T], row: dict[str, Any]) -> T:
    """The record of this kind in a JSON object.

    A field that is missing has its default. Raises ValueError, with the key, for a value of another
    type and for keys that are missing or unknown.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(row))
    except ValidationError as error:
        raise ValueError("; ".join(map(_fault, error.errors(include_url=False)))) from None


def shown(value: Any) -> str:
    """A value as JSON, cut off where it is long."""
    return short(json.dumps(value, ensure_ascii=False))


_adapter = functools.cache(TypeAdapter)


def _fault(fault: Any) -> str:
    """answers[1].score: input should be a valid number, got "1" """
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
    got = "" if fault["type"] == "missing" else f", got {shown(fault['input'])}"
    return f"{key.lstrip('.')}: {fault['msg'][0].lower()}{fault['msg'][1:]}{got}"
