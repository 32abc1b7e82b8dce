"""The file of a sweep: JSON lines that only ever grow, so that an interrupted sweep resumes.

    {"row": "header", …}     what every answer depends on: model, questions, prompt, versions
    {"row": "cost", …}       a setting's cache, FLOPs and times, measured before the questions
    {"row": "picture", …}    an image as the model sees it, for the report
    {"row": "answers", …}    one batch of questions under one setting
    {"row": "result", …}     a setting's figures, once all its batches are in

The classes are in `records`. A line is written when its work is done: what a kill costs is the line
that was being worked on. One that was being written is taken away before the next is added.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import to_jsonable_python

from catp_jax.lines import JsonLines, Row
from catp_jax.study.plain import Record, from_plain, shown, to_plain
from catp_jax.study.records import FORMAT, KINDS, Header

WHAT, OPENING = "a sweep's file", '{"row": "header"'
WORDS = {kind: word for word, kind in KINDS.items()}

R = TypeVar("R", bound=Record)


class Journal:
    """The records of a sweep, in memory and, with a path, in a file (see `lines.JsonLines`).

    Of several processes that run one sweep, all read the file and one writes.

    Raises ValueError if the file is not a sweep's, or one of another version, is damaged elsewhere
    than at its end, or has a line whose keys or types are wrong.
    """

    def __init__(
        self,
        path: Path | None = None,
        report: Callable[[str], None] = lambda message: None,
        is_written: bool = True,
    ) -> None:
        self.path = path
        self.records: list[Record] = []
        self._lines: JsonLines | None = None
        if path is None:
            return
        try:
            lines = JsonLines(path, WHAT, OPENING, self._read, report)
        except OtherFormat as error:
            raise ValueError(f"{path} {error}") from None
        self._lines = lines if is_written else None

    def _read(self, number: int, row: Row) -> None:
        """Adds the record of a line. Raises ValueError for one that is none."""
        row = dict(row)
        word = row.pop("row", None)
        if not isinstance(word, str):
            raise ValueError("damaged")
        if word not in KINDS:
            raise ValueError(f"of an unknown kind, {word!r}")
        if (number == 1) != (word == "header"):
            raise ValueError(f"a {word}, but the first line, and no other, is the header")
        if word == "header" and row.get("format") != FORMAT:
            raise OtherFormat(row)
        try:
            self.records.append(from_plain(KINDS[word], row))
        except ValueError as error:
            raise ValueError(f"a row of kind {word!r}, but {error}") from None

    @property
    def header(self) -> Header | None:
        """The first record; None if there is none yet."""
        first = self.records[0] if self.records else None
        return first if isinstance(first, Header) else None

    @property
    def digest(self) -> str:
        """A fingerprint of all records."""
        rows = json.dumps([to_plain(record) for record in self.records])
        return hashlib.sha256(rows.encode()).hexdigest()

    def check(self, **parts: Any) -> None:
        """Raises ValueError, with every difference, unless the header has these parts."""
        if self.header is None:
            return
        old, new = ({name: getattr(self.header, name) for name in parts}, parts)
        faults = differences(to_jsonable_python(old), to_jsonable_python(new))
        if faults:
            raise ValueError(
                f"{self.path} is another sweep; it differs in {'; '.join(faults)} (there → here). "
                f"Give another file, or the settings that it was begun with"
            )

    def begin(self, header: Header) -> None:
        """Writes the header, or checks it against the one that is there, whose name may differ."""
        if self.header is None:
            self.append(header)
        else:
            self.check(**{key: value for key, value in vars(header).items() if key != "name"})

    def append(self, record: R) -> R:
        """Adds a record and hands its line to the system at once; returns it as it is read back."""
        word, row = WORDS[type(record)], to_plain(record)
        record = from_plain(type(record), row)
        if self._lines is not None:
            self._lines.append({"row": word, **row})
        self.records.append(record)
        return record

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

    def all(self, kind: type[R]) -> list[R]:
        """The records of a kind."""
        return [record for record in self.records if isinstance(record, kind)]


class OtherFormat(Exception):
    """A file that another version has written."""

    def __init__(self, header: Row) -> None:
        versions = header.get("versions")
        writer = versions.get("catp-jax") if isinstance(versions, dict) else None
        by = f", written by catp-jax {writer}" if writer else ""
        super().__init__(
            f"is of format {header.get('format')!r}{by}; this version has format {FORMAT}. Run the "
            "study again into another file, or use the version that wrote it"
        )


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What differs between two trees of settings, as `options.num_beams: 1 → 5`."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    there, here = ("nothing" if value is None else shown(value) for value in (old, new))
    return [f"{name}: {there} → {here}"]
