"""Batches of easy-VQA for a model of tiled images, `photos` composed anew in every one.

A batch is a pure function of (seed, step), so a run that resumes at a step sees what an
uninterrupted one would have seen.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from catp_jax.models.mllama import Images
from catp_jax.models.tiled_vit import TiledVitConfig
from catp_jax.struct import pytree
from catp_jax.study.tasks import Example
from catp_jax.training.photos import (
    Photo,
    Photos,
    by_image,
    dense_weights,
    normalise,
    put_together,
    read_image,
)
from catp_jax.training.tokenizer import EOT, PAD
from catp_jax.training.turns import Turn, line

UNUSUAL_LAYOUT = 0.15  # share of training images that are not 2×2 tiles
TEXT_LENGTH = 18  # the longest question, its answer and the marks around them, in tokens

Encode = Callable[[str], list[int]]


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


def split_tiles(
    canvas: Float[np.ndarray, "c height width"], layout: tuple[int, int], tiles: int
) -> Float[np.ndarray, "t c tile_height tile_width"]:
    """Cuts a canvas into its tiles, row by row, and adds empty ones up to `tiles`."""
    (rows, columns), (channels, height, width) = layout, canvas.shape
    cut = canvas.reshape(channels, rows, height // rows, columns, width // columns)
    cut = cut.transpose(1, 3, 0, 2, 4).reshape(rows * columns, channels, height // rows, -1)
    return np.pad(cut, ((0, tiles - len(cut)), (0, 0), (0, 0), (0, 0)))


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


class Composer(Photos):
    """Makes training batches out of photos. Every method is a function of its arguments alone."""

    def __init__(self, examples: Iterable[Example], config: TiledVitConfig, seed: int):
        super().__init__(examples, seed)
        self.config = config

    def compose(
        self, rng: np.random.Generator, matte: Float[np.ndarray, "h w"], colours: Photo
    ) -> tuple[Float[np.ndarray, "height width 3"], Float[np.ndarray, "height width"], int]:
        """A canvas with the matte at a random place, its matte, and its layout's number."""
        layouts = self.config.supported_aspect_ratios
        usual, side = layouts.index((2, 2)), self.config.image_size
        number = int(rng.integers(len(layouts))) if rng.random() < UNUSUAL_LAYOUT else usual
        if max(matte.shape) > side * min(layouts[number]):
            number = usual
        rows, columns = layouts[number]
        canvas, whole = put_together(rng, matte, colours, (rows * side, columns * side))
        return canvas, whole, number

    def dense(self, step: int, size: int) -> DenseBatch:
        """Batch number `step`: any shape in any colours, labelled token by token."""
        rng = np.random.default_rng((self.seed, 0, step))
        columns = defaultdict(list)
        for _ in range(size):
            shape, colour, cut, colours = self.any_look(rng)
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
        """Batch number `step`: photos' questions beside another image of the same answers."""
        rng = np.random.default_rng((self.seed, 1, step))
        pixels, ids, asked = [], [], []
        for _ in range(size):
            photo, cut, colours = self.same_look(rng, is_plain)
            canvas, _, number = self.compose(rng, cut.matte, colours)
            layout = self.config.supported_aspect_ratios[number]
            pixels.append(split_tiles(normalise(canvas), layout, self.config.max_num_tiles))
            ids.append(number + 1)
            asked.append(self.ask(rng, photo, each, is_plain))
        return text.batch(
            np.stack(pixels), np.array(ids, np.int32), asked, each=each, config=self.config
        )


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

    @classmethod
    def of(cls, tokenizer: Any) -> "Text":
        """In a tokenizer's words."""
        end, padding = tokenizer.convert_tokens_to_ids([EOT, PAD])
        return cls(tokenizer.encode, end, padding)

    def prompt(self, question: str) -> list[int]:
        """What the processor makes of `<|image|>` and the question."""
        return list(_encoded(self.encode, f"<|image|><|begin_of_text|>{question}"))

    def answer(self, answer: str) -> list[int]:
        """The answer as a word after the question. A digit has no space in front: the tokenizer
        would make two tokens of it.
        """
        return self.words(answer) if not answer.isdecimal() else list(_encoded(self.encode, answer))

    def words(self, text: str) -> list[int]:
        """Words after others."""
        return list(_encoded(self.encode, f" {text}"))

    def rows(
        self, asked: list[list[Sequence[Turn]]], each: int, length: int = TEXT_LENGTH
    ) -> tuple[Int[np.ndarray, "i q s"], Bool[np.ndarray, "i q s"], Int[np.ndarray, "i q s"]]:
        """Tokens, which of them are any, and targets, `each` rows an image; images with fewer have
        empty ones.
        """
        shape = (len(asked), each, length)
        tokens, targets = np.full(shape, self.padding, np.int32), np.full(shape, -1, np.int32)
        valid = np.zeros(shape, bool)
        for image, questions in enumerate(asked):
            for row, turns in enumerate(questions):
                said, follows = line(turns, self.prompt, self.words, self.answer, self.end, length)
                tokens[image, row, : len(said)] = said
                valid[image, row, : len(said)] = True
                targets[image, row, : len(said)] = follows
        return tokens, valid, targets

    def batch(
        self,
        pixels: Float[np.ndarray, "i t c height width"],
        ids: Int[np.ndarray, " i"],
        asked: list[list[tuple[str, str]]],
        each: int,
        config: TiledVitConfig,
    ) -> QuestionBatch:
        """One batch, `each` questions an image; images with fewer have empty rows."""
        turns: list[list[Sequence[Turn]]] = [[(pair,) for pair in pairs] for pairs in asked]
        tokens, valid, targets = self.rows(turns, each)
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
