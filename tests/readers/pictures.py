"""Small pictures whose every pixel a test knows."""

import numpy as np
from PIL import Image

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
