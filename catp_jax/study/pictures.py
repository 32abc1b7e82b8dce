"""Pictures of what was kept, for any model: patches that were dropped dimmed, or a heat map; frames
around what an answer depends on.
"""

import base64
import dataclasses
import io
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from catp_jax.readers.reading import Box
from catp_jax.study.records import Picture, Result
from catp_jax.study.results import drawn, unpruned_of, without_seed

DIMMED = 0.12  # brightness of what was dropped
MARGIN = 0.45  # inches around each panel, for its caption
SIDE = 1.8  # inches of a panel
LETTERS = 31  # of a caption's line
METHODS = 8  # at most, in a row of pictures
RIGHT, WRONG = "#007a3d", "#c0271d"
PICTURE_SIDE = 448  # pixels, at most, of a picture that goes into the journal


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture: an image [height, width, 3] in 0 … 1, what was kept of it, and a caption.

    `kept` [rows, columns] lies over the whole image: booleans (or nothing but 0 and 1) are patches
    that were kept or dropped, other numbers how much the kept tokens look there. None: everything
    was kept. `boxes` are framed. The caption is green and ticked of an answer that `is_right`, red
    and crossed of one that is not.
    """

    image: np.ndarray
    kept: np.ndarray | None
    caption: str
    boxes: tuple[Box, ...] = ()
    is_right: bool | None = None


def pictured_budget(results: Sequence[Result]) -> int | str | None:
    """The budget that most methods were pictured at, of several the middle one, or None."""
    counts = Counter(result.setting.keep for result in results if result.maps)
    at = {result.setting.keep: result.visual_tokens for result in results if result.maps}
    best = sorted(
        (keep for keep in counts if counts[keep] == max(counts.values())), key=lambda keep: at[keep]
    )
    return best[len(best) // 2] if best else None


def panels_of(pictures: Sequence[Picture], results: Sequence[Result]) -> list[list[Panel]]:
    """A row for each pictured question: the whole image, then what every method kept of it at one
    budget; of several seeds the first.
    """
    keep = pictured_budget(results)
    if keep is None:
        return []
    shown = [draws[0] for draws in drawn(results) if draws[0].setting.keep == keep]
    unpruned = unpruned_of(results)
    rows = []
    for picture in pictures:
        number, image = picture.number, as_array(picture)
        panels = [_panel(picture, image, picture.question, unpruned, None)]
        panels += [
            _panel(picture, image, without_seed(result.setting.method), result, result.maps[number])
            for result in shown[:METHODS]
            if number in result.maps
        ]
        rows.append(panels)
    return rows


def _panel(
    picture: Picture, image: np.ndarray, title: str, result: Result | None, kept: np.ndarray | None
) -> Panel:
    """A panel captioned with a title and, below it, what was answered."""
    if result is None:
        return Panel(image, kept, title, picture.boxes)
    answer = result.answers[picture.number]
    said = f"unpruned: {answer.text}" if kept is None else answer.text
    return Panel(image, kept, f"{title}\n{said}", picture.boxes, answer.score >= 0.5)


def as_array(picture: Picture) -> np.ndarray:
    """A picture's pixels, [height, width, 3] from 0 to 1."""
    with Image.open(io.BytesIO(base64.b64decode(picture.png))) as image:
        return np.asarray(image.convert("RGB")) / 255


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches, that no screen is needed for.

    Raises ModuleNotFoundError, saying what to install, if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matplotlib, which draws, is not installed: pip install 'catp-jax[demo]' or matplotlib"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def is_mask(kept: np.ndarray) -> bool:
    """Whether a map says of each patch that it was kept or dropped, and no more."""
    return bool(np.isin(kept, (0, 1)).all())


def dim(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with what lies under False dimmed."""
    height, width = image.shape[:2]
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    return np.where(mask[rows][:, columns][..., None] > 0, image, DIMMED * image)


def draw_kept(panels: Sequence[Sequence[Panel]], path: Path) -> None:
    """A grid of panels, one row of the figure per inner list."""
    rows, columns = len(panels), max(len(row) for row in panels)
    figure = new_figure(SIDE * columns, (SIDE + MARGIN) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, row in zip(grid, panels, strict=True):
        for axes, panel in zip(line, row, strict=False):
            _draw(axes, panel)
    figure.savefig(path, dpi=130)


def _draw(axes: Any, panel: Panel) -> None:
    height, width = panel.image.shape[:2]
    place = {"extent": (0, width, height, 0)}
    kept = panel.kept
    if kept is None or not is_mask(kept):
        axes.imshow(panel.image, interpolation="nearest", **place)
    else:
        axes.imshow(dim(panel.image, kept), interpolation="nearest", **place)
    if kept is not None and not is_mask(kept):
        grey = panel.image.mean(axis=2)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest", **place)
        axes.imshow(
            kept,
            cmap="inferno",
            alpha=0.6,
            vmin=0,
            interpolation="bilinear",
            aspect="auto",
            **place,
        )
        axes.set_aspect("equal")
    for box in panel.boxes:
        _frame(axes, box, width, height)
    lines = [
        part
        for line in panel.caption.split("\n")
        for part in textwrap.wrap(line, LETTERS, max_lines=2, placeholder=" …")
    ]
    colour, mark = {None: ("black", ""), True: (RIGHT, " ✓"), False: (WRONG, " ✗")}[panel.is_right]
    axes.set_title("\n".join(lines) + mark, fontsize=8, color=colour, parse_math=False)


def _frame(axes: Any, box: Box, width: int, height: int) -> None:
    """A frame that shows on any ground: white within black."""
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    corner, size = (left * width, top * height), ((right - left) * width, (bottom - top) * height)
    for colour, line in (("black", 2.4), ("white", 1.1)):
        axes.add_patch(Rectangle(corner, *size, fill=False, ec=colour, lw=line, clip_on=False))


def as_png(picture: np.ndarray) -> str:
    """A picture [height, width, 3] in 0 … 1 as a PNG file in base64."""
    image = Image.fromarray(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    out = io.BytesIO()
    image.save(out, "png")
    return base64.b64encode(out.getvalue()).decode()
