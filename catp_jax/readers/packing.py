"""From token lists and images to arrays of few shapes: what all models share.

Prompts are padded on the right to a length out of `buckets.TEXT_LENGTHS`, the images of the batch
to a number out of `IMAGE_COUNTS`, every prompt's tiles to one out of `TILE_COUNTS`. All arrays are
NumPy's: on a mesh each device gets its part of them from here, and none the whole.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from catp_jax.generation.buckets import IMAGE_COUNTS, TEXT_LENGTHS, round_up
from catp_jax.generation.generate import Late

Arrays = TypeVar("Arrays", covariant=True)


@dataclasses.dataclass(frozen=True)
class Packed(Generic[Arrays]):
    """`inputs` for the model, and what the host knows of them.

    `available[b]` is the number of a prompt's visual tokens, tiles of padding apart; `capacity` is
    the room that each prompt gets for them, and `most` what a prompt of this model may have (None:
    any number). `longest` is the longest prompt, in tokens of the language model; `begun` are the
    texts that the answers begin with, none if no answer is begun. `encoded` takes the place of
    `inputs` where images have been encoded already. `last` are the prompts' last tokens where the
    inputs are without them.
    """

    inputs: Arrays
    available: tuple[int, ...]
    most: int | None
    capacity: int
    longest: int
    begun: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    encoded: Any = dataclasses.field(default=None, kw_only=True)
    last: Any = dataclasses.field(default=None, kw_only=True)

    @property
    def given(self) -> Any:
        """What programs are given."""
        given = self.inputs if self.encoded is None else self.encoded
        return given if self.last is None else Late(inputs=given, last=self.last)


def image_room(number: int, shares: int) -> int:
    """Out of `IMAGE_COUNTS`, and then so many that `shares` divide them: each encodes its own.

    One image alone stays one: each share would have to encode one anyway.
    """
    if number == 1:
        return 1
    return -(-round_up(number, IMAGE_COUNTS) // shares) * shares


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [b, length] and which of them are no padding, padded on the right to one length."""
    length = round_up(max(len(tokens) for tokens in prompts), TEXT_LENGTHS)
    text = np.zeros((len(prompts), length), np.int32)
    valid = np.zeros((len(prompts), length), bool)
    for row, tokens in enumerate(prompts):
        text[row, : len(tokens)] = tokens
        valid[row, : len(tokens)] = True
    return text, valid
