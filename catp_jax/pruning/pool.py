"""Pooling: means of neighbouring tokens in their place; a baseline that looks at nothing but where
they stand.

    a tile of 4 × 4 patches, keep 4      keep 5: 3 bands, of 1, 2 and 2 cells
        0 0 1 1                              0 0 0 0
        0 0 1 1                              0 0 0 0
        2 2 3 3                              1 1 2 2
        2 2 3 3                              3 3 4 4

- Where tokens are patches of tiles (Llama 3.2 Vision), each tile has an even share of the budget
  and is cut into so many cells, as near to squares as that goes; each becomes the mean of its
  patches. With fewer cells than tiles some tiles are left out, and a tile's class token, which has
  no place, is left out unless all of the tile stays.
- Where they have no places (the queries of a Q-Former), neighbours in their order are taken
  together. That order means nothing to the model, as it has none in a set.

The budget is met exactly, by a sample that has as many tokens.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from catp_jax.contract import Merge, Pruner, Reduction, Site, Tiles, View
from catp_jax.pruning.scores import check_keep
from catp_jax.struct import pytree, static

Groups = tuple[Int[Array, "b n"], Int[Array, "b n"]]
"""The group of each entry, -1 for none, and how far it is from its group's middle."""


@pytree
class Pool(Pruner[tuple[()]]):
    """Makes `keep` means of a sample's visual tokens; `limit` leaves fewer to a sample."""

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY, Site.CROSS)

    site: Site | None = static(default=None)
    keep: int = static()
    limit: Int[Array, " b"] | None = None

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        check_keep(self.keep)
        size = min(self.keep, view.num_visual)
        budget = jnp.full(view.valid.shape[0], size, jnp.int32)
        if self.limit is not None:
            budget = jnp.minimum(budget, self.limit)
        if view.tiles is not None and view.tiles.is_whole:
            groups, off_centre = cells(view.valid, view.tiles, budget)
        elif view.site is Site.ENTRY:
            groups, off_centre = neighbours(view.valid, budget)
        else:
            raise ValueError(
                f"Pool wants all patches in their places, which site {view.site.name} does not "
                "show after another method; let pool come first, or leave one out"
            )
        return Reduction(tokens=Merge.of(groups, off_centre, size)), state


def neighbours(valid: Bool[Array, "b n"], budget: Int[Array, " b"]) -> Groups:
    """Runs of valid entries, as even as whole numbers can be."""
    available = valid.sum(axis=1, dtype=jnp.int32, keepdims=True)
    number = jnp.clip(budget[:, None], 1, jnp.maximum(available, 1))
    place = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    group, off_centre = part(place, number, jnp.maximum(available, 1))
    return jnp.where(valid, group, -1), off_centre


def cells(valid: Bool[Array, "b n"], tiles: Tiles, budget: Int[Array, " b"]) -> Groups:
    """The cells that tiles are cut into, those of the first tile first."""
    rows, columns, others = tiles.rows, tiles.columns, tiles.others
    batch, per_tile = valid.shape[0], tiles.per_tile
    is_there = valid.reshape(batch, -1, per_tile).any(axis=2)
    count = is_there.sum(axis=1, dtype=jnp.int32, keepdims=True)
    budget = jnp.minimum(budget[:, None], count * per_tile)
    before = (jnp.cumsum(is_there, axis=1, dtype=jnp.int32) - 1) * budget
    first, end = (some // jnp.maximum(count, 1) for some in (before, before + budget))

    first, number = first[..., None], (end - first)[..., None]  # of tiles, each with its entries
    place = jnp.arange(per_tile, dtype=jnp.int32)[None, None]
    patch = jnp.maximum(place - others, 0)
    is_whole, number = number == per_tile, jnp.minimum(number, rows * columns)
    some = jnp.maximum(number, 1)
    heights = jnp.arange(rows, dtype=jnp.int32)[None, None]
    bands = (heights**2 * columns < some * rows).sum(axis=2, dtype=jnp.int32, keepdims=True)
    bands = jnp.minimum(bands, some)  # the root of `some`, rounded up, in square tiles
    band, off_row = part(patch // columns, bands, rows)
    left, right = band * some // bands, (band + 1) * some // bands
    cell, off_column = part(patch % columns, right - left, columns)

    group = jnp.where(is_whole, place, left + cell)
    is_in = (is_whole | ((place >= others) & (number > 0))) & is_there[..., None]
    group = jnp.where(is_in, first + group, -1).reshape(batch, -1)
    return jnp.where(valid, group, -1), (off_row + off_column).reshape(batch, -1)


def part(
    place: Int[Array, "..."], parts: Int[Array, "..."], size: int | Int[Array, "..."]
) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Which of so many even parts of `size` places one is in, and twice how far from its middle."""
    which = place * parts // size
    first, end = -(-which * size // parts), -(-(which + 1) * size // parts)
    return which, jnp.abs(2 * place - first - (end - 1))
