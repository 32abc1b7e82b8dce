"""Files and values that are no image, or no longer: each is refused, by its name."""

import inspect
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from catp_jax.readers.images import read_image
from tests.readers.pictures import noise


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
