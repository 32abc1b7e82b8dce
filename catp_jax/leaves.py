"""The arrays of a tree by name, `model.lm_head.kernel`, and in runs that fit into memory.

A tree is anything that JAX can look inside, NNX modules among it. An abstract array is a
`jax.ShapeDtypeStruct`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Tree = TypeVar("Tree")

RUN = 384 * 2**20  # bytes of arrays that are read or written as one; a larger array is alone


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


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
