"""JSON lines that people write, requests and a study's questions alike.

    {"image": "a.png", "id": 7, …}       images: also a list of them, under either name

An image is a path that counts from the file's folder, or whatever else `read_image` takes as text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from catp_jax import strict_json
from catp_jax.readers.images import within


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not empty, with their numbers, from 1.

    Raises ValueError if it is no file, or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        content = path.read_bytes().removeprefix(strict_json.MARK)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield number, line


def parse(line: bytes, keys: Sequence[str], folder: Path) -> dict[str, Any]:
    """The object in a line that may have these keys. It always has a list `images`, whose paths
    start from `folder`, and an `id`, None if it has none of its own.

    Raises ValueError for a line of another form.
    """
    row = strict_json.parse(line)
    if unknown := [key for key in row if key not in keys]:
        raise ValueError(f"unknown: {', '.join(map(repr, unknown))}; a line has {', '.join(keys)}")
    if "image" in row and "images" in row:
        raise ValueError("image and images are the same; give one of them")
    images = row.pop("image", row.get("images"))
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"an image is a path, and images are a list of paths; got {images!r}")
    if not all(image.strip() for image in images):
        raise ValueError("the path of an image is empty")
    key = row.get("id")
    if key is not None and (isinstance(key, bool) or not isinstance(key, str | int)):
        raise ValueError(f"an id is a text or a whole number, got {key!r}")
    return {**row, "images": [within(image, folder) for image in images], "id": key}
