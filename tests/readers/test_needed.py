"""Which visual tokens are about a part of an image."""

import numpy as np
import pytest

import catp_jax
from catp_jax.readers.reading import covered
from tests.shallow import shallow


def test_patches_are_covered_by_their_share():
    shares = covered([(0.0, 0.0, 0.5, 0.25), (0.25, 0.125, 0.375, 0.25)], 4, 4)
    np.testing.assert_allclose(shares[0], [1, 1, 0, 0])
    np.testing.assert_allclose(shares[1:], 0)
    np.testing.assert_allclose(covered([(0.125, 0.5, 0.25, 0.75)], 2, 4)[1], [0.25, 0, 0, 0])
    assert covered([], 3, 2).tolist() == [[0, 0]] * 3


@pytest.fixture(scope="module")
def llama():
    return catp_jax.load(shallow("mini-llama-vision"))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (48, 64), (40, 128)])
def test_tokens_of_llama_vision_are_those_whose_pixels_change(llama, height, width):
    """By another way: paint the box, and see which patches of the model's input are other ones."""
    box = (0.5, 0.25, 0.75, 0.75)
    plain = np.zeros((height, width, 3), np.uint8)
    painted = plain.copy()
    top, bottom = int(box[1] * height), int(box[3] * height)
    painted[top:bottom, int(box[0] * width) : int(box[2] * width)] = 255
    packed = llama.prepare([plain], ["what is it?"])
    (needed,) = llama.reader.needed(None, packed, [plain], [[box]])
    assert needed.shape == (packed.available[0],)
    before, after = (llama.reader.process_image(image).pixels for image in (plain, painted))
    grid, patch = llama.config.vision.grid, llama.config.vision.patch_size
    tiles = packed.available[0] // llama.config.vision.tokens_per_tile
    other = np.abs(after - before).max(axis=1)[:tiles]
    share = (other > 1.0).reshape(tiles, grid, patch, grid, patch).mean(axis=(2, 4))
    expected = np.pad(share.reshape(tiles, -1), ((0, 0), (1, 0))).reshape(-1)
    assert needed.max() == 1.0
    np.testing.assert_allclose(needed, expected, atol=0.3)  # edges are smeared by resizing
    assert np.abs(needed - expected).mean() < 0.03


def test_queries_of_blip2_have_their_looks_share():
    model = catp_jax.load(shallow("mini-blip2-opt"))
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    packed = model.prepare([image] * 3, ["what is it?"] * 3)
    boxes = [[(0.0, 0.0, 0.5, 1.0)], [(0.5, 0.0, 1.0, 1.0)], [(0.0, 0.0, 1.0, 1.0)]]
    left, right, whole = model.reader.needed(model.network, packed, [image] * 3, boxes)
    (again,) = model.reader.needed(None, model.encode(packed), [image], boxes[:1])
    np.testing.assert_allclose(again, left, atol=1e-5)
    assert left.shape == (32,)
    np.testing.assert_allclose(left + right, whole, atol=1e-5)
    assert (whole > 0.5).all()  # but what goes to the class token
    assert (whole <= 1.0 + 1e-5).all()
