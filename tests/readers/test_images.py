"""Images as people have them: every mode, format and kind of damage."""

import base64
import inspect
import io
import urllib.parse
import warnings
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from catp_jax.readers.images import fetch_image, read_image, within

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(image: Image.Image) -> tuple:
    """Top left, top right, bottom left, bottom right."""
    right, bottom = image.width - 1, image.height - 1
    return tuple(image.getpixel(at) for at in [(0, 0), (right, 0), (0, bottom), (right, bottom)])


def four_colours(width: int = 4, height: int = 2) -> Image.Image:
    image = Image.new("RGB", (width, height), WHITE)
    for at, colour in [((0, 0), RED), ((width - 1, 0), GREEN), ((0, height - 1), BLUE)]:
        image.putpixel(at, colour)
    return image


def noise(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- what can be read -------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="NumPy cannot read"):
        read_image((first / 255).requires_grad_())


# --- encoded images ---------------------------------------------------------------------------


def encoded(kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    four_colours().save(buffer, kind, **options)
    return buffer.getvalue()


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


ENCODED = {
    "bytes": encoded(),
    "bytearray": bytearray(encoded("bmp")),
    "open file": io.BytesIO(encoded()),
    "data URI": f"data:image/png;base64,{text_of(encoded())}",
    "data URI without its padding": f"data:;BASE64,{text_of(encoded()).rstrip('=')}",
    "data URI in percents": "data:image/bmp," + urllib.parse.quote_from_bytes(encoded("bmp")),
    "base64": text_of(encoded()),
    "base64 in lines": base64.encodebytes(encoded("bmp")).decode(),
    "record of datasets": {"bytes": encoded(), "path": None},
    "record with a name": {"bytes": encoded(), "path": "gone.png"},
}


@pytest.mark.parametrize("kind", ENCODED)
def test_encoded_images_are_those_that_were_encoded(kind: str):
    for _ in range(2):  # an open file too is read from its start
        assert corners(read_image(ENCODED[kind])) == (RED, GREEN, BLUE, WHITE)


def test_paths_may_be_addresses_of_files_records_and_at_home(tmp_path: Path, monkeypatch):
    path = tmp_path / "an image #1.png"
    four_colours().save(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    home = Path("~") / path.name
    sources = [path.as_uri(), f"file://localhost{urllib.parse.quote(str(path))}", str(home), home]
    for source in [*sources, {"bytes": None, "path": str(path)}, {"path": path}]:
        assert corners(read_image(source)) == (RED, GREEN, BLUE, WHITE)
    with path.open("rb") as file:
        assert read_image(file).size == (4, 2)


def test_paths_count_from_a_folder_and_nothing_else_does(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert within("a.png", tmp_path) == within(Path("a.png"), tmp_path) == tmp_path / "a.png"
    assert within("/b/a.png", tmp_path) == within(Path("/b/a.png"), tmp_path) == Path("/b/a.png")
    assert within("~/a.png", tmp_path) == Path("/home/me/a.png")
    addresses = ["https://example.org/a.png", "file:///b/a.png", "data:,"]
    others = [*ENCODED.values(), *addresses, four_colours(), None]
    assert all(within(other, tmp_path) is other for other in others)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (b"", "image of 0 bytes is in no image format"),
        (b"no picture", "image of 10 bytes is in no image format"),
        (encoded()[:60], "image of 60 bytes is damaged|no image format"),
        (io.StringIO("text"), "opened for bytes"),
        ({}, "an image as a record"),
        ({"bytes": None, "path": None}, "an image as a record"),
        ({"bytes": {"bytes": b""}}, "an image as a record"),
        ({"url": "a.png"}, "an image as a record"),
        ("data:image/png;base64,####", "no data: URI that holds anything"),
        ("data:image/png;base64", "no data: URI that holds anything"),
        ("data:image/png;base64,\ud800", "no data: URI that holds anything"),
        ("data:text/plain,hello", "in no image format"),
        (text_of(encoded())[:60], "is not a file|damaged|no image format"),
        ("abcd" * 20, "is not a file"),
        ("\ud800.png", "is not a file"),
        ("file://elsewhere/a.png", "on another machine"),
        ("file:///no/a.png", "is not a file"),
        ("~nobody-of-this-name/a.png", "is not a file"),
        ("http://example.org/a.png", "is a web address, and nothing is downloaded unasked"),
        ("HTTPS://example.org/a.png", "is a web address, and nothing is downloaded unasked"),
    ],
)
def test_encoded_images_and_addresses_that_cannot_be_read_are_refused(source, says):
    with pytest.raises(ValueError, match=says):
        read_image(source)


def test_an_image_that_is_a_program_is_not_run(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("it was run"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    with pytest.raises(ValueError, match="in no image format"):
        read_image(encoded("eps"))


def test_messages_about_long_texts_are_short():
    with pytest.raises(ValueError, match="is not a file") as error:
        read_image("x" * 10**6)
    assert len(str(error.value)) < 200


def test_addresses_are_fetched_by_what_the_user_gives():
    assert fetch_image("https://example.org/a", lambda address: address.encode()) == (
        b"https://example.org/a"
    )
    with pytest.raises(ValueError, match=r"'https://example.org/a' could not be fetched: no net"):
        fetch_image("https://example.org/a", Mock(side_effect=OSError("no net")))
    with pytest.raises(ValueError, match="must return the image, not an address"):
        fetch_image("https://example.org/a", lambda address: address)


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
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.zeros((2, 2, 3), np.uint16), "uint16"),
        (np.zeros((2, 2, 3), bool), "bool"),
        (np.zeros((2, 2, 3), complex), "complex"),
        (np.full((2, 2), "a"), "<U1"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array: np.ndarray, says: str):
    with pytest.raises(ValueError, match=says):
        read_image(array)


# --- what cannot be read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.png", None, "is not a file"),
        ("empty.png", b"", "is an empty file"),
        ("text.png", b"This is no picture.\n" * 20, "in no image format"),
        ("header.png", b"\x89PNG\r\n\x1a\n", "no image format|damaged"),
        ("half.jpg", b"\xff\xd8\xff\xe0", "no image format|damaged"),
        ("zeros.jpg", bytes(1000), "in no image format"),
        ("x" * 300 + ".png", None, "is not a file"),
        ("nul\0.png", None, "is not a file"),
    ],
)
def test_files_that_are_no_image_are_refused_by_name(tmp_path: Path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=says) as error:
            read_image(source)
        assert repr(str(path)) in str(error.value)


def test_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a file"):
        read_image(tmp_path)


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
def test_a_file_cut_off_anywhere_is_refused_or_read_whole(tmp_path: Path, extension: str):
    buffer = io.BytesIO()
    noise().save(buffer, {"jpg": "jpeg"}.get(extension, extension))
    whole = buffer.getvalue()
    path = tmp_path / f"image.{extension}"
    refused = 0
    for length in [*range(1, 60), *np.linspace(60, len(whole) - 1, 25).astype(int)]:
        path.write_bytes(whole[:length])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = read_image(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:
            assert image.size == (60, 40)
    assert refused > 75


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_a_file_with_flipped_bytes_is_refused_or_read(tmp_path: Path, extension: str):
    buffer = io.BytesIO()
    noise(12, 8).save(buffer, {"jpg": "jpeg"}.get(extension, extension))
    whole = bytearray(buffer.getvalue())
    rng = np.random.default_rng(0)
    path = tmp_path / f"image.{extension}"
    outcomes = set()
    for _ in range(300):
        damaged = whole.copy()
        for place in rng.integers(0, min(len(whole), 400), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert read_image(path).mode == "RGB"
            outcomes.add("read")
        except ValueError as error:
            outcomes.add("refused" if str(path) in str(error) else str(error))
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("limit", [1500, 1200, 1000, 10])
def test_no_kind_of_image_may_have_more_pixels_than_pillow_opens(
    tmp_path: Path, monkeypatch, limit
):
    path = tmp_path / "image.png"
    picture = noise()  # 2,400 pixels
    picture.save(path)
    kinds = [path, path.read_bytes(), picture, np.asarray(picture)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # where PIL itself only warns
    for source in kinds:
        if limit >= 1200:
            assert read_image(source).size == (60, 40)
        else:
            with pytest.raises(ValueError, match=f"more than {2 * limit} pixels; scale it down"):
                read_image(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(path).size == (60, 40)


def test_floating_point_pixels_are_refused(tmp_path: Path):
    path = tmp_path / "image.tiff"
    Image.fromarray(np.full((2, 2), 3.5, np.float32)).save(path)
    with pytest.raises(ValueError, match="floating-point pixels of unknown range"):
        read_image(path)


def test_a_pil_image_whose_file_is_cut_off_is_refused(tmp_path: Path):
    path = tmp_path / "image.png"
    noise().save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as image, pytest.raises(ValueError, match="damaged or cut off"):
        read_image(image)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(ValueError, match="has no pixels"):
        read_image(Image.new("RGB", size))


@pytest.mark.parametrize("source", [None, 5, 2.5, True, ["a.png"], object()])
def test_what_is_no_image_at_all_is_refused(source):
    read = inspect.unwrap(read_image)  # as a user calls it, without our checks of types
    with pytest.raises(ValueError, match="image is a path"):
        read(source)


def test_nothing_is_printed(tmp_path: Path, capfd):
    path = tmp_path / "image.jpg"
    noise().save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match="damaged"):
        read_image(path)
    assert capfd.readouterr() == ("", "")
