"""Puts parameters, inputs and caches where the rules want them."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from catp_jax.sharding.rules import named_leaves, split, whole
from catp_jax.struct import pytree, static


def place(model: Any, mesh: Mesh) -> Any:
    """An abstract model whose leaves (jax.ShapeDtypeStruct) say where on the mesh they lie.

    Raises ValueError, with all that does not fit, if a size does not divide.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_variable)
    placed, problems = [], {}
    for keys, leaf in leaves:
        name = jax.tree_util.keystr(keys, simple=True, separator=".")
        struct, metadata = leaf.get_value(), leaf.get_metadata()
        try:
            spec = split(metadata["axes"], struct.shape, mesh, name, metadata.get("heads"))
        except ValueError as error:
            problems.setdefault(str(error).partition(": ")[2], name)
            continue
        sharding = NamedSharding(mesh, spec)
        placed.append(
            leaf.replace(jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding))
        )
    if problems:
        lines = [f"  {problem} (such as {name})" for problem, name in problems.items()]
        raise ValueError("the model does not fit the mesh\n" + "\n".join(lines))
    return jax.tree_util.tree_unflatten(structure, placed)


def kv_heads(model: Any) -> int:
    """Key-value heads of a model's language model."""
    for leaf in jax.tree.leaves(model, is_leaf=_is_variable):
        metadata = leaf.get_metadata()
        if "kv_heads" in metadata["axes"]:
            return int(metadata["heads"])
    return 1


def place_inputs(inputs: Any, mesh: Mesh) -> Any:
    """A batch of inputs on the mesh; from NumPy's arrays each device gets no more than its part.

    Prompts, or images, that do not divide over `data` and `fsdp` are whole on every device, which
    all do the same work on them.
    """
    leaves = [
        _put(leaf, where(axes, leaf.shape, mesh) or whole(mesh))
        for leaf, axes in named_leaves(inputs)
    ]
    return jax.tree.unflatten(jax.tree.structure(inputs), leaves)


def where(axes: tuple[str, ...] | None, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding | None:
    """Where the rules want an input or a cache; None if they do not say or it cannot be divided."""
    try:
        return None if axes is None else NamedSharding(mesh, split(axes, shape, mesh, ""))
    except ValueError:
        return None


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays and numbers, replicated: whole on every device."""
    return jax.tree.map(lambda leaf: _put(leaf, whole(mesh)), tree)


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def constrain(state: Any, mesh: Mesh) -> Any:
    """A cache inside a program, its arrays split by the rules as far as their sizes allow."""
    leaves = []
    for leaf, axes in named_leaves(state):
        sharding = where(axes, leaf.shape, mesh)
        leaves.append(
            leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
        )
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


@pytree
class Sharded:
    """A frozen model on a mesh, which stands for the model wherever a program wants one."""

    mesh: Mesh = static()
    frozen: Any

    def __repr__(self) -> str:
        axes = ",".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        return f"Sharded({self.summary}, {axes})"

    @property
    def summary(self) -> str:
        """See the frozen model's."""
        return self.frozen.summary

    @property
    def arrays(self) -> Any:
        """The parameters."""
        return self.frozen.arrays

    @property
    def sites(self) -> Any:
        """See the model's own."""
        return self.frozen.sites

    def thaw(self) -> Any:
        """The model itself."""
        return self.frozen.thaw()

    def front(self, inputs: Any) -> Any:
        """See the model's own."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self.frozen.front(inputs)

    def back(self, front: Any, select: Any, room: Any) -> Any:
        """See the model's own."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            logits, cache = self.frozen.back(front, select, room)
        return logits, constrain(cache, self.mesh)

    def step(self, tokens: Int[Array, " b"], cache: Any, select: Any) -> Any:
        """See the model's own."""
        logits, cache = self.frozen.step(tokens, cache, select)
        return logits, constrain(cache, self.mesh)


def sharded(frozen: Any) -> Sharded:
    """A frozen model whose arrays were placed on a mesh."""
    return Sharded(mesh=frozen.arrays[0].sharding.mesh, frozen=frozen)


def fetch(tree: Any) -> Any:
    """A program's results in the memory of every host."""

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(whole, tree)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
