"""Images as people have them, in memory and in files: every mode and format has its colours."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from catp_jax.readers.images import read_image
from tests.readers.pictures import BLUE, GREEN, RED, WHITE, corners, four_colours


@pytest.mark.parametrize("extension", ["png", "bmp", "tiff", "webp", "gif", "ppm"])
def test_plain_colours_come_out_as_they_are(tmp_path: Path, extension: str):
    path = tmp_path / f"image.{extension}"
    options = {"lossless": True} if extension == "webp" else {}
    four_colours().save(path, **options)
    for source in (path, str(path)):
        image = read_image(source)
        assert image.mode == "RGB"
        assert image.size == (4, 2)
        assert corners(image) == (RED, GREEN, BLUE, WHITE)


def test_an_image_stays_readable_after_its_file_is_gone(tmp_path: Path):
    path = tmp_path / "image.png"
    four_colours().save(path)
    image = read_image(path)
    path.unlink()
    assert corners(image) == (RED, GREEN, BLUE, WHITE)


def test_cmyk_jpeg_has_its_colours(tmp_path: Path):
    path = tmp_path / "image.jpg"
    Image.new("RGB", (16, 16), (250, 20, 30)).convert("CMYK").save(path, quality=100)
    image = read_image(path)
    assert image.mode == "RGB"
    np.testing.assert_allclose(image.getpixel((8, 8)), (250, 20, 30), atol=6)


def test_palette_without_transparency(tmp_path: Path):
    path = tmp_path / "image.png"
    four_colours().convert("P", palette=Image.Palette.ADAPTIVE, colors=4).save(path)
    with Image.open(path) as stored:
        assert stored.mode == "P"
    assert corners(read_image(path)) == (RED, GREEN, BLUE, WHITE)


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette_with_transparency_is_laid_over_white(tmp_path: Path, extension: str):
    path = tmp_path / f"image.{extension}"
    image = Image.new("P", (4, 2), 0)
    image.putpalette([*RED, *BLUE, *GREEN])
    image.putpixel((3, 0), 1)
    image.save(path, transparency=0)
    assert corners(read_image(path)) == (WHITE, BLUE, WHITE, WHITE)


def test_palette_with_transparency_by_degrees(tmp_path: Path):
    path = tmp_path / "image.png"
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=bytes([128, 255]))
    left, right = (read_image(path).getpixel((x, 0)) for x in (0, 1))
    np.testing.assert_allclose(left, (255, 127, 127), atol=1)
    assert right == BLUE


def test_rgba_is_laid_over_white(tmp_path: Path):
    path = tmp_path / "image.png"
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))  # transparent black, the usual background
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((0, 1), (0, 0, 255, 128))
    image.save(path)
    read = read_image(path)
    assert corners(read)[:2] == (WHITE, RED)
    np.testing.assert_allclose(read.getpixel((0, 1)), (127, 127, 255), atol=1)


def test_grey_with_alpha_is_laid_over_white(tmp_path: Path):
    path = tmp_path / "image.png"
    image = Image.new("LA", (2, 1), (0, 0))
    image.putpixel((1, 0), (40, 255))
    image.save(path)
    read = read_image(path)
    assert (read.getpixel((0, 0)), read.getpixel((1, 0))) == (WHITE, (40, 40, 40))


def test_one_bit(tmp_path: Path):
    path = tmp_path / "image.png"
    image = Image.new("1", (2, 1), 0)
    image.putpixel((1, 0), 1)
    image.save(path)
    read = read_image(path)
    assert (read.getpixel((0, 0)), read.getpixel((1, 0))) == ((0, 0, 0), WHITE)


def test_grey(tmp_path: Path):
    path = tmp_path / "image.jpg"
    Image.new("L", (16, 16), 77).save(path, quality=100)
    np.testing.assert_allclose(read_image(path).getpixel((8, 8)), (77, 77, 77), atol=2)


@pytest.mark.parametrize("extension", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_not_clipped_to_white(tmp_path: Path, extension: str):
    path = tmp_path / f"image.{extension}"
    values = np.asarray([[0, 257, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(path)
    read = np.asarray(read_image(path))
    assert read[0, :, 0].tolist() == [0, 1, 100, 255]
    assert (read == read[:, :, :1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_upright(tmp_path: Path, orientation: int):
    # As cameras do: the pixels as the sensor lay, and a note how to turn them.
    lay = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    upright = four_colours(40, 20)
    path = tmp_path / "image.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if lay is None else upright.transpose(lay)).save(path, exif=exif)
    read = read_image(path)
    assert read.size == (40, 20)
    assert corners(read) == (RED, GREEN, BLUE, WHITE)


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000), (1, 500)])
def test_tiny_and_very_long_images_are_read_and_processed(tmp_path: Path, size):
    path = tmp_path / "image.png"
    Image.new("RGB", size, (200, 10, 10)).save(path)
    image = read_image(path)
    assert image.size == size
    processor = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    out = processor([[image]], return_tensors="np")
    assert out["pixel_values"].shape == (1, 1, 4, 3, 32, 32)
    assert np.isfinite(out["pixel_values"]).all()
    assert 1 <= out["num_tiles"][0][0] <= 4
    assert out["aspect_ratio_ids"][0, 0] >= 1
    # the image is there: its red is not its blue (padding, left as it is, has no colour)
    first = out["pixel_values"][0, 0, 0]
    assert first[0].max() > first[2].max()


def test_an_animation_is_its_first_picture(tmp_path: Path):
    path = tmp_path / "image.gif"
    Image.new("RGB", (8, 8), RED).save(
        path, save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)]
    )
    assert read_image(path).getpixel((4, 4)) == RED


def test_pil_images_are_treated_as_files_are():
    transparent = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert read_image(transparent).getpixel((0, 0)) == WHITE
    assert transparent.getpixel((0, 0)) == (0, 0, 0, 0)  # left alone
    turned = four_colours().transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert corners(read_image(turned)) == (RED, GREEN, BLUE, WHITE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX",
                                  "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "I;16B"])  # fmt: skip
def test_every_mode_of_pil_becomes_rgb(mode: str):
    image = read_image(Image.new(mode, (3, 2)))
    assert (image.mode, image.size) == ("RGB", (3, 2))


# --- arrays -----------------------------------------------------------------------------------


def test_arrays_of_bytes_and_of_floats():
    pixels = np.asarray([[RED, GREEN], [BLUE, WHITE]], np.uint8)
    assert corners(read_image(pixels)) == (RED, GREEN, BLUE, WHITE)
    for kind in (np.float16, np.float32, np.float64):
        assert corners(read_image((pixels / 255).astype(kind))) == (RED, GREEN, BLUE, WHITE)
    assert read_image(np.full((2, 3), 60, np.uint8)).getpixel((0, 0)) == (60, 60, 60)
    assert read_image(np.full((2, 3), 0.2)).getpixel((2, 1)) == (51, 51, 51)
    assert read_image(np.zeros((2, 3, 4), np.uint8)).getpixel((0, 0)) == WHITE  # transparent
    assert read_image(pixels[::-1, ::-1]).getpixel((0, 0)) == WHITE  # not contiguous
    assert read_image(np.zeros((2, 3, 3), np.uint8)).size == (3, 2)  # width, height


def test_channels_may_come_first_and_be_one():
    pixels = (
        np.asarray([[RED, GREEN, BLUE], [BLUE, WHITE, RED]], np.uint8).repeat(4, 0).repeat(4, 1)
    )
    expected = np.asarray(read_image(pixels))
    for array in (pixels, pixels / 255):
        np.testing.assert_array_equal(read_image(array.transpose(2, 0, 1)), expected)
    grey = np.arange(40, dtype=np.uint8).reshape(8, 5)
    for shape in [(8, 5, 1), (1, 8, 5)]:
        np.testing.assert_array_equal(read_image(grey.reshape(shape)), read_image(grey))
    see_through = np.zeros((4, 8, 5), np.uint8)
    assert read_image(see_through).getpixel((0, 0)) == WHITE
    # three rows of four columns and three channels: what could be both has its channels last
    assert read_image(np.zeros((3, 4, 3), np.uint8)).size == (4, 3)


def test_arrays_of_other_libraries():
    import jax.numpy as jnp
    import torch

    pixels = np.asarray([[RED, GREEN], [BLUE, WHITE]], np.uint8).repeat(4, 0).repeat(4, 1)
    first = torch.from_numpy(pixels).permute(2, 0, 1)
    for array in (jnp.asarray(pixels), first, first / 255):
        np.testing.assert_array_equal(read_image(array), pixels)
    np.testing.assert_array_equal(read_image((first / 255).requires_grad_()), pixels)
    # all or nothing: bfloat16 has no other shades of these
    for array in (jnp.asarray(pixels / 255, jnp.bfloat16), (first / 255).bfloat16()):
        np.testing.assert_array_equal(read_image(array), pixels)


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.int64])
def test_whole_numbers_are_shades_as_those_of_8_bits(kind: type):
    pixels = np.asarray([[RED, GREEN], [BLUE, (0, 1, 100)]], np.uint8) % 127
    np.testing.assert_array_equal(read_image(pixels.astype(kind)), read_image(pixels))


def test_a_mask_is_black_and_white():
    mask = np.asarray([[True, False], [False, True]])
    np.testing.assert_array_equal(read_image(mask), np.repeat(mask[..., None] * 255, 3, axis=-1))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4,), np.uint8), r"got \[4\]"),
        (np.zeros((), np.uint8), r"got \[\]"),
        (np.zeros((2, 2, 2), np.uint8), r"got \[2, 2, 2\]"),
        (np.zeros((2, 8, 8), np.uint8), r"got \[2, 8, 8\]"),
        (np.zeros((3, 0, 8), np.uint8), r"got \[3, 0, 8\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"got \[1, 8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"got \[0, 8, 3\]"),
        (np.zeros((8, 0, 3), np.uint8), r"got \[8, 0, 3\]"),
        (np.full((2, 2, 3), 255.0), "0 to 1"),
        (np.full((2, 2, 3), -0.1), "0 to 1"),
        (np.full((2, 2, 3), np.nan), "0 to 1"),
        (np.full((2, 2, 3), np.inf), "0 to 1"),
        (np.full((2, 2, 3), 256), "from 0 to 255"),
        (np.full((2, 2, 3), -1), "from 0 to 255"),
        (np.zeros((2, 2, 3), np.uint16), "uint16"),
        (np.zeros((2, 2, 3), complex), "complex"),
        (np.full((2, 2), "a"), "<U1"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array: np.ndarray, says: str):
    with pytest.raises(ValueError, match=says):
        read_image(array)
