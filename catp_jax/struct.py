"""Frozen dataclasses that JAX can look inside.

Every value that crosses a `jax.jit` boundary is a `@pytree`: immutable, compared by its fields,
its arrays are leaves and its `static()` fields are compiled into the program.

    @pytree
    class Keep:
        indices: Int[Array, "b k"]
        layer: int = static()
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import numpy as np

T = TypeVar("T")

replace = dataclasses.replace

AnyArray = jax.Array | np.ndarray
"""What goes into a program: on the host, or on a device already."""


def static(**options: Any) -> Any:
    """A field that is part of the program, not of its data: hashable; a new value compiles anew."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(static, dataclasses.field)
)
def pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only dataclass and registers it with JAX."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    data = [field.name for field in fields if not field.metadata.get("static")]
    meta = [field.name for field in fields if field.metadata.get("static")]

    keys = [jax.tree_util.GetAttrKey(name) for name in data]

    def flatten(tree: T) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(tree, name) for name in data], tuple(getattr(tree, name) for name in meta)

    def flatten_with_keys(tree: T) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, compiled = flatten(tree)
        return list(zip(keys, children, strict=True)), compiled

    def unflatten(compiled: tuple[Any, ...], children: Iterable[Any]) -> T:
        # not through __init__: JAX fills trees with placeholders that no check would pass
        tree = object.__new__(made)
        for name, value in [*zip(data, children, strict=True), *zip(meta, compiled, strict=True)]:
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made
