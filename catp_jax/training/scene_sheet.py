"""A sheet of scenes with a question under each, and frames around what it needs."""

import itertools
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from catp_jax.training.scene_questions import FAMILIES, questions_of
from catp_jax.training.scenes import Dials

ZOOM, LETTERS, ROOM = 2, 36, 44  # times; of a caption's line; pixels for a caption
COLUMNS = 5


def draw_sheet(split: str, scenes: int, dials: Dials) -> Image.Image:
    """The first scenes of a split; families take turns."""
    cells = []
    turns = itertools.cycle(FAMILIES)
    font = ImageFont.load_default(13)
    for scene, questions in questions_of(split, scenes, dials=dials):
        family = next(turns)
        asked = next((one for one in questions if one.family == family), questions[0])
        height, width = (ZOOM * side for side in scene.pixels.shape[:2])
        cell = Image.new("RGB", (width, height + ROOM), "white")
        picture = Image.fromarray(scene.pixels).resize((width, height), Image.Resampling.NEAREST)
        cell.paste(picture)
        pen = ImageDraw.Draw(cell)
        for left, top, right, bottom in asked.boxes(scene):
            frame = (left * width - 3, top * height - 3, right * width + 2, bottom * height + 2)
            pen.rectangle(frame, outline="white", width=2)
        caption = "\n".join(textwrap.wrap(f"{asked.question} {asked.answer}", LETTERS))
        pen.multiline_text((4, height + 4), caption, "black", font)
        cells.append(cell)
    width, height = cells[0].size
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + 8), rows * (height + 8)), "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        sheet.paste(cell, (column * (width + 8), row * (height + 8)))
    return sheet


def show(
    out: Annotated[Path, typer.Option("--show", help="the picture to write, a PNG")],
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    scenes: Annotated[int, typer.Option(min=1, help="how many")] = 15,
    dials: Annotated[str, typer.Option(help="as in objects=12,size=small,tiles=4")] = "",
) -> None:
    """Draw a sheet of scenes, each with a question and what it needs."""
    draw_sheet(split, scenes, Dials.parse(dials)).save(out)
    print(f"written: {out}")


def command() -> None:
    """`python -m catp_jax.training.scenes`."""
    try:
        typer.run(show)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
