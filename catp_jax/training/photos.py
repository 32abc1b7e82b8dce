"""easy-VQA's images taken apart, and put together anew.

    photo = paper + matte · (ink − paper)        every image of easy-VQA is made like this

The matte of one image, the colours of another and a random place on a canvas make a new image whose
answers are known: the shape is that of the first, the colour that of the second. Labels come from
the questions alone. What a batch is depends on the model: `data`, `blip2_data`.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from catp_jax.study.tasks import Example

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

CARELESS_TYPING = 0.2  # share of training questions with a capital letter or no question mark
COVERED = 0.25  # a patch with this much of the shape is labelled with it

T = TypeVar("T")
Pairs = list[tuple[str, str]]
"""Questions and their answers."""


@dataclasses.dataclass(frozen=True)
class Photo:
    """One image of easy-VQA taken apart, and what its questions say about it (-1: nothing)."""

    matte: Float[np.ndarray, "h w"]
    ink: Float[np.ndarray, " 3"]
    paper: Float[np.ndarray, " 3"]
    shape: int
    colour: int
    questions: tuple[tuple[str, str], ...]


def is_negated(question: str) -> bool:
    """Whether there is a "no" or "not" in the question."""
    return bool({"no", "not"} & set(re.findall(r"\w+", question)))


def names_in(questions: Iterable[tuple[str, str]], names: tuple[str, ...]) -> int:
    """Index of the one name that the questions and answers say the image has; -1 if none does.

    "what color is the circle?" says there is a circle, and so do "is there a circle?" with yes and
    "is there not a circle?" with no.
    """
    found = set()
    for question, answer in questions:
        words = set(re.findall(r"\w+", question))
        if answer in names:
            found.add(answer)
        elif answer not in ("yes", "no") or (answer == "yes") != is_negated(question):
            found |= words & set(names)
    if len(found) > 1:
        raise ValueError(f"the questions of one image name {sorted(found)}; one was wanted")
    return names.index(found.pop()) if found else -1


def take_apart(pixels: UInt8[np.ndarray, "height width 3"], questions: tuple) -> Photo:
    """Finds the background, the shape's colour (the two commonest) and how far each pixel is it."""
    numbers = pixels.reshape(-1, 3).astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    _, places, counts = np.unique(numbers, return_index=True, return_counts=True)
    if len(counts) < 2:
        raise ValueError("an image of one colour shows no shape")
    order = places[np.argsort(-counts, kind="stable")]
    paper, ink = pixels.reshape(-1, 3)[order[:2]].astype(np.float32)
    away = ink - paper
    matte = np.clip((pixels.astype(np.float32) - paper) @ away / (away @ away), 0, 1)
    rows, columns = (np.flatnonzero(matte.max(axis=axis) > 0) for axis in (1, 0))
    return Photo(
        matte=matte[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1],
        ink=ink,
        paper=paper,
        shape=names_in(questions, SHAPES),
        colour=names_in(questions, COLOURS),
        questions=questions,
    )


def read_image(example: Example) -> UInt8[np.ndarray, "height width 3"]:
    """An example's image as it is."""
    if isinstance(example.image, np.ndarray):
        return example.image
    with Image.open(example.image) as image:
        return np.asarray(image.convert("RGB"))


def by_image(examples: Iterable[Example]) -> list[list[Example]]:
    """The examples of each image, images by number."""
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.image_id].append(example)
    return [groups[number] for number in sorted(groups)]


def normalise(canvas: np.ndarray) -> Float[np.ndarray, "c height width"]:
    """Pixels of 0…255, channels last, as the image processor hands them to the model."""
    return ((canvas.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)


def dense_weights(
    coverage: Float[np.ndarray, "t n"], real_tiles: int
) -> tuple[Bool[np.ndarray, "t n"], Float[np.ndarray, "t n"]]:
    """Which tokens the shape covers, and the weight of every token's label."""
    covered, empty = coverage >= COVERED, coverage == 0
    empty[real_tiles:] = False
    weights = covered / max(covered.sum(), 1) + empty / max(empty.sum(), 1)
    return covered, (weights / weights.sum()).astype(np.float32)


class Photos:
    """All images of some examples, and draws from them; `seed` fixes every batch made of them."""

    def __init__(self, examples: Iterable[Example], seed: int):
        self.seed = seed
        self.photos = [
            take_apart(read_image(group[0]), tuple((e.question, e.answer) for e in group))
            for group in by_image(examples)
        ]
        self.plain_photos = [
            p for p in self.photos if not all(is_negated(question) for question, _ in p.questions)
        ]
        asked = Counter(q for photo in self.photos for q, _ in photo.questions)
        answered = Counter(pair for photo in self.photos for pair in photo.questions)
        self.rarity = {pair: asked[pair[0]] / count for pair, count in answered.items()}
        self.of_shape = [
            [p for p in self.photos if p.shape == number] for number in range(len(SHAPES))
        ]
        self.of_colour = [
            [p for p in self.photos if p.colour == number] for number in range(len(COLOURS))
        ]
        if not all(self.of_shape) or not all(self.of_colour):
            raise ValueError("the examples do not show every shape and every colour")

    def any_look(self, rng: np.random.Generator) -> tuple[int, int, Photo, Photo]:
        """A shape, a colour, a photo with that shape and another with that colour."""
        shape, colour = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))
        return shape, colour, pick(rng, self.of_shape[shape]), pick(rng, self.of_colour[colour])

    def same_look(self, rng: np.random.Generator, is_plain: bool) -> tuple[Photo, Photo, Photo]:
        """A photo, another of the same shape and a third of the same colour.

        With `is_plain`, the first has a question without "no" or "not".
        """
        photo = pick(rng, self.plain_photos if is_plain else self.photos)
        cut = pick(rng, self.of_shape[photo.shape]) if photo.shape >= 0 else photo
        colours = pick(rng, self.of_colour[photo.colour]) if photo.colour >= 0 else photo
        return photo, cut, colours

    def ask(self, rng: np.random.Generator, photo: Photo, each: int, is_plain: bool) -> Pairs:
        """Questions about a photo, drawn by the rarity of their answer to that question.

        Seven of eight "is there a red shape?" are answered no; drawn evenly, a model is long
        content to say so unseen. With `is_plain`, none has a "no" or "not" in it.
        """
        usable = [q for q in photo.questions if not (is_plain and is_negated(q[0]))]
        rarity = np.array([self.rarity[pair] for pair in usable])
        chosen = rng.choice(len(usable), size=each, p=rarity / rarity.sum())
        return [
            (careless(rng, question), answer)
            for question, answer in map(usable.__getitem__, chosen)
        ]


def put_together(
    rng: np.random.Generator,
    matte: Float[np.ndarray, "h w"],
    colours: Photo,
    size: tuple[int, int],
) -> tuple[Float[np.ndarray, "height width 3"], Float[np.ndarray, "height width"]]:
    """A canvas of `size` with the matte at a random place in those colours, and its matte."""
    height, width = size
    if rng.random() < 0.5:
        matte = matte[:, ::-1]
    top = int(rng.integers(height - matte.shape[0] + 1))
    left = int(rng.integers(width - matte.shape[1] + 1))
    whole = np.zeros((height, width), np.float32)
    whole[top : top + matte.shape[0], left : left + matte.shape[1]] = matte
    canvas = colours.paper + whole[:, :, None] * (colours.ink - colours.paper)
    return np.rint(canvas), whole


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, each as likely."""
    return items[int(rng.integers(len(items)))]


def careless(rng: np.random.Generator, question: str) -> str:
    """The question, now and then with a capital letter at its start or no mark at its end."""
    if rng.random() < CARELESS_TYPING / 2:
        question = question[0].upper() + question[1:]
    return question.removesuffix("?") if rng.random() < CARELESS_TYPING / 2 else question
