"""What fills pages: results by their names, and tables in Markdown."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

Row = Mapping[str, Any]
Figures = tuple[float, float, float]
"""A mean and its interval."""


def read(name: str) -> dict[str, Any]:
    """What a benchmark has recorded."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, numbers to the right."""
    head = [*head]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def only(some: Iterable[Any]) -> Any:
    """The one there is."""
    (one,) = some
    return one


def plus_minus(figures: Figures) -> str:
    """A share in %, and half its interval."""
    mean, low, high = figures
    return f"{100 * mean:.0f} ± {50 * (high - low):.0f}"


def points(figures: Figures) -> str:
    """A difference in points, with its interval."""
    mean, low, high = (f"{round(100 * figure, 1) + 0.0:+.1f}" for figure in figures)
    return f"{mean} [{low}, {high}]"
