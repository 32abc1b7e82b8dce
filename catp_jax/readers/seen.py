"""Fewer pixels and fewer tiles: what a model sees of an image, as baselines for pruning.

An image is made smaller before the model's own processing. Llama 3.2 Vision then may take fewer
tiles of it, and so has fewer visual tokens. BLIP-2 and InstructBLIP resize every image to one size,
so for them it is a blur: as many visual tokens, of less detail.
"""

import dataclasses
import math
from typing import Any

from PIL import Image


@dataclasses.dataclass(frozen=True)
class Seen:
    """`image_scale`: the share of an image's height, and of its width, that is left, above 0 and up
    to 1. `tiles`: an image has so many at most (None: as many as the model takes).

    Raises ValueError for any other value.
    """

    image_scale: float = 1.0
    tiles: int | None = None

    def __post_init__(self) -> None:
        scale = self.image_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= 1:
            raise ValueError(
                f"image_scale is above 0 and at most 1, such as 0.5 for half as many rows and "
                f"columns of pixels; got {scale!r}"
            )
        if self.tiles is not None and (type(self.tiles) is not int or self.tiles < 1):
            raise ValueError(f"tiles is a whole number of at least 1, got {self.tiles!r}")

    def check(self, config: Any) -> None:
        """Raises ValueError for tiles that a model of this configuration does not have."""
        if self.tiles is None:
            return
        most = getattr(config.vision, "max_num_tiles", None)
        if most is None:
            raise ValueError(
                f"tiles={self.tiles}: images of this model have no tiles; image_scale makes them "
                "smaller for any model"
            )
        if self.tiles > most:
            raise ValueError(f"tiles is 1 to {most} for this model, got {self.tiles}")

    def described(self) -> dict[str, Any]:
        """What is not as the model would have it, for records."""
        return {name: value for name, value in vars(self).items() if value != getattr(WHOLE, name)}

    def smaller(self, image: Image.Image, processor: Any) -> Image.Image:
        """The image with fewer pixels, by the filter that the processor of images resizes with."""
        if self.image_scale == 1:
            return image
        width, height = (max(1, math.floor(side * self.image_scale + 0.5)) for side in image.size)
        return image.resize((width, height), Image.Resampling(processor.resample))


WHOLE = Seen()
"""Images as they are."""
