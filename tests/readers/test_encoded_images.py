"""Images by bytes, texts, records and addresses, as requests bring them."""

import base64
import io
import urllib.parse
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from catp_jax.readers.images import fetch_image, read_image, within
from tests.readers.pictures import BLUE, GREEN, RED, WHITE, corners, four_colours


def encoded(kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    four_colours().save(buffer, kind, **options)
    return buffer.getvalue()


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


ENCODED = {
    "bytes": encoded(),
    "bytearray": bytearray(encoded("bmp")),
    "memoryview": memoryview(encoded("bmp")),
    "memoryview of an array": memoryview(np.asarray(four_colours())),
    "open file": io.BytesIO(encoded()),
    "data URI": f"data:image/png;base64,{text_of(encoded())}",
    "data URI without its padding": f"data:;BASE64,{text_of(encoded()).rstrip('=')}",
    "data URI in percents": "data:image/bmp," + urllib.parse.quote_from_bytes(encoded("bmp")),
    "base64": text_of(encoded()),
    "base64 in lines": base64.encodebytes(encoded("bmp")).decode(),
    "base64 for addresses": base64.urlsafe_b64encode(encoded("webp", lossless=True)).decode(),
    "base64 without its padding": text_of(encoded("webp", lossless=True)).rstrip("="),
    "data URI for addresses": "data:image/png;base64,"
    + base64.urlsafe_b64encode(encoded()).decode(),
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
