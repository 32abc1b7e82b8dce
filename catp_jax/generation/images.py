"""Reading images of any kind into plain RGB, so that processors see what a person sees."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ImageLike = str | Path | Image.Image | np.ndarray


def read_image(source: ImageLike) -> Image.Image:
    """An RGB image, upright, 8 bits a channel, transparency laid over white.

    `source` is a path, a PIL image, or an array [height, width, 3 or 4] (or [height, width]) of
    uint8, or of floats from 0 to 1.

    Raises ValueError if it cannot be read, naming the file.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), "image")
    if not isinstance(source, str | Path | Image.Image):
        raise ValueError(
            f"an image is a path, a PIL image or an array, got {type(source).__name__}"
        )
    if isinstance(source, Image.Image):
        return _to_rgb(_decode(source, "image"), "image")
    name = f"image {str(source)!r}"
    if not os.path.isfile(source):
        raise ValueError(f"{name} is not a file")
    if not os.path.getsize(source):
        raise ValueError(f"{name} is an empty file")
    return _to_rgb(_decode(source, name), name)


def _decode(source: str | Path | Image.Image, name: str) -> Image.Image:
    """All pixels, upright, in the image's own mode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return ImageOps.exif_transpose(source)
            with Image.open(source) as image:
                return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{name} is in no image format that can be read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise ValueError(f"{name} has more than {limit} pixels; scale it down first") from None
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise ValueError(f"{name} is damaged or cut off: {error}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    shape = array.shape
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (3, 4)) or 0 in shape:
        raise ValueError(
            f"an image array is [height, width], [height, width, 3] or [height, width, 4], got "
            f"{list(shape)}"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError("an image array of floats holds values from 0 to 1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array is of uint8 or of floats from 0 to 1, got {array.dtype}")
    return Image.fromarray(array)


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
