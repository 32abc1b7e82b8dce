"""Reads from a file what a view of it shows: the bytes that are wanted, in their order, at once.

A view's strides say where its numbers lie in the file. Axes that follow on each other are joined,
so that most tensors are one run of bytes or rows of one length, whatever the view's shape.
"""

import os
from collections.abc import Sequence
from io import BufferedReader
from typing import Any

import numpy as np

from convert.streams import ROWS, assign, padded

PAGE = 4096  # bytes: a disk reads no less, so that smaller gaps between rows are read along
RUN = 2**22  # numbers of one long row that are read, and cast, as one

Axis = tuple[int, int, int]
"""Its size, and the distance of two neighbours in bytes: in the file, and in the array."""


def read(file: BufferedReader, start: int, part: np.ndarray, out: np.ndarray) -> None:
    """Fills the contiguous `out`, of any type, with what `part` shows, which begins at `start`.

    Raises ValueError if the file ends before.
    """
    *outer, rows, run = _axes(part, out)
    raw = out.reshape(-1).view(np.uint8)
    for place in np.ndindex(*(size for size, _, _ in outer)):
        position, offset = start, 0
        for number, (_, there, here) in zip(place, outer, strict=True):
            position, offset = position + number * there, offset + number * here
        shape, strides = (rows[0], run[0]), (rows[2], run[2])
        block = np.ndarray(shape, out.dtype, raw, offset, strides)  # type: ignore[call-overload]
        _read_rows(file, position, rows[1], block, part.dtype)


def _axes(part: np.ndarray, out: np.ndarray) -> list[Axis]:
    """The axes in the file's order, as few as there can be; the last two are rows of neighbours."""
    found = zip(part.shape, part.strides, out.strides, strict=True)
    axes: list[Axis] = []
    for size, there, here in sorted(found, key=lambda axis: -axis[1]):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (size * there, size * here):
            size *= axes.pop()[0]
        axes.append((size, there, here))
    if not axes or axes[-1][1] != part.itemsize:
        axes.append((1, part.itemsize, out.itemsize))
    if len(axes) > 1:
        return axes
    ((size, there, here),) = axes  # one run, which may be long: cut into pieces
    return [(1, 0, 0), (size, there, here)]


def _read_rows(
    file: BufferedReader, position: int, distance: int, block: np.ndarray, dtype: np.dtype
) -> None:
    """Fills a block with rows of type `dtype` that lie `distance` bytes from each other."""
    rows, width = block.shape
    if rows == 1 and width > RUN:
        for start in range(0, width, RUN):
            piece = block[:, start : start + RUN]
            _read_rows(file, position + start * dtype.itemsize, 0, piece, dtype)
        return
    run = width * dtype.itemsize
    gap = distance - run if rows > 1 and distance - run < PAGE else 0
    is_as_stored = block.dtype == dtype and block.strides[1] == dtype.itemsize and not gap
    room = None if is_as_stored else padded(min(ROWS, rows), (run + gap) // dtype.itemsize, dtype)
    for first in range(0, rows, ROWS):
        own = block[first : first + ROWS]
        values = own if room is None else room[: len(own)]
        pieces = [row.view(np.uint8) for row in values]
        if rows == 1 or distance == run + gap:
            pieces[-1] = pieces[-1][:run]  # behind the last row the file may end
            _fill(file, pieces, position + first * distance)
        else:
            for number, piece in enumerate(pieces, first):
                _fill(file, [piece], position + number * distance)
        if room is not None:
            values = values[:, :width]
            if block.dtype != dtype:
                cast = padded(len(values), width, block.dtype)
                assign(cast, values)
                values = cast
            assign(own, values)


def _fill(file: BufferedReader, pieces: Sequence[Any], position: int) -> None:
    """Fills buffers, one after the other, with what follows on each other in the file."""
    if os.preadv(file.fileno(), pieces, position) == sum(piece.nbytes for piece in pieces):
        return
    file.seek(position)  # some file systems give less than was asked for
    for piece in pieces:
        if file.readinto(piece.data) != piece.nbytes:
            raise ValueError(f"{file.name} ended within a tensor; is it being changed?")
