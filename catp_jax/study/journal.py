"""The file of a sweep: JSON lines that only ever grow, so that a sweep goes on where it was.

    {"row": "header", …}     what every answer depends on: model, questions, prompt, versions
    {"row": "cost", …}       a setting's cache, FLOPs and times, measured before the questions
    {"row": "picture", …}    an image as the model sees it, for the report
    {"row": "answers", …}    one batch of questions under one setting
    {"row": "result", …}     a setting's figures, once all its batches are in

A line is written when its work is done: what a kill costs is the line that was being worked on. One
that was being written is taken away before the next is added.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catp_jax.lines import JsonLines, Row

FIELDS = {
    "header": ("name", "task", "data", "prompt", "batch", "generation", "seed", "versions"),
    "cost": ("setting", "pruner", "cache_bytes"),
    "picture": ("number", "question", "png"),
    "answers": ("setting", "batch", "ms", "text", "score", "kl", "available", "kept", "maps"),
    "result": ("setting", "questions", "images", "visual_tokens", "accuracy", "low", "high"),
}
"""What a row of each kind holds at least."""

WHAT, OPENING = "a sweep's file", '{"row": "header"'


class Journal:
    """The rows of a sweep, in memory and, with a path, in a file (see `lines.JsonLines`).

    Of several processes that run one sweep, all read the file and one writes.

    Raises ValueError if the file is not a sweep's, is damaged elsewhere than at its end, or has a
    row that lacks its fields.
    """

    def __init__(
        self,
        path: Path | None = None,
        report: Callable[[str], None] = lambda said: None,
        is_written: bool = True,
    ) -> None:
        self.path = path
        lines = None if path is None else JsonLines(path, WHAT, OPENING, _check, report)
        self.rows: list[Row] = [] if lines is None else lines.rows
        self._lines = lines if is_written else None

    @property
    def header(self) -> Row | None:
        """The first row; None if there is none yet."""
        return self.rows[0] if self.rows else None

    def check(self, header: Row) -> None:
        """Raises ValueError, with every difference, unless `header` is that of these rows.

        Only what stands in `header` is compared, so a part of one can be checked beforehand.
        """
        if self.header is None:
            return
        header = _plain(header)
        faults = differences({key: self.header.get(key) for key in header}, header)
        if faults:
            raise ValueError(
                f"{self.path} is another sweep; it differs in {'; '.join(faults)} (there → here). "
                f"Give another file, or the settings that it was begun with"
            )

    def begin(self, header: Row) -> None:
        """Writes the header, or checks it against the one that is there."""
        header = _plain({"row": "header", **header})
        if self.header is None:
            self.append(header)
        else:
            self.check({key: value for key, value in header.items() if key != "name"})

    def append(self, row: Row) -> Row:
        """Adds a row and hands it to the system at once; returns it as it will be read."""
        row = _plain(row)
        if self._lines is None:
            self.rows.append(row)
        else:
            self._lines.append(row)
        return row

    def claim(self) -> None:
        """Keeps others from writing the file, until `release`. Raises ValueError if one does
        already, or if it cannot be written at all.
        """
        if self._lines is not None:
            self._lines.claim()

    def release(self) -> None:
        """Lets others write the file."""
        if self._lines is not None:
            self._lines.release()

    def find(self, kind: str, **keys: Any) -> list[Row]:
        """The rows of a kind that have these values."""
        return [
            row
            for row in self.rows
            if row["row"] == kind and all(row.get(key) == value for key, value in keys.items())
        ]


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two trees of settings, as `generation.beams: 1 → 5`."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [f"{name}: {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _plain(row: Row) -> Row:
    """The row as JSON gives it back: tuples as lists, keys as texts."""
    return json.loads(json.dumps(row))


def _check(number: int, row: Row) -> None:
    kind = row.get("row")
    if not isinstance(kind, str):
        raise ValueError("damaged")
    if missing := [key for key in FIELDS.get(kind, ()) if key not in row]:
        raise ValueError(f"{kind!r} without {', '.join(missing)}")
