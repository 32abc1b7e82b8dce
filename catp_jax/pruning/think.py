"""ThinK: key channels that hardly any query multiplies with leave the cache.

Source: Xu et al., "ThinK: Thinner Key Cache by Query-Driven Pruning", arXiv 2407.21018. The
released code is followed, but where query heads share keys: it chooses channels for each query
head, which saves nothing; here a group has one set, by the mean of its squared queries.

A channel's score is the norm of its queries, the last `window` that see anything, times that of the
keys. Keys of the last `window` tokens of text and of new ones keep every channel, and so do all
values. Logits are divided by the root of all channels, as before.

The budget is one of bytes: of what visual tokens take, as many as `keep` of them would, rounded up
to whole eights of channels (one by one, where a head has fewer than sixteen). Values stay, so that
keys give up twice that share: with half of the bytes nearly all channels are gone, and less cannot
be had. Eight (or one) always stay.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from catp_jax.contract import Channels, Pruner, Reduction, Site, View
from catp_jax.pruning.scores import check_keep, evidence_of, last_rows
from catp_jax.struct import pytree, static

EIGHTS = 8
"""Channels leave in eights, where a head has two of them at least; else one by one."""


@pytree
class ThinK(Pruner[tuple[()]]):
    """Leaves each key-value head of each layer so many key channels that visual tokens take as many
    bytes as `keep` of them, of `of` (None: of those that the layer has room for, which depends on
    the batch). All samples have as many channels: `limit` is not read.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)
    keeps_all: ClassVar[bool] = True
    is_by_bytes: ClassVar[bool] = True

    site: Site = static(default=Site.CACHE)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    of: int | None = static(default=None)
    window: int = static(default=32)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.window < 1:
            raise ValueError(f"ThinK wants a window of at least 1, got {self.window}")

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        if not view.num_visual:  # a layer that reads text alone
            return Reduction(), state
        shown = evidence_of(view)
        size, channels = view.valid.shape[1], shown.keys.shape[3]
        recent = min(self.window, size - view.num_visual)
        number = self.channels(channels, self.of or view.num_visual)

        is_row = view.sees.any(axis=2)
        window = min(self.window, is_row.shape[1])
        rows, looks = last_rows(is_row, jnp.full_like(view.numbers[:, :1], window), window)
        queries = jnp.take_along_axis(shown.queries, rows[:, :, None, None], axis=1)
        queries = jnp.where(looks[:, :, None, None], queries.astype(jnp.float32), 0)
        keys = jnp.where(view.valid[:, :, None, None], shown.keys.astype(jnp.float32), 0)
        kv = keys.shape[2]
        of_queries = (queries**2).sum(axis=1).reshape(keys.shape[0], kv, -1, channels).sum(axis=2)
        score = of_queries * (keys**2).sum(axis=1)
        best = jnp.argsort(-score, axis=2, stable=True)[:, :, :number].astype(jnp.int32)
        keys = Channels(indices=jnp.sort(best, axis=2), recent=recent)
        return Reduction(keys=keys), state

    def channels(self, channels: int, visual: int) -> int:
        """How many of a head's channels stay, if there are so many visual tokens."""
        dropped = 2 * channels * (visual - min(self.keep, visual)) / visual
        unit = EIGHTS if channels >= 2 * EIGHTS else 1
        number = -(-(channels - dropped) // unit) * unit
        return int(min(max(number, unit), channels))
