"""Elastic Cache: in each layer's cache the tokens between important ones are merged into them.

Source: Liu et al., "Efficient Inference of Vision Instruction-Following Models with Elastic Cache",
arXiv 2407.18121. The paper is followed; the released code takes an argsort for a rank, and its
ratio is the share that is dropped.

    attention received    .1  .7  .2  .1  .1  .6  .1
    anchors                   ▲               ▲
    buckets               └───────────┘└──────────┘      keys and values become means

The `keep` visual tokens that receive most attention, summed over rows and averaged over heads, are
anchors; all heads of a layer share them. Every other token goes to the nearest anchor, of two as
near ones to the earlier. Text is never merged.

Where tokens are patches of tiles, buckets end with their tile (our reading), and what a tile
without an anchor has is evicted. New tokens are all kept, as there is room for them anyway; the
paper drops one for each once its budget is full.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from catp_jax.contract import Keep, Merge, Pruner, Reduction, Site, View
from catp_jax.pruning.scores import attention_received, evidence_of, keep_best, keep_visual
from catp_jax.struct import pytree, static


@pytree
class ElasticCache(Pruner[tuple[()]]):
    """Merges a layer's visual tokens into `keep` of them; `limit` leaves fewer to a sample.

    `merges=False` evicts what is no anchor, the paper's comparison.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)

    site: Site = static(default=Site.CACHE)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    merges: bool = static(default=True)

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        if not view.num_visual:  # a layer that reads text alone
            return Reduction(), state
        shown = evidence_of(view)
        received = attention_received(shown.queries, shown.keys, view.sees).mean(axis=1)
        if not self.merges:
            return Reduction(tokens=keep_visual(view, self.keep, received, self.limit)), state
        is_visual = view.valid & (view.numbers >= 0)
        size = min(self.keep, view.num_visual)
        anchors = keep_best(self.keep, is_visual, received, limit=self.limit).first(size)
        groups, off_centre = nearest(view, anchors)
        text = jnp.arange(view.valid.shape[1], dtype=jnp.int32) - view.num_visual
        own = jnp.where(view.valid & ~is_visual, size + text, -1)  # text is a group of its own
        groups = jnp.where(is_visual, groups, own)
        total = size + view.valid.shape[1] - view.num_visual
        return Reduction(tokens=Merge.of(groups, off_centre, total)), state


def nearest(view: View, anchors: Keep) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
    """Which anchor each entry goes to, -1 for none, and how far away it is."""
    place = jnp.arange(view.valid.shape[1], dtype=jnp.int32)
    far = view.valid.shape[1]
    away = jnp.abs(place[None, None] - anchors.indices[:, :, None])
    goes = anchors.valid[:, :, None]
    if view.tiles is not None:
        tile = view.numbers // view.tiles.per_tile
        goes = goes & (tile[:, None] == anchors.apply(tile)[:, :, None])
    away = jnp.where(goes, away, far)
    closest = away.min(axis=1)
    group = jnp.argmin(away, axis=1).astype(jnp.int32)
    return jnp.where(closest < far, group, -1), closest
