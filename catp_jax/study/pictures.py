"""Pictures of what was kept, for any model: patches that were dropped dimmed, or a heat map."""

import base64
import dataclasses
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DIMMED = 0.12  # brightness of what was dropped
MARGIN = 0.45  # inches around each panel, for its caption
SIDE = 2.1  # inches of a panel
LETTERS = 36  # of a caption's line
PICTURE_SIDE = 448  # pixels, at most, of a picture that goes into the journal


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture: an image [height, width, 3] in 0 … 1, what was kept of it, and a caption.

    `kept` [rows, columns] lies over the whole image: booleans (or nothing but 0 and 1) are patches
    that were kept or dropped, other numbers how much the kept tokens look there. None: everything
    was kept.
    """

    image: np.ndarray
    kept: np.ndarray | None
    caption: str


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
    figure.savefig(path, dpi=120)


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
    lines = [
        part
        for line in panel.caption.split("\n")
        for part in textwrap.wrap(line, LETTERS, max_lines=2, placeholder=" …")
    ]
    axes.set_title("\n".join(lines), fontsize=8)


def as_png(picture: np.ndarray) -> str:
    """A picture [height, width, 3] in 0 … 1 as a PNG file in base64."""
    image = Image.fromarray(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8))
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    out = io.BytesIO()
    image.save(out, "png")
    return base64.b64encode(out.getvalue()).decode()
