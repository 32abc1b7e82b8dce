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

Row = dict[str, Any]

FIELDS = {
    "header": ("name", "task", "data", "prompt", "batch", "generation", "seed", "versions"),
    "cost": ("setting", "pruner", "cache_bytes"),
    "picture": ("number", "question", "png"),
    "answers": ("setting", "batch", "ms", "text", "score", "kl", "available", "kept", "maps"),
    "result": ("setting", "questions", "images", "visual_tokens", "accuracy", "low", "high"),
}
"""What a row of each kind holds at least."""

OPENING = '{"row": "header"'


class Journal:
    """The rows of a sweep, in memory and, with a path, in a file.

    Reading changes nothing: a last line that was cut off is told to `report` and goes when the
    first row is added. Of several processes that run one sweep, all read the file and one writes.

    Raises ValueError if the file is not a sweep's, is damaged elsewhere than at its end, or has a
    row that lacks its fields.
    """

    def __init__(
        self,
        path: Path | None = None,
        report: Callable[[str], None] = lambda said: None,
        is_written: bool = True,
    ) -> None:
        self.path, self.is_written = path, is_written
        self.rows: list[Row] = []
        self._end: int | None = None  # where the file is to be cut before anything is added
        if path is None or not path.exists():
            return
        if not path.is_file():
            raise ValueError(f"{path} is not a file; give one for the sweep's lines")
        data = path.read_bytes()
        self.rows, end = _parse(data, path)
        if end < len(data):
            self._end = end
            report(
                f"{path}: the last line was cut off and does not count ({len(data) - end} bytes)"
            )

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
        if self.header is not None:
            self.check({key: value for key, value in header.items() if key != "name"})
            return
        if self.path is not None and self.is_written:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.append(header)

    def append(self, row: Row) -> Row:
        """Adds a row and hands it to the system at once; returns it as it will be read."""
        row = _plain(row)
        if self.path is not None and self.is_written:
            if self._end is not None:
                with self.path.open("r+b") as file:
                    file.truncate(self._end)
                self._end = None
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows.append(row)
        return row

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


def _parse(data: bytes, path: Path) -> tuple[list[Row], int]:
    """The rows, and where the last whole one ends."""
    refusal = f"{path} is not a sweep's file; give another --out"
    if data and not (data.startswith(OPENING.encode()) or OPENING.encode().startswith(data)):
        raise ValueError(refusal)
    rows, end = [], 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        is_last = number == len(lines) or (number == len(lines) - 1 and not lines[-1])
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("row"), str):
                raise ValueError
        except (ValueError, RecursionError):
            if not is_last:
                raise ValueError(
                    f"line {number} of {path} is damaged; delete it from there on, and the sweep "
                    f"goes on with what is before it"
                ) from None
            break
        if number == len(lines):  # whole, but its newline is missing
            break
        if missing := [key for key in FIELDS.get(row["row"], ()) if key not in row]:
            raise ValueError(
                f"line {number} of {path} is {row['row']!r} without {', '.join(missing)}; delete "
                f"it from there on, and the sweep goes on with what is before it"
            )
        rows.append(row)
        end += len(line) + 1
    return rows, end
