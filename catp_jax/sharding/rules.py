"""One table says which axes are split over which axes of the mesh.

Models name the axes of their parameters beside the kernels (`axes`), and those of everything else
in the jaxtyping annotations of their pytrees (`keys: Float[Array, "b slots kv d"]`). An axis that
the table does not have stays whole. A split is always exact: sizes that do not divide are an error
with the way out in it.

The mesh that users give has three axes. `data` splits the batch; every device has all weights.
`fsdp` splits the batch and the weights, which are gathered layer by layer. `tensor` splits heads
and hidden channels, so that a layer's work is divided. Inside, `tensor` is `kv` × `group`: the
key-value heads are split over `kv` and copied over `group`, since there may be fewer of them than
`tensor` devices.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Union

from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH = ("data", "fsdp")
TENSOR = ("kv", "group")

RULES: Mapping[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp",),
    "vision_embed": ("fsdp",),
    "qformer_embed": ("fsdp",),
    "rows": (*TENSOR, "fsdp"),  # of an embedding; where they do not divide, over fewer
    "vocab": TENSOR,
    "mlp": TENSOR,
    "heads": TENSOR,
    "vision_heads": TENSOR,
    "kv_heads": TENSOR[:1],
    # inputs, states and caches
    "b": BATCH,
    "r": BATCH,
    "i": BATCH,
    "kv": TENSOR[:1],
}
"""Axis of an array to axes of the mesh. The Q-Former's heads and channels are whole everywhere: it
has 12 heads, few weights and little to do."""


def split(
    axes: Sequence[str], shape: Sequence[int], mesh: Mesh, name: str, heads: int | None = None
) -> PartitionSpec:
    """How an array of these axes lies on the mesh.

    `heads` is how many attention heads an axis of them has; they are not cut. Raises ValueError,
    with the array's `name`, if a size does not divide or two axes want the same part of the mesh.
    """
    parts: list[tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
        onto = tuple(part for part in RULES.get(axis, ()) if mesh.shape[part] > 1)
        if axis == "rows":  # a vocabulary may have any size
            while size % math.prod(mesh.shape[part] for part in onto):
                onto = onto[:-1]
        for part in onto:
            if part in used:
                raise ValueError(
                    f"{name}: its axes {used[part]} and {axis} both go to {part!r} of the mesh"
                )
            used[part] = axis
        number = math.prod(mesh.shape[part] for part in onto)
        units = heads if heads is not None and axis.endswith("heads") else size
        if units % number:
            what = "heads" if units is heads else "entries"
            raise ValueError(
                f"{name}: axis {axis} has {units} {what}, which {in_words(onto, mesh)} does not "
                f"divide; take a mesh with one of {divisors(units)}"
            )
        parts.append(onto or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def shares(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[part] for part in BATCH)


def in_words(onto: Sequence[str], mesh: Mesh) -> str:
    """Axes of the mesh by the names that users know, with their sizes."""
    sizes: dict[str, int] = {}
    for part in onto:
        name = "tensor" if part in TENSOR else part
        sizes[name] = sizes.get(name, 1) * mesh.shape[part]
    return " × ".join(f"{name}={size}" for name, size in sizes.items())


def divisors(number: int) -> str:
    """All divisors of a number, for an error."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def named_leaves(
    tree: Any, axes: Sequence[tuple[str, ...]] = ()
) -> Iterator[tuple[Any, tuple[str, ...] | None]]:
    """Every leaf of a tree of dataclasses, dictionaries and tuples with its axes, None where no
    annotation says them; in JAX's order.
    """
    if dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            if not field.metadata.get("static"):
                yield from named_leaves(getattr(tree, field.name), axes_of(field.type))
    elif isinstance(tree, tuple | list | dict):
        for part in [tree[key] for key in sorted(tree)] if isinstance(tree, dict) else tree:
            yield from named_leaves(part, axes)
    elif tree is not None:
        yield tree, next((own for own in axes if len(own) == len(tree.shape)), None)


def axes_of(annotation: Any) -> list[tuple[str, ...]]:
    """The axes in a jaxtyping annotation: of several, for arrays of different ranks, each."""
    if typing.get_origin(annotation) in (Union, UnionType):
        return [axes for option in typing.get_args(annotation) for axes in axes_of(option)]
    text = getattr(annotation, "dim_str", None)
    if text is None or any(mark in text for mark in "*#.="):
        return []
    return [tuple(text.split())]


def whole(mesh: Mesh) -> NamedSharding:
    """Every device has all of it."""
    return NamedSharding(mesh, PartitionSpec())
