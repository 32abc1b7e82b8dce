"""Pictures of what was kept: the image as the model sees it, dropped patches dimmed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from catp_jax.generation.inputs import KeptTokens, ProcessedImage
from catp_jax.models.tiled_vit import TiledVitConfig


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture: an image, what was kept of it (None: everything), and a caption."""

    image: ProcessedImage
    kept: KeptTokens | None
    caption: str


def canvas(image: ProcessedImage, config: TiledVitConfig) -> np.ndarray:
    """The tiles put together again, [height, width, 3], stretched to 0 … 1."""
    rows, columns = config.supported_aspect_ratios[image.aspect_ratio_id - 1]
    size = config.image_size
    tiles = image.pixels[: rows * columns].reshape(rows, columns, -1, size, size)
    whole = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * size, columns * size, -1)
    return (whole - whole.min()) / max(float(np.ptp(whole)), 1e-6)


def kept_mask(
    kept: KeptTokens, aspect_ratio_id: int, config: TiledVitConfig, number: int = 0
) -> np.ndarray:
    """True for every kept patch of a prompt's image `number`, on the grid of its whole canvas."""
    rows, columns = config.supported_aspect_ratios[aspect_ratio_id - 1]
    mask = np.zeros((rows * config.grid, columns * config.grid), bool)
    own = (kept.image == number) & (kept.row >= 0)
    tile_row, tile_column = np.divmod(kept.tile[own], columns)
    mask[tile_row * config.grid + kept.row[own], tile_column * config.grid + kept.column[own]] = (
        True
    )
    return mask


def draw_kept(panels: Sequence[Sequence[Panel]], config: TiledVitConfig, path: Path) -> None:
    """A grid of panels, one row of the figure per inner list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(panels), max(len(row) for row in panels)
    figure = Figure(figsize=(2.1 * columns, 2.35 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, row in zip(grid, panels, strict=True):
        for axes, panel in zip(line, row, strict=False):
            picture = canvas(panel.image, config)
            if panel.kept is not None:
                mask = kept_mask(panel.kept, panel.image.aspect_ratio_id, config)
                mask = mask.repeat(config.patch_size, 0).repeat(config.patch_size, 1)
                picture = np.where(mask[..., None], picture, 0.12 * picture)
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(panel.caption, fontsize=8)
    figure.savefig(path, dpi=120)
