"""What a generation's arrays and products amount to, from shapes alone: nothing is compiled."""

import math
from typing import Any

import jax
import numpy as np

import convert
from catp_jax import families
from catp_jax.leaves import named
from catp_jax.models.blocks import Block
from convert.dtypes import cast, with_dtypes
from convert.families import family_of


def abstract_model(config: Any, dtype: Any) -> Any:
    """The abstract model in the number types that a load at `dtype` gives."""
    model, family = convert.abstract(config), family_of(config)
    names = named(model)
    return with_dtypes(model, {name: cast(family, name, np.dtype(dtype)) for name in names})


def inputs_of(config: Any, batch: int, tiles: int | None, length: int) -> tuple[Any, int]:
    """Abstract inputs of prompts of `length` tokens with an image each, and the visual tokens of
    one. Raises ValueError for a model that writes no text.
    """
    reader = families.family_of(config, "this model").reader
    return reader.abstract_inputs(config, batch, length, tiles)


def shard_bytes(tree: Any) -> int:
    """Bytes of placed arrays that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def caches(state: Any) -> tuple[list[Block], list[Block]]:
    """The blocks of self- and of cross-attention in a model's cache."""
    self_attention: list[Block] = []
    cross: list[Block] = []
    leaves = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda node: isinstance(node, Block)
    )
    for path, leaf in leaves:
        if isinstance(leaf, Block):
            is_cross = jax.tree_util.keystr(path[:1], simple=True) == "cross"
            (cross if is_cross else self_attention).append(leaf)
    return self_attention, cross
