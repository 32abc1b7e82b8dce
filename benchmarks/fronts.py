"""Accuracy against bytes of cache, a picture a model: docs/methods_<model>.png, from the results.

Only methods that leave other methods something to be held against: no bounds, no other forms of a
method at the same place, nothing that leaves the cache as it is. A picture holds a digest of its
figures, by which `is_current` knows it.
"""

import dataclasses
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from benchmarks.fidelity import IN_CACHE
from benchmarks.methods_table import FORMS
from catp_jax.pruning import BOUNDS
from catp_jax.study.curves import Line, Panel, draw_curves
from catp_jax.study.records import UNPRUNED
from catp_jax.study.results import Estimate

READS = ("attention_predictor",)
"""Methods that leave the cache as it is."""
TITLES = {
    False: "attributes, pruned before or while the prompt is read",
    True: "attributes, pruned once it was read",
}
FIGURE, AXIS = "accuracy, attribute", "cache, % of the unpruned model's"
TICKS = (20.0, 30.0, 40.0, 60.0, 80.0, 100.0)
COLOURS = 64  # of a small file
DIGEST = "figures"

Rows = Mapping[str, Mapping[str, Any]]


def is_in_cache(setting: str, row: Mapping[str, Any]) -> bool:
    """Whether a method prunes once the prompt was read, by what it was held against."""
    return setting.startswith(IN_CACHE) or f"against {IN_CACHE}" in row


def panels(rows: Rows) -> tuple[Panel, ...]:
    """Right answers about attributes over bytes: a panel of those methods that prune before or
    while the prompt is read, and one of those that do so afterwards.
    """
    by: dict[bool, dict[str, list[tuple[float, Estimate]]]] = {side: {} for side in TITLES}
    places = {
        setting.rpartition(", ")[0]: is_in_cache(setting, row) for setting, row in rows.items()
    }
    for setting, row in rows.items():
        method, _, _ = setting.rpartition(", ")
        name = method.partition(":")[0].partition(",")[0]
        if setting == UNPRUNED or name in (*BOUNDS, *READS):
            continue
        side = places[method]
        if method in FORMS and places.get(name) == side:
            continue
        point = (100 * row["cache"], Estimate(*row[FIGURE]))
        by[side].setdefault(method, []).append(point)
    least = min(place for lines in by.values() for line in lines.values() for place, _ in line)
    whole = (UNPRUNED, Estimate(*rows[UNPRUNED][FIGURE]))
    return tuple(
        Panel(
            title,
            AXIS,
            tuple(_line(method, points) for method, points in by[side].items()),
            (whole,),
            ticks=tuple(tick for tick in TICKS if tick > 0.9 * least),
            is_stepped=True,
        )
        for side, title in TITLES.items()
    )


def _line(method: str, points: list[tuple[float, Estimate]]) -> Line:
    places, values = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    return Line(method, places, values)


def digest(rows: Rows) -> str:
    """A fingerprint of what a picture shows."""
    shown = [dataclasses.astuple(panel) for panel in panels(rows)]
    return hashlib.sha256(repr(shown).encode()).hexdigest()


def draw(rows: Rows, path: Path) -> None:
    """Writes a model's picture."""
    whole = io.BytesIO()
    draw_curves(panels(rows), whole)
    about = PngImagePlugin.PngInfo()
    about.add_text(DIGEST, digest(rows))
    small = Image.open(whole).convert("RGB").quantize(COLOURS)
    small.save(path, pnginfo=about, optimize=True)


def is_current(rows: Rows, path: Path) -> bool:
    """Whether a picture is of these figures."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get(DIGEST) == digest(rows)
