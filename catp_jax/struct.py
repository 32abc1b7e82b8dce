"""Frozen dataclasses that JAX can look inside.

Every value that crosses a `jax.jit` boundary is a `@pytree`: immutable, compared by its fields,
its arrays are leaves and its `static()` fields are compiled into the program.

    @pytree
    class Keep:
        indices: Int[Array, "b k"]
        layer: int = static()
"""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")

replace = dataclasses.replace


def static(**options: Any) -> Any:
    """A field that is part of the program, not of its data: hashable; a new value compiles anew."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(static, dataclasses.field)
)
def pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only dataclass and registers it with JAX."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))
