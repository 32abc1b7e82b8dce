"""Llama 3.2 Vision: from token lists and tiled images to arrays of few shapes.

A text row sees the images of its span: from their `<|image|>` mark up to the next one; marks that
follow each other directly share a span.

    text   <bos>  hello  <|image|>  what  <|image|> <|image|>  and  now
    sees     -      -        0       0        1       1 2      1 2  1 2
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.generation.buckets import TILE_COUNTS, round_up
from catp_jax.models.cross_decoder import MaskMode
from catp_jax.models.mllama import Images, Inputs, MllamaConfig
from catp_jax.models.tiled_vit import VisionMode
from catp_jax.readers.packing import Packed, image_room, pad_prompts


@dataclasses.dataclass(frozen=True)
class ProcessedImage:
    """One image as the processor leaves it: tiles [max_num_tiles, 3, size, size], padding last."""

    pixels: np.ndarray
    aspect_ratio_id: int
    num_tiles: int

    @classmethod
    def padding(cls, config: MllamaConfig) -> "ProcessedImage":
        """The image that transformers pads a batch with."""
        vision = config.vision
        shape = (vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)
        return cls(np.zeros(shape, np.float32), 0, 0)


@dataclasses.dataclass(frozen=True)
class MllamaPacked(Packed[Inputs]):
    """`tiles[b]` lists a prompt's tiles as (image, tile), in the order in which its visual tokens
    are counted.
    """

    tiles: tuple[tuple[tuple[int, int], ...], ...]


def image_spans(tokens: Sequence[int], image_token: int) -> list[tuple[int, int]]:
    """For each image mark the rows [start, end) that see its image."""
    starts = [row for row, token in enumerate(tokens) if token == image_token]
    ends = [*starts, len(tokens)][1:]
    for index in range(len(starts) - 2, -1, -1):
        if ends[index] == starts[index] + 1:
            ends[index] = ends[index + 1]
    return list(zip(starts, ends, strict=True))


def check_marks(tokens: Sequence[int], images: int, image_token: int) -> None:
    """Raises ValueError if a prompt is empty or has not one mark for each image."""
    if not tokens:
        raise ValueError("the prompt is empty")
    marks = sum(token == image_token for token in tokens)
    if marks != images:
        raise ValueError(
            f"the prompt has {marks} <|image|> marks and {images} images; give one mark for each"
        )


def pack(
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[ProcessedImage]],
    config: MllamaConfig,
    mask_mode: MaskMode = "meta",
    vision_mode: VisionMode | None = None,
    shares: int = 1,
) -> MllamaPacked:
    """Arrays for the model; `images[b]` belong to the marks of `prompts[b]` in order.

    An image object that stands in several prompts is encoded once; `shares` say into how many parts
    the images will be split.

    In mask mode "hf" every prompt gets all tiles of as many images as the batch's richest one,
    padding included, since there some rows attend to padding.

    Raises ValueError if a prompt is empty or its marks and images differ in number.
    """
    mark, most_tiles = config.image_token_index, config.vision.max_num_tiles
    per_tile = config.vision.tokens_per_tile
    for number, (tokens, group) in enumerate(zip(prompts, images, strict=True)):
        try:
            check_marks(tokens, len(group), mark)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
    text, valid = pad_prompts(prompts)

    richest = max(len(group) for group in images)
    if mask_mode == "hf":
        blank = ProcessedImage.padding(config)
        images = [[*group, *[blank] * (richest - len(group))] for group in images]
    tiles = tuple(
        tuple(
            (number, tile)
            for number, image in enumerate(group)
            for tile in range(most_tiles if mask_mode == "hf" else image.num_tiles)
        )
        for group in images
    )
    packed_images = None
    if richest:
        seen = [image_spans(tokens, mark) for tokens in prompts]
        packed_images = _images(images, tiles, seen, text.shape[1], config, vision_mode, shares)
    return MllamaPacked(
        inputs=Inputs(
            mask_mode=mask_mode,
            tokens=text,
            token_valid=valid,
            images=packed_images,
        ),
        tiles=tiles,
        available=tuple(sum(image.num_tiles for image in group) * per_tile for group in images),
        most=None,
        capacity=0 if packed_images is None else packed_images.tile_index.shape[1] * per_tile,
        longest=max(len(tokens) for tokens in prompts),
    )


def _images(
    images: Sequence[Sequence[ProcessedImage]],
    tiles: Sequence[Sequence[tuple[int, int]]],
    spans: Sequence[Sequence[tuple[int, int]]],
    length: int,
    config: MllamaConfig,
    vision_mode: VisionMode | None,
    shares: int,
) -> Images:
    most_tiles = config.vision.max_num_tiles
    # an image that several prompts share is encoded once
    distinct = {id(image): image for group in images for image in group}
    place_of = {key: place for place, key in enumerate(distinct)}
    flat = list(distinct.values())
    flat += [ProcessedImage.padding(config)] * (image_room(len(flat), shares) - len(flat))

    batch, room = len(images), round_up(max(len(group) for group in tiles), TILE_COUNTS)
    index = np.zeros((batch, room), np.int32)
    valid = np.zeros((batch, room), bool)
    seen = np.zeros((batch, length, room), bool)
    for row, group in enumerate(tiles):
        for place, (number, tile) in enumerate(group):
            index[row, place] = place_of[id(images[row][number])] * most_tiles + tile
            valid[row, place] = True
            if number < len(spans[row]) and tile < images[row][number].num_tiles:
                start, end = spans[row][number]
                seen[row, start:end, place] = True

    # an image of padding has one tile that counts as real, as in transformers
    real = np.asarray([max(image.num_tiles, 1) for image in flat])
    return Images(
        vision_mode=vision_mode,
        pixels=np.stack([image.pixels for image in flat]),
        aspect_ratio_ids=np.asarray([image.aspect_ratio_id for image in flat], np.int32),
        aspect_ratio_mask=np.arange(most_tiles)[None] < real[:, None],
        tile_index=index,
        tile_valid=valid,
        tile_seen=seen,
    )


def abstract_inputs(
    config: MllamaConfig, batch: int, length: int, tiles: int | None
) -> tuple[Inputs, int]:
    """The shapes of `batch` prompts of `length` tokens with an image of `tiles` each (None: as many
    as there may be), and the visual tokens of one.
    """
    most, side = config.vision.max_num_tiles, config.vision.image_size
    number = most if tiles is None else tiles
    if not 1 <= number <= most:
        raise ValueError(f"an image has 1 to {most} tiles, got {tiles}")

    def make() -> Inputs:
        return Inputs(
            tokens=jnp.zeros((batch, length), jnp.int32),
            token_valid=jnp.ones((batch, length), bool),
            images=Images(
                pixels=jnp.zeros((batch, most, 3, side, side), jnp.float32),
                aspect_ratio_ids=jnp.zeros((batch,), jnp.int32),
                aspect_ratio_mask=jnp.ones((batch, most), bool),
                tile_index=jnp.zeros((batch, number), jnp.int32),
                tile_valid=jnp.ones((batch, number), bool),
                tile_seen=jnp.ones((batch, length, number), bool),
            ),
        )

    return jax.eval_shape(make), number * config.vision.tokens_per_tile


@dataclasses.dataclass(frozen=True)
class KeptTokens:
    """The visual tokens of one prompt that pruning kept, in their original order.

    Each field has one entry a token. `row` and `column` count patches within the tile; both are -1
    for a tile's class token, which stands for no place.
    """

    number: np.ndarray
    image: np.ndarray
    tile: np.ndarray
    row: np.ndarray
    column: np.ndarray

    def as_rows(self) -> list[dict[str, int]]:
        """One record a token, for JSON."""
        names = ("image", "tile", "row", "column")
        columns = (getattr(self, name).tolist() for name in names)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def locate(
    numbers: np.ndarray, tiles: Sequence[tuple[int, int]], config: MllamaConfig
) -> KeptTokens:
    """Where the visual tokens `numbers` of a prompt with these `tiles` come from."""
    per_tile, grid = config.vision.tokens_per_tile, config.vision.grid
    places = np.asarray(tiles, np.int64).reshape(-1, 2)[numbers // per_tile]
    patch = numbers % per_tile - 1
    is_class = patch < 0
    return KeptTokens(
        number=numbers,
        image=places[:, 0],
        tile=places[:, 1],
        row=np.where(is_class, -1, patch // grid),
        column=np.where(is_class, -1, patch % grid),
    )
