"""The few sizes that arrays come in, so that a steady stream of work compiles nothing new."""

from collections.abc import Sequence

TEXT_LENGTHS = tuple(sorted({16 * 2**k for k in range(14)} | {24 * 2**k for k in range(13)}))
TOKEN_COUNTS = (1, 2, 4, 8, *TEXT_LENGTHS)
"""Of few tokens, in which a prompt's lengths would be mostly empty."""

IMAGE_COUNTS = (1, 2, 3, 4, *sorted({2**k for k in range(3, 13)} | {6 * 2**k for k in range(10)}))
TILE_COUNTS = (1, 2, *IMAGE_COUNTS[3:])


def round_up(number: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `number`; past them, its own multiple."""
    for size in sizes:
        if number <= size:
            return size
    return -(-number // sizes[-1]) * sizes[-1]
