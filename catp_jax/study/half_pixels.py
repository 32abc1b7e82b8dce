"""The same questions about coarser images: what is still answered then does not need the pixels,
and says nothing of methods that choose among them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from catp_jax.readers.images import read_image
from catp_jax.study.tasks import Example

HALVED = "half the pixels"
"""The setting: unpruned, about images with half the pixels a side."""


def halved(examples: Sequence[Example]) -> list[Example]:
    """The examples with half the pixels a side, brought back to their size.

    Raises ValueError, naming it, for an image that cannot be read.
    """
    made: dict[int, np.ndarray] = {}
    for example in examples:
        if example.image_id not in made:
            image = read_image(example.image)
            size = (max(image.width // 2, 1), max(image.height // 2, 1))
            small = image.resize(size, Image.Resampling.BOX)
            made[example.image_id] = np.asarray(small.resize(image.size, Image.Resampling.BILINEAR))
    return [dataclasses.replace(one, image=made[one.image_id]) for one in examples]
