"""Reading images of any kind into plain RGB, so that processors see what a person sees."""

import base64
import io
import os
import urllib.parse
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from catp_jax.messages import short

Raw = bytes | bytearray | memoryview
ImageLike = str | Path | Image.Image | np.ndarray | Raw | BinaryIO | Mapping[str, Any]
Fetch = Callable[[str], ImageLike]
"""What brings the image at a web address; nothing is downloaded unless a user gives one."""

NO_LIST = str | Raw | Path | Mapping | np.ndarray | Image.Image | io.IOBase
"""One image or text, where a list of them is wanted."""

SHORTEST = 40  # characters of base64 that may be an image; a file's name may look like it
CHANNELS = (1, 3, 4)
URL_SAFE = bytes.maketrans(b"-_", b"+/")  # letters of base64 in addresses


def read_image(source: ImageLike) -> Image.Image:
    """An RGB image, upright, 8 bits a channel, transparency laid over white.

    `source` is
    - a path, `~` and file:// included;
    - an encoded image: bytes, an open binary file, a data: URI, a string of base64, or what
      `datasets` makes, {"bytes": …, "path": …};
    - a PIL image;
    - an array, of NumPy or another library: [height, width], with channels (1, 3 or 4) last or
      first, of uint8, signed whole numbers from 0 to 255, floats from 0 to 1, or True for white. If
      both could be, channels are last.

    No image may have more pixels than Pillow opens, twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises ValueError if it cannot be read, naming the file.
    """
    if isinstance(source, Mapping):
        return read_image(_from_record(source))
    if isinstance(source, str) and (encoded := _encoded(source)) is not None:
        source = encoded
    if isinstance(source, str | Path):
        return _from_file(source)
    if isinstance(source, memoryview) and source.ndim > 1:
        source = np.asarray(source)
    if isinstance(source, Raw):
        name = f"image of {len(source)} bytes"
        return _to_rgb(_decode(io.BytesIO(source), name), name)
    if isinstance(source, Image.Image):
        return _to_rgb(_decode(source, "image"), "image")
    if hasattr(source, "read"):
        return read_image(_read_whole(source))
    if hasattr(source, "__array__"):
        return _to_rgb(_from_array(source), "image")
    raise ValueError(
        f"an image is a path, bytes, a PIL image or an array, got {type(source).__name__}"
    )


def check_image(source: str | Path) -> None:
    """Raises ValueError as `read_image` does. A JPEG, which must be whole, is decoded at its
    smallest scale, so that many are looked at in little time.
    """
    encoded = _encoded(source) if isinstance(source, str) else None
    if encoded is None:
        _from_file(source, is_draft=True)
    else:
        read_image(encoded)


def quoted(text: str) -> str:
    """A path or address in quotes, without the megabytes that it may hold."""
    return repr(short(text, 60) if len(text) > 500 else text)


def is_web_address(source: Any) -> bool:
    """Whether an image would have to be fetched."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def fetch_image(address: str, fetch: Fetch | None) -> ImageLike:
    """The image at a web address. Raises ValueError if `fetch` is missing or fails."""
    if fetch is None:
        raise ValueError(
            f"image {quoted(address)} is a web address, and nothing is downloaded unasked; save it "
            "as a file, or load the model with fetch=, a function from address to bytes"
        )
    try:
        found = fetch(address)
    except Exception as error:  # of any library
        raise ValueError(f"image {quoted(address)} could not be fetched: {error}") from error
    if is_web_address(found):
        raise ValueError(f"image {quoted(address)}: fetch must return the image, not an address")
    return found


def within(source: Any, folder: Path) -> Any:
    """The image, where a relative path counts from `folder`."""
    if isinstance(source, str):
        is_elsewhere = source[:8].lower().startswith(("http://", "https://", "file://", "data:"))
        if is_elsewhere or _encoded(source) is not None:
            return source
    return folder / os.path.expanduser(source) if isinstance(source, str | Path) else source


def _from_record(record: Mapping[str, Any]) -> Any:
    """What `datasets` knows of an image: its bytes, or where it is."""
    content = record.get("bytes")
    found = record.get("path") if content is None else content
    if found is None or isinstance(found, Mapping):
        raise ValueError(
            f'an image as a record has "bytes" or a "path", got {", ".join(map(str, record))!r}'
        )
    return found


def _encoded(text: str) -> bytes | None:
    """The bytes that a data: URI or a string of base64 holds; None for what is neither."""
    if text[:5].lower() == "data:":
        head, comma, body = text.partition(",")
        try:
            content = urllib.parse.unquote_to_bytes(body)
            if head.lower().endswith(";base64"):
                content = _from_base64(content)
        except ValueError:  # no base64, or half a character
            content = b""
        if not comma or not content:
            raise ValueError(f"image {quoted(text)} is no data: URI that holds anything")
        return content
    if len(text) < SHORTEST or os.path.isfile(text):
        return None
    try:
        content = _from_base64(text.encode())
    except ValueError:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(io.BytesIO(content)).close()
    except UnidentifiedImageError:
        return None
    except Exception:  # of an image that is damaged or large; reading it will say so
        return content
    return content


def _from_base64(text: bytes) -> bytes:
    """What base64 says, that for addresses too, with or without its padding."""
    text = b"".join(text.split()).rstrip(b"=").translate(URL_SAFE)
    return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)


def _local(path: str) -> str:
    """A path, also where it is a file:// address."""
    if path[:7].lower() != "file://":
        return path
    host, slash, rest = path[7:].partition("/")
    if host not in ("", "localhost"):
        raise ValueError(f"image {quoted(path)} lies on another machine; copy it to this one")
    return urllib.parse.unquote(slash + rest)


def _from_file(source: str | Path, is_draft: bool = False) -> Image.Image:
    name = f"image {quoted(str(source))}"
    if is_web_address(source):
        fetch_image(str(source), None)
    path = _local(source) if isinstance(source, str) else source
    if not os.path.isfile(path):
        path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise ValueError(f"{name} is not a file")
    if not os.path.getsize(path):
        raise ValueError(f"{name} is an empty file")
    return _to_rgb(_decode(path, name, is_draft), name)


def _read_whole(file: Any) -> bytes:
    """An open file's content, from its start."""
    try:
        if file.seekable():
            file.seek(0)
        content = file.read()
    except Exception as error:  # closed, or of any library
        raise ValueError(f"image as an open file cannot be read: {error}") from None
    if not isinstance(content, Raw):
        raise ValueError("image as an open file wants one that was opened for bytes, as 'rb' does")
    return bytes(content)


def _decode(
    source: str | Path | BinaryIO | Image.Image, name: str, is_draft: bool = False
) -> Image.Image:
    """All pixels, upright, in the image's own mode; of a JPEG that is a draft, few."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have one limit
            if isinstance(source, Image.Image):
                _check_size(source.width * source.height, name)
                return ImageOps.exif_transpose(source)
            with Image.open(source) as image:
                if image.format == "EPS":  # a program, which Pillow gives to Ghostscript to run
                    raise UnidentifiedImageError
                if is_draft:
                    image.draft(None, (1, 1))
                return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is in no image format that can be read") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{name} has more than {_most_pixels()} pixels; scale it down first, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ValueError(f"{name} is damaged or cut off: {error}") from None


def _most_pixels() -> int | None:
    """Pillow's own limit, above which it opens no file; None where a user has taken it away."""
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def _check_size(pixels: int, name: str) -> None:
    most = _most_pixels()
    if most is not None and pixels > most:
        raise Image.DecompressionBombError(name)


def _from_array(source: Any) -> Image.Image:
    try:
        if hasattr(source, "detach"):  # torch's, which a gradient or a device may hold
            source = source.detach().cpu()
            source = source.double() if source.is_floating_point() else source
        array = np.asarray(source)
    except Exception as error:  # of another library: on a device, or of a type NumPy lacks
        raise ValueError(f"an image array that NumPy cannot read: {error}") from None
    shape = list(array.shape)
    if array.ndim == 3 and shape[2] not in CHANNELS and shape[0] in CHANNELS:
        array = array.transpose(1, 2, 0)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in CHANNELS)
    if not is_image or 0 in shape:
        raise ValueError(
            "an image array is [height, width], or has 1, 3 or 4 channels first or last, got "
            f"{shape}"
        )
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.signedinteger):
        if array.min() < 0 or array.max() > 255:
            raise ValueError("an image array of whole numbers holds values from 0 to 255")
        array = array.astype(np.uint8)
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float64)  # of bfloat16, NumPy alone knows little
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("an image array of floats holds values from 0 to 1; divide by 255")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(
            "an image array is of uint8, of signed whole numbers from 0 to 255 or of floats from 0 "
            f"to 1, got {array.dtype}"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return _decode(Image.fromarray(np.ascontiguousarray(array)), "image")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: {image.width}×{image.height}")
    if image.mode == "F":
        raise ValueError(f"{name} holds floating-point pixels of unknown range; save it as 8 bits")
    if image.mode.startswith("I"):  # 16-bit grey: plain conversion would clip it to white
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(grey, 0, 65535) // 257).astype(np.uint8))
    if image.mode == "La":  # premultiplied; PIL takes it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
