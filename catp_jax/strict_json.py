"""JSON as it must be where it says what a model computes: nothing twice, no number too large.

Python's own reader takes the last of two equal keys, and makes infinity of 1e400; others take the
first, or refuse.
"""

import json
import math
from pathlib import Path
from typing import Any

LARGEST = 500_000_000  # bytes
MARK = b"\xef\xbb\xbf"  # in front of a file that some editors save


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object in a file's bytes; a byte-order mark in front is passed over.

    Raises ValueError if they are no JSON, no object, or hold a key twice or a number that no
    float64 has.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save it as UTF-8") from error
    if not text.strip():
        raise ValueError("it is empty")
    try:
        content = json.loads(
            text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it is not a JSON object but {type(content).__name__}")
    return content


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, which names the file."""
    content = read_bytes(path)
    try:
        return parse(content)
    except ValueError as error:
        raise _unusable(path, error) from error


def read_bytes(path: Path) -> bytes:
    """What is in a file of a checkpoint that is no weights, without a byte-order mark. Raises
    ValueError, which names the file.
    """
    try:
        if not path.is_file():
            raise _unusable(path, "it is not a file")
        if (size := path.stat().st_size) > LARGEST:
            raise _unusable(path, f"it has {size} bytes; at most {LARGEST} are read")
        return path.read_bytes().removeprefix(MARK)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _unusable(path: Path, reason: object) -> ValueError:
    return ValueError(f"{path} cannot be used ({reason}); download or copy it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is too large, or none")
    return number
