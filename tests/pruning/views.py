"""Views to try methods on: a random one with every kind of row, and ones of given weights."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from catp_jax.contract import Attention, Evidence, Keep, Pruners, Site, View, run_pruners
from catp_jax.struct import replace


def random_view(seed: int = 0, rows: int = 7, columns: int = 13) -> View:
    """Five samples of different sizes: one sees no image, one has text before the image, one has
    two images with a span each, all but one have padding in rows and columns. Padding holds large
    numbers, so that reading it shows.
    """
    rng = np.random.default_rng(seed)
    batch, heads, kv_heads, channels = 5, 6, 3, 4
    sees = np.zeros((batch, rows, columns), bool)
    sees[0] = True
    sees[1, 2 : rows - 2, : columns - 4] = True  # rows before the image and after the text
    sees[3, 1 : rows // 2, : columns // 3] = True
    sees[3, rows // 2 : rows - 1, columns // 3 : columns - 2] = True
    sees[4, : rows - 3, :3] = True
    sees[4, : rows - 3, 5:8] = True  # a hole: columns that nobody sees
    valid = sees.any(axis=1)

    queries = rng.normal(size=(batch, rows, heads, channels)) * 1.3
    keys = rng.normal(size=(batch, columns, kv_heads, channels))
    queries[~sees.any(axis=2)] = 50
    keys[~valid] = 0.001  # the shortest norm, were it read
    return View(
        site=Site.CROSS,
        layer=1,
        num_visual=columns,
        tokens=jnp.asarray(rng.normal(size=(batch, columns, 8)), jnp.float32),
        attention=Attention(
            queries=jnp.asarray(queries, jnp.float32), keys=jnp.asarray(keys, jnp.float32)
        ),
        values=jnp.asarray(rng.normal(size=keys.shape), jnp.float32),
        evidence=None,
        numbers=jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (batch, columns)),
        valid=jnp.asarray(valid),
        sees=jnp.asarray(sees),
    )


def view_of_weights(weights: Sequence[Sequence[Sequence[float]]]) -> View:
    """One sample whose attention weights are `weights` [rows, heads, columns], given per row and
    head up to a factor; one KV head. Keys are unit vectors and queries the weights' logarithms.
    """
    array = np.asarray(weights, np.float64)[None]
    columns = array.shape[-1]
    keys = np.eye(columns)[None, :, None]
    return View(
        site=Site.CROSS,
        layer=0,
        num_visual=columns,
        tokens=jnp.zeros((1, columns, 2)),
        attention=Attention(
            queries=jnp.asarray(np.log(array), jnp.float32), keys=jnp.asarray(keys, jnp.float32)
        ),
        values=jnp.asarray(keys, jnp.float32),
        evidence=None,
        numbers=jnp.arange(columns, dtype=jnp.int32)[None],
        valid=jnp.ones((1, columns), bool),
        sees=jnp.ones((1, array.shape[1], columns), bool),
    )


def cache_view(seed: int = 0, visual: int = 9, text: int = 12) -> View:
    """What a decoder shows of a layer's cache: three samples of visual tokens and text, of which
    one has fewer of each. Rows are the same sequence; padding holds large queries and short keys.
    """
    rng = np.random.default_rng(seed)
    batch, heads, kv_heads, channels, size = 3, 6, 3, 4, visual + text
    valid = np.ones((batch, size), bool)
    valid[1, visual - 3 : visual] = False
    valid[1, size - 2 :] = False
    valid[2, size - 5 :] = False
    earlier = np.tril(np.ones((size, size), bool))[None]
    sees = earlier & valid[:, None] & valid[:, :, None]
    queries = rng.normal(size=(batch, size, heads, channels)) * 1.3
    keys = rng.normal(size=(batch, size, kv_heads, channels))
    queries[~valid], keys[~valid] = 50, 0.001
    numbers = np.where(np.arange(size) < visual, np.arange(size), -1)
    return View(
        site=Site.CACHE,
        layer=1,
        num_visual=visual,
        attention=Attention(
            queries=jnp.asarray(queries, jnp.float32), keys=jnp.asarray(keys, jnp.float32)
        ),
        values=jnp.asarray(rng.normal(size=keys.shape), jnp.float32),
        numbers=jnp.asarray(np.where(valid, numbers, -1), jnp.int32),
        valid=jnp.asarray(valid),
        sees=jnp.asarray(sees),
    )


CROSS_LAYERS, SELF_LAYERS, QUERIES, IMAGE_TOKENS = 3, 4, 7, 10


def entry_view(seed: int = 0, batch: int = 3) -> View:
    """What a model with a Q-Former of 3 cross-attention layers shows at its entry."""
    rng = np.random.default_rng(seed)

    def attention(rows: int, columns: int, heads: int) -> Attention:
        return Attention(
            queries=jnp.asarray(rng.normal(size=(batch, rows, heads, 4)) * 1.5, jnp.float32),
            keys=jnp.asarray(rng.normal(size=(batch, columns, heads, 4)), jnp.float32),
        )

    return entry(
        tokens=rng.normal(size=(batch, QUERIES, 8)),
        cross=[attention(QUERIES, IMAGE_TOKENS, 3) for _ in range(CROSS_LAYERS)],
        among=[attention(QUERIES, QUERIES, 5) for _ in range(SELF_LAYERS)],
        vision=attention(IMAGE_TOKENS, IMAGE_TOKENS, 2),
    )


def entry(
    tokens: np.ndarray,
    cross: Sequence[Attention],
    among: Sequence[Attention],
    vision: Attention,
) -> View:
    """A view at the entry, of this evidence."""
    batch, number, _ = tokens.shape
    numbers = jnp.arange(number, dtype=jnp.int32)
    return View(
        site=Site.ENTRY,
        layer=0,
        num_visual=number,
        tokens=jnp.asarray(tokens, jnp.float32),
        attention=None,
        values=None,
        evidence=Evidence(cross=tuple(cross), among=tuple(among), vision=vision),
        numbers=jnp.broadcast_to(numbers, (batch, number)),
        valid=jnp.ones((batch, number), bool),
        sees=jnp.ones((batch, 2, number), bool),
    )


def attention_of(weights: Sequence[Sequence[Sequence[float]]]) -> Attention:
    """One sample's attention with the given weights [heads, rows, columns]."""
    logs = np.log(np.asarray(weights, np.float64)).transpose(1, 0, 2)[None]
    heads, columns = logs.shape[2:]
    keys = np.broadcast_to(np.eye(columns)[None, :, None], (1, columns, heads, columns))
    return Attention(queries=jnp.asarray(logs, jnp.float32), keys=jnp.asarray(keys, jnp.float32))


def sample_of(attention: Attention, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """A sample's queries and keys."""
    return np.asarray(attention.queries[sample]), np.asarray(attention.keys[sample])


def shown(view: View, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sample's queries, keys and `sees`, as the oracles take them."""
    if view.attention is None:
        raise ValueError("this view shows no attention")
    return tuple(
        np.asarray(array[sample])
        for array in (view.attention.queries, view.attention.keys, view.sees)
    )


def with_attention(view: View, **changed: Array) -> View:
    """The view with other `queries` or `keys`."""
    return replace(view, attention=replace(view.attention, **changed))


run = jax.jit(lambda pruner, view: pruner(view, pruner.start(view)))
"""A method on a view, compiled."""


@jax.jit
def prune(pruners: Pruners, view: View) -> tuple[Keep | None, tuple]:
    """Which entries several methods leave, and their states."""
    reduction, states = run_pruners(pruners, view)
    return reduction.tokens, states


def kept(keep: Keep, *sample: int) -> list[int]:
    """A sample's kept entries, or those of one of its heads, as Python numbers."""
    indices, valid = np.asarray(keep.indices), np.asarray(keep.valid)
    return indices[sample][valid[sample]].tolist()
