"""Fewer pixels and fewer tiles are what transformers' processor makes of a smaller image, or where
it is told to make fewer tiles.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import catp_jax
import convert
from catp_jax.readers.blip2 import Blip2Reader
from catp_jax.readers.mllama import MllamaReader
from catp_jax.readers.seen import Seen
from catp_jax.struct import replace

ASSETS = Path(catp_jax.__file__).parent / "assets"
LLAMA, BLIP2 = ASSETS / "mini-llama-vision", ASSETS / "mini-blip2-opt"


def reader_of(folder: Path, **seen: Any) -> Any:
    """The folder's reader, without weights."""
    kind: Any = MllamaReader if folder is LLAMA else Blip2Reader
    return replace(kind.load(folder, convert.load_config(folder)), seen=Seen(**seen))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width)
    return Image.fromarray(rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8))


SIZES = [(64, 64), (61, 30), (20, 64), (1, 1), (200, 40)]


def half(image: Image.Image, processor: Any) -> Image.Image:
    wide, high = (max(1, math.floor(side / 2 + 0.5)) for side in image.size)
    return image.resize((wide, high), processor.image_processor.resample)


@pytest.mark.parametrize("size", SIZES)
def test_llama_sees_what_transformers_makes_of_a_smaller_image(size: tuple[int, int]):
    reader, image = reader_of(LLAMA, image_scale=0.5), noise(*size)
    out = reader.processor.image_processor([[half(image, reader.processor)]], return_tensors="np")
    seen = reader.process_image(image)
    np.testing.assert_array_equal(seen.pixels, out["pixel_values"][0, 0])
    assert seen.aspect_ratio_id == out["aspect_ratio_ids"][0, 0]
    assert seen.num_tiles == out["num_tiles"][0][0]


def test_half_of_the_pixels_a_side_may_be_fewer_tiles():
    image = noise(64, 64)  # of four tiles of 32 × 32
    assert reader_of(LLAMA).process_image(image).num_tiles == 4
    assert reader_of(LLAMA, image_scale=0.5).process_image(image).num_tiles == 1


def test_blip2_sees_a_blurred_image_of_its_one_size():
    reader, image = reader_of(BLIP2, image_scale=0.5), noise(64, 64)
    out = reader.processor.image_processor([half(image, reader.processor)], return_tensors="np")
    question = reader.read([image], "what?", {})
    np.testing.assert_array_equal(question.images[0], out["pixel_values"][0])
    whole = reader_of(BLIP2).read([image], "what?", {}).images[0]
    assert question.images[0].shape == whole.shape
    assert np.abs(question.images[0] - whole).max() > 0.1


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
@pytest.mark.parametrize("size", SIZES)
def test_fewer_tiles_are_those_that_transformers_makes(size: tuple[int, int], tiles: int):
    from transformers.models.mllama.image_processing_pil_mllama import (
        get_all_supported_aspect_ratios,
    )

    reader, image = reader_of(LLAMA, tiles=tiles), noise(*size)
    out = reader.processor.image_processor([[image]], max_image_tiles=tiles, return_tensors="np")
    seen = reader.process_image(image)
    assert seen.num_tiles == out["num_tiles"][0][0] <= tiles
    assert seen.pixels.shape[0] == 4
    np.testing.assert_array_equal(seen.pixels[:tiles], out["pixel_values"][0, 0])
    assert not seen.pixels[tiles:].any()
    # the model counts the ratios of four tiles
    ratio = get_all_supported_aspect_ratios(tiles)[out["aspect_ratio_ids"][0, 0] - 1]
    assert reader.config.vision.supported_aspect_ratios[seen.aspect_ratio_id - 1] == ratio


def test_needed_boxes_lie_where_they_are_in_the_smaller_image():
    image = noise(64, 64)
    for seen, number in (({"image_scale": 0.5}, 1), ({"tiles": 1}, 1), ({}, 4)):
        reader = reader_of(LLAMA, **seen)
        packed = reader.pack([reader.read([image], "what?", {})])
        (found,) = reader.needed(None, packed, [image], [[(0.0, 0.0, 0.5, 1.0)]])
        patches = number * reader.config.vision.grid**2
        assert found.shape == (number * reader.config.vision.tokens_per_tile,)
        assert found.sum() == pytest.approx(patches / 2)


@pytest.mark.parametrize("scale", [0, -0.5, 1.5, math.nan, math.inf, True, "0.5"])
def test_a_scale_that_is_none_is_refused(scale: Any):
    with pytest.raises(ValueError, match="image_scale is above 0 and at most 1"):
        catp_jax.load(LLAMA, image_scale=scale)


@pytest.mark.parametrize("tiles", [0, -1, 1.5, True])
def test_a_number_of_tiles_that_is_none_is_refused(tiles: Any):
    with pytest.raises(ValueError, match="tiles is a whole number of at least 1"):
        catp_jax.load(LLAMA, tiles=tiles)


def test_tiles_that_the_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match="tiles is 1 to 4 for this model, got 5"):
        catp_jax.load(LLAMA, tiles=5)
    with pytest.raises(ValueError, match="images of this model have no tiles; image_scale"):
        catp_jax.load(BLIP2, tiles=1)


def test_a_model_that_sees_less_has_fewer_visual_tokens_and_says_so():
    model, image = catp_jax.load(LLAMA), noise(64, 64)
    for smaller, said in (
        (model.seeing(image_scale=0.5), {"image_scale": 0.5}),
        (model.seeing(tiles=1), {"tiles": 1}),
        (catp_jax.load(LLAMA, tiles=1), {"tiles": 1}),
    ):
        assert smaller.prepare([image], ["what?"]).available == (65,)
        assert smaller.describe() == model.describe() | said
    assert model.prepare([image], ["what?"]).available == (260,)
    assert model.seeing(tiles=1).seeing().prepare([image], ["what?"]).available == (260,)
