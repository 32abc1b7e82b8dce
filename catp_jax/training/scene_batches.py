"""Batches of scenes for training: what covers each patch, and questions.

A batch is a pure function of (seed, step), so a run that resumes at a step sees what an
uninterrupted one would have seen.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from catp_jax.training.scenes import CELL, COLOURS, DIGITS, SHAPES, SIZES, Scene, mask_of

NAMES = (*SHAPES, *DIGITS)
SEEN = (*NAMES, *COLOURS, *SIZES)
"""Words for what a patch may show."""

LABELS = {
    "name": ("background", *NAMES),
    "colour": ("background", *COLOURS),
    "size": ("background", *SIZES),
    "middle": ("elsewhere", "middle"),
    "row": ("0", "1", "2", "3"),
    "column": ("0", "1", "2", "3"),
}
"""What each patch is labelled with: what covers it, whether it is the patch of an object's middle
(one an object, to be counted by), and where its cell is."""
COVERED = 0.25  # a patch with this much of a shape is labelled with it
STROKES = 0.12  # or of a digit, which is thin

Labels = dict[str, Int[np.ndarray, "rows columns"]]


def patch_labels(scene: Scene, patch: int) -> tuple[Labels, Float[np.ndarray, "rows columns"]]:
    """Every patch's labels and weight. Weights sum to one, half of it on objects; patches at an
    object's edge have none.
    """
    height, width = (side // patch for side in scene.pixels.shape[:2])
    labels = {name: np.zeros((height, width), np.int32) for name in LABELS}
    places = np.arange(max(height, width), dtype=np.int32) * patch // CELL
    labels["row"] += places[:height, None]
    labels["column"] += places[None, :width]
    covered, touched = np.zeros((2, height, width), bool)
    for thing in scene.things:
        mask = mask_of(thing, *scene.pixels.shape[:2])
        share = mask.reshape(height, patch, width, patch).mean(axis=(1, 3))
        here = share >= (STROKES if thing.is_digit else COVERED)
        labels["name"][here] = LABELS["name"].index(thing.name)
        labels["colour"][here] = LABELS["colour"].index(thing.colour)
        labels["size"][here] = LABELS["size"].index(thing.size)
        labels["middle"][(thing.y - 1) // patch, (thing.x - 1) // patch] = 1
        covered |= here
        touched |= share > 0
    weights = covered / max(covered.sum(), 1) + ~touched / (~touched).sum()
    return labels, (weights / weights.sum()).astype(np.float32)


def cut(image: np.ndarray, tiles: tuple[int, int]) -> Any:
    """An image or its labels, [height, width, …], as tiles, row by row: [tiles, height, …]."""
    rows, columns = tiles
    height, width = image.shape[0] // rows, image.shape[1] // columns
    split = image.reshape(rows, height, columns, width, *image.shape[2:])
    return split.swapaxes(1, 2).reshape(rows * columns, height, width, *image.shape[2:])
