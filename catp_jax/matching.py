"""Which text fits which image: BLIP-2 for image-text retrieval.

matcher = catp_jax.load_matcher("path/to/folder")
matcher.itc(images, texts)      # [images, texts], to search
matcher.itm(images, texts)      # of each pair, to rank
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import convert
from catp_jax.generation.buckets import IMAGE_COUNTS, round_up
from catp_jax.models.frozen import Frozen, freeze
from catp_jax.models.retrieval import RetrievalConfig
from catp_jax.readers import hub
from catp_jax.readers.blip2 import RetrievalReader
from catp_jax.readers.blip2_packing import stack_images
from catp_jax.readers.images import NO_LIST, Fetch, ImageLike
from catp_jax.readers.packing import pad_prompts
from catp_jax.readers.reading import ImageCache, fetch_images, remember
from catp_jax.sharding.mesh import find_devices

PAIRS_AT_ONCE = 32  # of image and text, that are matched in one call


@dataclasses.dataclass(frozen=True)
class Matcher:
    """An image-text matching checkpoint with its processor: which text fits which image."""

    network: Frozen
    reader: RetrievalReader
    fetch: Fetch | None = None

    def __repr__(self) -> str:
        return f"Matcher({self.network.summary})"

    def itc(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """Cosines [images, texts] from -1 to 1 of all images with all texts: for search."""
        pixels, index = self._images(images)
        tokens, valid = self._texts(texts)
        return np.asarray(_itc(self.network, pixels, tokens, valid), np.float32)[index]

    def itm(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """The probability [pairs] that an image and its own text fit each other: for ranking.

        One image goes with all texts, and one text with all images.
        """
        pixels, index = self._images(images)
        tokens, valid = self._texts(texts)
        if len(images) != len(texts) and 1 not in (len(images), len(texts)):
            raise ValueError(
                f"give one text per image, or one of either; got {len(texts)} texts for "
                f"{len(images)} images"
            )
        pairs = max(len(images), len(texts))
        index = np.broadcast_to(index, pairs)
        tokens, valid = (np.broadcast_to(a, (pairs, *a.shape[1:])) for a in (tokens, valid))
        image = _image_tokens(self.network, pixels)
        scores = []
        for start in range(0, pairs, PAIRS_AT_ONCE):
            # the last pairs are filled up, so that all are scored in one shape
            some = np.arange(start, start + min(PAIRS_AT_ONCE, round_up(pairs, IMAGE_COUNTS)))
            some = np.minimum(some, pairs - 1)
            logits = _match(self.network, image[index[some]], tokens[some], valid[some])
            fits = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)[:, 1]
            scores.append(np.asarray(fits)[: pairs - start])
        return np.concatenate(scores)

    def _images(self, images: Sequence[ImageLike]) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(images, NO_LIST) or not len(images):
            raise ValueError("give a list of at least one image")
        cache: ImageCache = {}
        fetched = fetch_images(images, cache, self.fetch)
        return stack_images([remember(cache, image, self.reader.read_image) for image in fetched])

    def _texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(texts, NO_LIST) or not len(texts):
            raise ValueError("give a list of at least one text")
        return pad_prompts([self.reader.read_text(text) for text in texts])


@jax.jit
def _itc(network: Frozen, pixels: Any, tokens: Any, valid: Any) -> jax.Array:
    return network.thaw().itc(pixels, tokens, valid)


@jax.jit
def _image_tokens(network: Frozen, pixels: Any) -> jax.Array:
    return network.thaw().image_tokens(pixels)


@jax.jit
def _match(network: Frozen, image: Any, tokens: Any, valid: Any) -> jax.Array:
    return network.thaw().match(image, tokens, valid)


def load_matcher(
    folder: str | Path,
    dtype: str | None = None,
    *,
    adapter: str | Path | None = None,
    processor: str | Path | None = None,
    ignore_config: Sequence[str] = (),
    fetch: Fetch | None = None,
) -> Matcher:
    """Loads a folder of `Blip2ForImageTextRetrieval`, as `load` does, whose keywords these are.

    Raises ValueError if it is none.
    """
    folder = hub.find_folder(folder)
    processor_folder = folder if processor is None else hub.find_folder(processor)
    adapter = None if adapter is None else hub.find_folder(adapter)
    find_devices()
    config = convert.load_config(folder, ignore_config)
    if not isinstance(config, RetrievalConfig):
        raise ValueError(f"{folder} generates text; load it with load, or use catp-jax generate")
    reader = RetrievalReader.load(processor_folder, config)
    network, _ = convert.load(folder, dtype, ignore_config=ignore_config, adapter=adapter)
    return Matcher(network=freeze(network), reader=reader, fetch=fetch)
