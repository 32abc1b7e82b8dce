"""Groupings with all their arrays at random, and views to group."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.contract import Site, View
from catp_jax.pruning.vistog_grouping import Grouping, VisToGGrouping
from catp_jax.struct import replace
from tests.pruning.views import random_view

WIDTH = 8  # of the views' tokens


def grouping_of(groups: int, width: int = WIDTH, seed: int = 0) -> Grouping:
    """One with all its arrays at random."""
    rng = np.random.default_rng(seed)

    def draw(rows: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(rows, width)) * 1.5 / width**0.5, jnp.float32)

    return Grouping(
        semantic=2 * draw(groups),
        w_q=draw(width),
        w_k=draw(width),
        w_v=draw(width),
        w_o=draw(width),
    )


def method_of(groups: int, limit: list[int] | None = None, **options: Any) -> VisToGGrouping:
    limits = None if limit is None else jnp.asarray(limit, jnp.int32)
    grouping = options.pop("grouping", None) or grouping_of(groups)
    return VisToGGrouping(keep=groups, grouping=grouping, limit=limits, **options)


def view_of(tokens: Sequence[Sequence[float]]) -> View:
    """One sample's tokens at the entry."""
    array = np.asarray(tokens, np.float32)[None]
    number = array.shape[1]
    return View(
        site=Site.ENTRY,
        layer=0,
        num_visual=number,
        tokens=jnp.asarray(array),
        numbers=jnp.arange(number, dtype=jnp.int32)[None],
        valid=jnp.ones((1, number), bool),
        sees=jnp.ones((1, 2, number), bool),
    )


def loud(seed: int) -> View:
    """A view of samples of every kind; padding holds large numbers."""
    view = random_view(seed)
    tokens = jnp.where(view.valid[..., None], view.tokens, 100 * view.tokens)
    return replace(view, tokens=tokens)


def alone(view: View, sample: int) -> View:
    return jax.tree.map(lambda array: array[sample : sample + 1], view)
