"""easy-VQA for training: cut-out shapes, composed anew in every batch.

    photo = paper + matte · (ink − paper)        every image of easy-VQA is made like this

The matte of one image, the colours of another and a random place on a canvas of any tile layout
make a new image whose answers are known: the shape is that of the first, the colour that of the
second. Labels come from the questions alone. A batch is a pure function of (seed, step), so a run
that resumes at a step sees what an uninterrupted one would have seen.
"""

import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from catp_jax.models.mllama import Images
from catp_jax.models.tiled_vit import TiledVitConfig
from catp_jax.struct import pytree
from catp_jax.study.tasks import Example

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

UNUSUAL_LAYOUT = 0.15  # share of training images that are not 2×2 tiles
CARELESS_TYPING = 0.2  # share of training questions with a capital letter or no question mark
COVERED = 0.25  # a patch with this much of the shape is labelled with it
TEXT_LENGTH = 18  # the longest question, its answer and the marks around them, in tokens

Encode = Callable[[str], list[int]]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Photo:
    """One image of easy-VQA taken apart, and what its questions say about it (-1: nothing)."""

    matte: Float[np.ndarray, "h w"]
    ink: Float[np.ndarray, " 3"]
    paper: Float[np.ndarray, " 3"]
    shape: int
    colour: int
    questions: tuple[tuple[str, str], ...]


@pytree
class DenseBatch:
    """Images, and for every token what covers it: 0 background, else 1 + index of the name.

    `weights` of an image sum to one, half of it on the shape; patches at its edge have none.
    """

    pixels: Float[Array, "i t c height width"]
    aspect_ratio_ids: Int[Array, " i"]
    aspect_ratio_mask: Bool[Array, "i t"]
    shapes: Int[Array, "i t n"]
    colours: Int[Array, "i t n"]
    weights: Float[Array, "i t n"]


@pytree
class QuestionBatch:
    """Images with `q` questions each; `targets` is the token a row should say, -1 for any."""

    images: Images
    tokens: Int[Array, "i q s"]
    token_valid: Bool[Array, "i q s"]
    targets: Int[Array, "i q s"]


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
    with Image.open(example.image) as image:
        return np.asarray(image.convert("RGB"))


def by_image(examples: Iterable[Example]) -> list[list[Example]]:
    """The examples of each image, images by number."""
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.image_id].append(example)
    return [groups[number] for number in sorted(groups)]


def split_tiles(
    canvas: Float[np.ndarray, "c height width"], layout: tuple[int, int], tiles: int
) -> Float[np.ndarray, "t c tile_height tile_width"]:
    """Cuts a canvas into its tiles, row by row, and adds empty ones up to `tiles`."""
    (rows, columns), (channels, height, width) = layout, canvas.shape
    cut = canvas.reshape(channels, rows, height // rows, columns, width // columns)
    cut = cut.transpose(1, 3, 0, 2, 4).reshape(rows * columns, channels, height // rows, -1)
    return np.pad(cut, ((0, tiles - len(cut)), (0, 0), (0, 0), (0, 0)))


def normalise(canvas: np.ndarray) -> Float[np.ndarray, "c height width"]:
    """Pixels of 0…255, channels last, as the image processor hands them to the model."""
    return ((canvas.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)


def patch_coverage(
    matte: Float[np.ndarray, "height width"],
    layout: tuple[int, int],
    config: TiledVitConfig,
) -> Float[np.ndarray, "t n"]:
    """Mean of a canvas-sized matte over every patch; class tokens and padding tiles have 0."""
    tiles = split_tiles(matte[None], layout, config.max_num_tiles)[:, 0]
    grid, patch = config.grid, config.patch_size
    means = tiles.reshape(-1, grid, patch, grid, patch).mean(axis=(2, 4)).reshape(-1, grid**2)
    return np.pad(means, ((0, 0), (1, 0)))


def dense_weights(
    coverage: Float[np.ndarray, "t n"], real_tiles: int
) -> tuple[Bool[np.ndarray, "t n"], Float[np.ndarray, "t n"]]:
    """Which tokens the shape covers, and the weight of every token's label."""
    covered, empty = coverage >= COVERED, coverage == 0
    empty[real_tiles:] = False
    weights = covered / max(covered.sum(), 1) + empty / max(empty.sum(), 1)
    return covered, (weights / weights.sum()).astype(np.float32)


class Composer:
    """Makes training batches out of photos. Every method is a function of its arguments alone."""

    def __init__(self, examples: Iterable[Example], config: TiledVitConfig, seed: int):
        self.config, self.seed = config, seed
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

    def compose(
        self, rng: np.random.Generator, matte: Float[np.ndarray, "h w"], colours: Photo
    ) -> tuple[Float[np.ndarray, "height width 3"], Float[np.ndarray, "height width"], int]:
        """A canvas with the matte at a random place, its matte, and its layout's number."""
        layouts = self.config.supported_aspect_ratios
        usual, side = layouts.index((2, 2)), self.config.image_size
        number = int(rng.integers(len(layouts))) if rng.random() < UNUSUAL_LAYOUT else usual
        if max(matte.shape) > side * min(layouts[number]):
            number = usual
        height, width = (side * tiles for tiles in layouts[number])
        if rng.random() < 0.5:
            matte = matte[:, ::-1]
        top = int(rng.integers(height - matte.shape[0] + 1))
        left = int(rng.integers(width - matte.shape[1] + 1))
        whole = np.zeros((height, width), np.float32)
        whole[top : top + matte.shape[0], left : left + matte.shape[1]] = matte
        canvas = colours.paper + whole[:, :, None] * (colours.ink - colours.paper)
        return np.rint(canvas), whole, number

    def dense(self, step: int, size: int) -> DenseBatch:
        """Batch number `step`: any shape in any colours, labelled token by token."""
        rng = np.random.default_rng((self.seed, 0, step))
        columns = defaultdict(list)
        for _ in range(size):
            shape, colour = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS)))
            cut, colours = pick(rng, self.of_shape[shape]), pick(rng, self.of_colour[colour])
            canvas, matte, number = self.compose(rng, cut.matte, colours)
            layout = self.config.supported_aspect_ratios[number]
            covered, weights = dense_weights(
                patch_coverage(matte, layout, self.config), layout[0] * layout[1]
            )
            columns["pixels"].append(
                split_tiles(normalise(canvas), layout, self.config.max_num_tiles)
            )
            columns["aspect_ratio_ids"].append(number + 1)
            columns["shapes"].append(covered * (1 + shape))
            columns["colours"].append(covered * (1 + colour))
            columns["weights"].append(weights)
        ids = np.array(columns.pop("aspect_ratio_ids"), np.int32)
        return DenseBatch(
            pixels=jnp.asarray(np.stack(columns["pixels"])),
            aspect_ratio_ids=jnp.asarray(ids),
            aspect_ratio_mask=jnp.asarray(tile_mask(self.config, ids)),
            shapes=jnp.asarray(np.stack(columns["shapes"]).astype(np.int32)),
            colours=jnp.asarray(np.stack(columns["colours"]).astype(np.int32)),
            weights=jnp.asarray(np.stack(columns["weights"])),
        )

    def questions(
        self, step: int, size: int, each: int, text: "Text", is_plain: bool = False
    ) -> QuestionBatch:
        """Batch number `step`: photos' questions beside another image of the same answers.

        Questions are drawn by the rarity of their answer to that question. Seven of eight "is there
        a red shape?" are answered no; drawn evenly, a model is long content to say so unseen.

        With `is_plain`, none has a "no" or "not" in it.
        """
        rng = np.random.default_rng((self.seed, 1, step))
        pixels, ids, asked = [], [], []
        for _ in range(size):
            photo = pick(rng, self.plain_photos if is_plain else self.photos)
            cut = pick(rng, self.of_shape[photo.shape]) if photo.shape >= 0 else photo
            colours = pick(rng, self.of_colour[photo.colour]) if photo.colour >= 0 else photo
            canvas, _, number = self.compose(rng, cut.matte, colours)
            layout = self.config.supported_aspect_ratios[number]
            pixels.append(split_tiles(normalise(canvas), layout, self.config.max_num_tiles))
            ids.append(number + 1)
            own = [q for q in photo.questions if not (is_plain and is_negated(q[0]))]
            rarity = np.array([self.rarity[pair] for pair in own])
            chosen = rng.choice(len(own), size=each, p=rarity / rarity.sum())
            pairs = [own[number] for number in chosen]
            asked.append([(careless(rng, question), answer) for question, answer in pairs])
        return text.batch(
            np.stack(pixels), np.array(ids, np.int32), asked, each=each, config=self.config
        )


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of the items, each as likely."""
    return items[int(rng.integers(len(items)))]


def careless(rng: np.random.Generator, question: str) -> str:
    """The question, now and then with a capital letter at its start or no mark at its end."""
    if rng.random() < CARELESS_TYPING / 2:
        question = question[0].upper() + question[1:]
    return question.removesuffix("?") if rng.random() < CARELESS_TYPING / 2 else question


def tile_mask(config: TiledVitConfig, ids: Int[np.ndarray, " i"]) -> Bool[np.ndarray, "i t"]:
    """Which tiles are real, for aspect ratios by id."""
    counts = np.array([rows * columns for rows, columns in config.supported_aspect_ratios])
    return np.arange(config.max_num_tiles)[None] < counts[ids - 1][:, None]


@dataclasses.dataclass(frozen=True)
class Text:
    """Turns questions and answers into rows of tokens, `prompt · answer · end`."""

    encode: Encode
    end: int
    padding: int

    def prompt(self, question: str) -> list[int]:
        """What the processor makes of `<|image|>` and the question."""
        return list(_encoded(self.encode, f"<|image|><|begin_of_text|>{question}"))

    def answer(self, answer: str) -> list[int]:
        """The answer as a word after the question, and the end of the turn."""
        return [*_encoded(self.encode, f" {answer}"), self.end]

    def batch(
        self,
        pixels: Float[np.ndarray, "i t c height width"],
        ids: Int[np.ndarray, " i"],
        asked: list[list[tuple[str, str]]],
        each: int,
        config: TiledVitConfig,
    ) -> QuestionBatch:
        """One batch, `each` questions an image; images with fewer have empty rows."""
        shape = (len(asked), each, TEXT_LENGTH)
        tokens, targets = np.full(shape, self.padding, np.int32), np.full(shape, -1, np.int32)
        valid = np.zeros(shape, bool)
        for image, questions in enumerate(asked):
            for row, (question, answer) in enumerate(questions):
                prompt, reply = self.prompt(question), self.answer(answer)
                line = prompt + reply
                if len(line) > TEXT_LENGTH:
                    raise ValueError(f"{question!r} takes {len(line)} tokens of {TEXT_LENGTH}")
                tokens[image, row, : len(line)] = line
                valid[image, row, : len(line)] = True
                targets[image, row, len(prompt) - 1 : len(line) - 1] = reply
        mask = tile_mask(config, ids)
        tiles = np.arange(mask.size, dtype=np.int32).reshape(mask.shape)
        images = Images(
            pixels=jnp.asarray(pixels),
            aspect_ratio_ids=jnp.asarray(ids),
            aspect_ratio_mask=jnp.asarray(mask),
            tile_index=jnp.asarray(tiles),
            tile_valid=jnp.asarray(mask),
            tile_seen=jnp.asarray(np.repeat(mask[:, None], TEXT_LENGTH, axis=1)),
        )
        return QuestionBatch(
            images=images,
            tokens=jnp.asarray(tokens),
            token_valid=jnp.asarray(valid),
            targets=jnp.asarray(targets),
        )


def evaluation_batches(
    examples: Iterable[Example], text: Text, config: TiledVitConfig, size: int
) -> list[QuestionBatch]:
    """Every example as it is, `size` images a batch; the last batch repeats none, it has fewer
    questions.
    """
    groups = by_image(examples)
    each = max(len(group) for group in groups)
    number = config.supported_aspect_ratios.index((2, 2)) + 1
    batches = []
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        pixels = np.stack(
            [
                split_tiles(normalise(read_image(group[0])), (2, 2), config.max_num_tiles)
                for group in part
            ]
        )
        asked = [[(e.question, e.answer) for e in group] for group in part]
        spare = size - len(part)
        pixels = np.pad(pixels, ((0, spare), (0, 0), (0, 0), (0, 0), (0, 0)))
        ids = np.full(size, number, np.int32)
        batches.append(text.batch(pixels, ids, asked + [[]] * spare, each=each, config=config))
    return batches


@functools.lru_cache(maxsize=4096)
def _encoded(encode: Encode, text: str) -> tuple[int, ...]:
    return tuple(encode(text))
