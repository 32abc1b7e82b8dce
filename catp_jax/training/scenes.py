"""Scenes: small pictures of many objects, in which it matters which visual tokens are kept.

    python -m catp_jax.training.scenes --show sheet.png

Each cell of 32 × 32 pixels on textured ground holds one object or none: a shape or a digit, of one
colour, small or large. A tile of 64 × 64 pixels has four cells; the usual scene is 2 × 2 tiles.

A scene is a function of its split, seed and number alone, and has the same pixels on any machine:
only integers are computed, from the raw stream of PCG64, which NumPy keeps as it is.
`scene_questions` asks about them.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, UInt8

from catp_jax.readers.reading import Box

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 50),
    "purple": (160, 50, 190),
    "cyan": (60, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
DIGITS = tuple("0123456789")
SIZES = {"small": 7, "large": 12}  # half an object's height, in pixels

SPLITS = ("train", "validation", "test")  # no two share a scene
TILE, CELL = 64, 32  # pixels
LAYOUTS = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # rows and columns of tiles
OBJECTS = (6, 10)  # how many there are, where the dial does not say
DIGITS_IN_SCENE = 3  # at most; fewer where there is less room
FEWEST = 4  # objects: two shapes and two digits at least
JITTER = 1  # pixels that an object's middle is away from the middle of its cell

# 5 × 7 pixels, one row after the other
GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Dials:
    """How hard scenes are: `objects` in each (None: 6 to 10, as far as there is room), their
    `size`, and the image's `tiles`, of 64 × 64 pixels each.
    """

    objects: int | None = None
    size: str = "mixed"
    tiles: int = 4

    def __post_init__(self) -> None:
        if self.tiles not in LAYOUTS:
            raise ValueError(f"scenes have {_either(LAYOUTS)} tiles, got tiles={self.tiles}")
        if self.size not in (*SIZES, "mixed"):
            raise ValueError(f"the size is {_either((*SIZES, 'mixed'))}, got size={self.size}")
        if self.objects is not None and not FEWEST <= self.objects <= self.cells:
            raise ValueError(
                f"a scene of {self.tiles} tiles has {self.cells} cells, so {FEWEST} to "
                f"{self.cells} objects, got objects={self.objects}"
            )

    @classmethod
    def parse(cls, text: str) -> "Dials":
        """Dials from `objects=12,size=small`; of those that are not named, the usual ones.

        Raises ValueError for a dial or a value that there is not.
        """
        values: dict[str, Any] = {}
        names = [field.name for field in dataclasses.fields(cls)]
        for part in filter(None, text.split(",")):
            name, equals, value = part.partition("=")
            if name not in names or not equals or name in values:
                raise ValueError(
                    f"scenes have the dials {_either(names)}, each once, as objects=12,size=small; "
                    f"got {part!r}"
                )
            if name != "size" and not value.isdecimal():
                raise ValueError(f"{name} is a whole number, got {part!r}")
            values[name] = value if name == "size" else int(value)
        return cls(**values)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        rows, columns = LAYOUTS[self.tiles]
        return rows * TILE // CELL, columns * TILE // CELL

    @property
    def cells(self) -> int:
        """How many objects there is room for."""
        return self.grid[0] * self.grid[1]


class Dice:
    """Random whole numbers, the same on any machine and with any NumPy."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        return int(self._bits.random_raw()) % count

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in any order."""
        out = list(items)
        for last in range(len(out) - 1, 0, -1):
            other = self.below(last + 1)
            out[last], out[other] = out[other], out[last]
        return out

    def grid(self, height: int, width: int, below: int) -> np.ndarray:
        """Numbers from 0 to `below` - 1, [height, width]."""
        raw = self._bits.random_raw(height * width)
        return (raw % np.uint64(below)).astype(np.int64).reshape(height, width)


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: its `name` is a shape or a digit, its middle stands at `x`, `y` in pixels, and
    its cell is at `row`, `column`.
    """

    name: str
    colour: str
    size: str
    row: int
    column: int
    x: int
    y: int

    @property
    def is_digit(self) -> bool:
        """Whether it is to be read."""
        return self.name in DIGITS


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image and what is in it; `number` is its own among those of a split."""

    number: int
    things: tuple[Thing, ...]
    pixels: UInt8[np.ndarray, "height width 3"]

    def box(self, thing: Thing) -> Box:
        """Where an object is."""
        height, width, _ = self.pixels.shape
        half = SIZES[thing.size]
        return (
            (thing.x - half) / width,
            (thing.y - half) / height,
            (thing.x + half) / width,
            (thing.y + half) / height,
        )


def make_scene(split: str, number: int, dials: Dials | None = None, seed: int = 0) -> Scene:
    """Scene `number` of a split. Raises ValueError for a split that there is not."""
    if split not in SPLITS:
        raise ValueError(f"scenes are for {_either(SPLITS)}, not {split!r}")
    dials = dials or Dials()
    dice = Dice(SPLITS.index(split), seed, number)
    things = _things(dice, dials)
    pixels = _ground(dice, *(CELL * cells for cells in dials.grid))
    for thing in things:
        mask = mask_of(thing, *pixels.shape[:2])
        shade = dice.below(31) - 15
        pixels[mask] = np.clip(np.array(COLOURS[thing.colour]) + shade, 0, 255)
    noise = dice.grid(pixels.shape[0], pixels.shape[1], 17) - 8
    return Scene(number, things, np.clip(pixels + noise[:, :, None], 0, 255).astype(np.uint8))


def _things(dice: Dice, dials: Dials) -> tuple[Thing, ...]:
    """What is in a scene. Digits are of different colours, so that one can be asked for."""
    low, high = (min(count, dials.cells) for count in OBJECTS)
    count = low + dice.below(high - low + 1) if dials.objects is None else dials.objects
    digits = min(2 + dice.below(DIGITS_IN_SCENE - 1), count - 2)
    colours, numbers = dice.shuffled(tuple(COLOURS)), dice.shuffled(DIGITS)
    rows, columns = dials.grid
    cells = dice.shuffled(list(itertools.product(range(rows), range(columns))))
    things = []
    for index, (row, column) in enumerate(cells[:count]):
        is_digit = index < digits
        things.append(
            Thing(
                name=numbers[index] if is_digit else dice.pick(SHAPES),
                colour=colours[index] if is_digit else dice.pick(tuple(COLOURS)),
                size=dice.pick(tuple(SIZES)) if dials.size == "mixed" else dials.size,
                row=row,
                column=column,
                x=column * CELL + CELL // 2 + dice.below(2 * JITTER + 1) - JITTER,
                y=row * CELL + CELL // 2 + dice.below(2 * JITTER + 1) - JITTER,
            )
        )
    return tuple(things)


def _ground(dice: Dice, height: int, width: int) -> np.ndarray:
    """Grey in blotches of two scales, a little tinted: [height, width, 3], no object's colour."""
    blotches = 90 + 3 * (dice.below(20) - 10) + np.zeros((height, width), np.int64)
    for side, depth in ((16, 41), (4, 31)):
        patches = dice.grid(height // side, width // side, depth)
        blotches += patches.repeat(side, axis=0).repeat(side, axis=1)
    tint = np.array([dice.below(25) - 12 for _ in range(3)])
    return blotches[:, :, None] + tint


def mask_of(thing: Thing, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """Which pixels an object covers."""
    # twice the distance of pixels' centres from the object's middle, which is a pixel's corner
    y = 2 * (np.arange(height)[:, None] - thing.y) + 1
    x = 2 * (np.arange(width)[None] - thing.x) + 1
    half = SIZES[thing.size]
    if thing.is_digit:
        side = 2 * half // 7  # pixels of a glyph's pixel
        glyph = np.array([[bit == "1" for bit in row] for row in GLYPHS[thing.name].split()])
        rows, columns = (y + 7 * side) // (2 * side), (x + 5 * side) // (2 * side)
        inside = (rows >= 0) & (rows < 7) & (columns >= 0) & (columns < 5)
        return inside & glyph[rows.clip(0, 6), columns.clip(0, 4)]
    wide, reach = 2 * half, abs(x) + abs(y)
    masks = {
        "circle": x**2 + y**2 <= wide**2,
        "square": np.maximum(abs(x), abs(y)) <= wide * 7 // 8,
        "triangle": (abs(y) <= wide) & (2 * abs(x) <= y + wide),
        "diamond": reach <= wide,
        "cross": (np.minimum(abs(x), abs(y)) <= wide * 3 // 10)
        & (np.maximum(abs(x), abs(y)) <= wide),
    }
    return masks[thing.name]


def _either(words: Any) -> str:
    return " or ".join(map(str, words))


if __name__ == "__main__":
    from catp_jax.training.scene_sheet import command

    command()
