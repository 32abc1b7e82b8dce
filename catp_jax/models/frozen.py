"""A model as a tuple of arrays, for programs that are called once per token.

`jax.jit` takes an NNX module as it is, but walks its tree in Python at every call: many ms for
the 906 arrays of Llama 3.2 11B, more than a decode step takes on a GPU. A `Frozen` model hands over
the same arrays in under 1 ms (`benchmarks/call_overhead.py`).
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from catp_jax.contract import Room, Select, Site
from catp_jax.struct import pytree, static


class Structure:
    """A tree's structure; quick to compare with itself, which is what each call does. `sites` are
    the model's.
    """

    def __init__(self, treedef: Any, sites: frozenset[Site]):
        self.treedef, self.sites = treedef, sites
        self.number = hash(treedef)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self.treedef == other.treedef)


@pytree
class Frozen:
    """A model's arrays, which stand for the model wherever a program wants one."""

    arrays: tuple[Array, ...]
    structure: Structure = static()

    def __repr__(self) -> str:
        return f"Frozen({self.summary})"

    @property
    def summary(self) -> str:
        """The model's kind, its number of parameters, their number types."""
        arrays = [leaf for leaf in self.arrays if hasattr(leaf, "dtype")]  # JAX maps others, too
        parameters = sum(array.size for array in arrays)
        types = ", ".join(sorted({str(array.dtype) for array in arrays}))
        return f"{type(self.thaw()).__name__}, {parameters:,} parameters, {types}"

    @property
    def sites(self) -> frozenset[Site]:
        """See the model's own."""
        return self.structure.sites

    def thaw(self) -> Any:
        """The model itself."""
        return jax.tree.unflatten(self.structure.treedef, self.arrays)

    def front(self, inputs: Any) -> Any:
        """See the model's own."""
        return self.thaw().front(inputs)

    def back(self, front: Any, select: Select, room: Room) -> Any:
        """See the model's own."""
        return self.thaw().back(front, select, room)

    def step(self, tokens: Array, cache: Any, select: Select) -> Any:
        """See the model's own."""
        return self.thaw().step(tokens, cache, select)


def freeze(model: nnx.Module) -> Frozen:
    """The arrays of `model`, shared with it."""
    arrays, treedef = jax.tree.flatten(model)
    sites = getattr(model, "sites", frozenset[Site]())
    return Frozen(arrays=tuple(arrays), structure=Structure(treedef, sites))
