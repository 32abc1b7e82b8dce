"""The arrays of a tree by name, `model.lm_head.kernel`, and in runs that fit into memory.

A tree is anything that JAX can look inside, NNX modules among it. An abstract array is a
`jax.ShapeDtypeStruct`.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

Tree = TypeVar("Tree")
Result = TypeVar("Result")

RUN = 384 * 2**20  # bytes of arrays that are read or written as one; a larger array is alone
AHEAD = 384 * 2**20  # bytes that are under way at a time, besides the largest run
READERS = min(4, os.cpu_count() or 1)  # threads


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, variables unwrapped. Raises ValueError if two names are one."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable)
    found = {_name(path): leaf.get_value() if _is_variable(leaf) else leaf for path, leaf in leaves}
    if len(found) != len(leaves):
        raise ValueError("two leaves of the tree have the same name; its keys contain dots")
    return found


def fill(abstract: Tree, arrays: Mapping[str, Any]) -> Tree:
    """A tree like `abstract` whose leaves are taken from `arrays`, by name."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=_is_variable)
    return jax.tree_util.tree_unflatten(
        structure,
        [
            leaf.replace(arrays[_name(path)]) if _is_variable(leaf) else arrays[_name(path)]
            for path, leaf in leaves
        ],
    )


def nbytes(array: Any) -> int:
    """Bytes of an array, which may be abstract."""
    return array.size * array.dtype.itemsize


def runs(sizes: Mapping[str, int], limit: int | None = None) -> list[list[str]]:
    """Names in their order, in runs of at most `limit` bytes (None: `RUN`), or of one larger."""
    limit = RUN if limit is None else limit
    found: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(name)
        room -= size
    return found


def ahead(work: Callable[[str], Result], sizes: Mapping[str, int]) -> Iterator[dict[str, Result]]:
    """Run by run, `work` done on the names by several threads, which go on with the next runs.

    What is under way or waits here, and what the caller has, is of no more bytes (`sizes`) in all
    than the largest run and `AHEAD`: a run is emptied when the caller asks for the next.
    """
    names = runs(sizes)
    costs = [sum(sizes[name] for name in run) for run in names]
    limit = max(costs, default=0) + AHEAD
    started: deque[dict[str, Future[Result]]] = deque()
    begun = held = 0
    pool = ThreadPoolExecutor(READERS, "read")
    try:
        for cost in costs:
            while begun < len(names) and held + costs[begun] <= limit:
                started.append({name: pool.submit(work, name) for name in names[begun]})
                held += costs[begun]
                begun += 1
            futures = started.popleft()
            done = {name: futures.pop(name).result() for name in [*futures]}
            yield done
            done.clear()
            held -= cost
    finally:
        pool.shutdown(cancel_futures=True)


def placed(
    struct: jax.ShapeDtypeStruct, part: Callable[[Any], np.ndarray]
) -> np.ndarray | jax.Array:
    """The array that `struct` describes, on the devices that its sharding says, or in host memory
    if it has none. `part` gives a part of it by an index; what no device here holds is not asked
    for, what several hold once.
    """
    if not isinstance(struct.sharding, Sharding):
        return part(...)
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def once(index: Any) -> np.ndarray:
        key = tuple(one.indices(n)[:2] for one, n in zip(index, struct.shape, strict=True))
        if key not in parts:
            parts[key] = part(index)
        return parts[key]

    array = jax.make_array_from_callback(struct.shape, struct.sharding, once)
    return array.block_until_ready()  # or host copies of several would pile up


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
