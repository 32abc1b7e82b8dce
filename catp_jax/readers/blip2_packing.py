"""BLIP-2 and InstructBLIP: from token lists and images to arrays of few shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.models.blip2 import Blip2Inputs
from catp_jax.models.instructblip import InstructBlipConfig, InstructBlipInputs
from catp_jax.models.querying import QueryingConfig, QueryingInputs
from catp_jax.readers.packing import Packed, image_room, pad_prompts


@dataclasses.dataclass(frozen=True)
class KeptQueries:
    """The queries of one prompt that pruning kept, in their original order."""

    number: np.ndarray

    def as_rows(self) -> list[dict[str, int]]:
        """One record a query, for JSON."""
        return [{"query": number} for number in self.number.tolist()]


def pack(
    prompts: Sequence[Sequence[int]],
    images: Sequence[np.ndarray],
    config: QueryingConfig,
    shares: int = 1,
) -> Packed[Blip2Inputs]:
    """Arrays for the model; `images[b]` [3, height, width] belongs to `prompts[b]`.

    An array that stands with several prompts is encoded once; `shares` say into how many parts the
    images will be split. A prompt may be empty: the queries are answered alone.
    """
    text, valid = pad_prompts(prompts)
    pixels, index = stack_images(images, shares)
    queries = config.num_query_tokens
    return Packed(
        inputs=Blip2Inputs(
            pixels=pixels,
            image_index=index,
            tokens=text,
            token_valid=valid,
        ),
        available=(queries,) * len(prompts),
        most=queries,
        capacity=queries,
        longest=queries + max(len(tokens) for tokens in prompts),
    )


def pack_instructions(
    prompts: Sequence[Sequence[int]],
    instructions: Sequence[Sequence[int]],
    images: Sequence[np.ndarray],
    config: QueryingConfig,
    shares: int = 1,
) -> Packed[InstructBlipInputs]:
    """What `pack` does, with the prompts in the Q-Former's tokens too: `instructions`."""
    packed = pack(prompts, images, config, shares)
    text, valid = pad_prompts(instructions)
    inputs = InstructBlipInputs(
        pixels=packed.inputs.pixels,
        image_index=packed.inputs.image_index,
        tokens=packed.inputs.tokens,
        token_valid=packed.inputs.token_valid,
        instruction=text,
        instruction_valid=valid,
    )
    return dataclasses.replace(packed, inputs=inputs)  # type: ignore[return-value]


def abstract_inputs(config: QueryingConfig, batch: int, length: int) -> tuple[QueryingInputs, int]:
    """The shapes of `batch` prompts of `length` tokens with an image each, and the visual tokens of
    one.
    """
    side = config.vision.image_size

    def make() -> QueryingInputs:
        tokens, valid = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool)
        shared: dict[str, Any] = {
            "pixels": jnp.zeros((batch, 3, side, side), jnp.float32),
            "image_index": jnp.zeros((batch,), jnp.int32),
            "tokens": tokens,
            "token_valid": valid,
        }
        if isinstance(config, InstructBlipConfig):
            return InstructBlipInputs(**shared, instruction=tokens, instruction_valid=valid)
        return Blip2Inputs(**shared)

    return jax.eval_shape(make), config.num_query_tokens


def stack_images(images: Sequence[np.ndarray], shares: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The distinct arrays of `images` as one, filled up as `image_room` says, and where in it each
    of them is.
    """
    distinct = {id(image): image for image in images}
    place_of = {key: place for place, key in enumerate(distinct)}
    pixels = np.stack([*distinct.values()])
    padding = image_room(len(pixels), shares) - len(pixels)
    pixels = np.pad(pixels, ((0, padding), (0, 0), (0, 0), (0, 0)))
    return pixels, np.asarray([place_of[id(image)] for image in images], np.int32)
