"""What moves large tensors: copies in blocks, and threads that work ahead within bounds of memory.

Both spare the lock that Python's threads share, so that some read while others write.
"""

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")

ROWS = 512  # rows of a file that are read, and changed to our layout, as one
BLOCK = 128  # columns that are copied as one where rows are not padded
AHEAD = 384 * 2**20  # bytes that are under way at a time, besides the largest tensor
READERS = min(4, os.cpu_count() or 1)  # threads


def assign(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values`, which for bfloat16 alone would hold Python's lock."""
    if out.dtype == values.dtype:
        raw = f"u{out.itemsize}"
        out, values = out.view(raw), values.view(raw)
    out[...] = values


def padded(rows: int, width: int, dtype: np.dtype) -> np.ndarray:
    """A matrix to fill, a cache line between its rows: its columns are read twice as fast.

    Where the rows' distance is a power of two, the numbers of a column push each other out of the
    processor's cache.
    """
    return np.empty((rows, width + 64 // dtype.itemsize), dtype)[:, :width]


def copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """What a transform shows, as an array of its own, contiguous and of type `dtype`.

    A transposed matrix goes by blocks that fit a processor's cache: 4 × as fast as at one go.
    """
    out = np.empty(view.shape, dtype)
    if view.ndim < 2 or view.flags.c_contiguous:
        assign(out, view)
        return out
    for start in range(0, view.shape[-1], BLOCK):
        block = slice(start, start + BLOCK)
        assign(out[..., block], view[..., block])
    return out


def parts(items: Sequence[Item], cost: Callable[[Item], int], limit: int) -> list[list[Item]]:
    """The items in order, in runs that cost at most `limit`, or of one that costs more."""
    runs: list[list[Item]] = []
    room = 0
    for item in items:
        if not runs or cost(item) > room:
            runs.append([])
            room = limit
        runs[-1].append(item)
        room -= cost(item)
    return runs


def ahead(
    runs: Sequence[Sequence[Item]],
    work: Callable[[Item], Result],
    cost: Callable[[Item], int],
    behind: int = 0,
) -> Iterator[list[tuple[Item, Result]]]:
    """Run by run, `work` done on the items by several threads, which go on with the next runs.

    What is under way or waits here, and what the caller has, costs no more in all than the dearest
    run and `AHEAD`. The caller has the last run, and as many before it as `behind` says: a list is
    emptied when it asks for the next, but it may still use the results. Where an empty list comes,
    there is no room before it lets one more go.
    """
    costs = deque(sum(map(cost, run)) for run in runs)
    limit = max(costs, default=0) + AHEAD
    todo = deque(runs)
    started: deque[tuple[int, Sequence[Item], list[Future[Result]]]] = deque()
    used: deque[int] = deque()
    held = 0
    pool = ThreadPoolExecutor(READERS, "convert")
    try:
        while todo or started:
            while todo and held + costs[0] <= limit:
                run, price = todo.popleft(), costs.popleft()
                held += price
                started.append((price, run, [pool.submit(work, item) for item in run]))
            done, price = [], 0
            if started:
                price, run, futures = started.popleft()
                done = [(item, futures.pop(0).result()) for item in run]
            yield done
            done.clear()  # or what the caller still names would be held besides the next
            used.append(price)
            if len(used) > behind:
                held -= used.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


def trim() -> None:
    """Gives the system back what is free between arrays; nothing where malloc is not glibc's.

    Arrays that come and go in several threads leave holes. Of 5.3 GB that were converted and read
    back, 2.4 GB were in memory at the peak; without this, 2.75.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
