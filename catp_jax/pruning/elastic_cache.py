"""Elastic Cache: in each layer's cache the tokens between important ones are merged into them.

Source: Liu et al., "Efficient Inference of Vision Instruction-Following Models with Elastic Cache",
arXiv 2407.18121. The paper is followed; the released code takes an argsort for a rank, and its
ratio is the share that is dropped.

    attention received    .1  .7  .2  .1  .1  .6  .1
    anchors                   ▲               ▲
    buckets               └───────────┘└──────────┘      keys and values become means

The `keep` visual tokens that receive most attention, summed over rows and averaged over heads, are
anchors; all heads of a layer share them. Every other token goes to the nearest anchor, of two as
near ones to the earlier.

Once its budget is full, an answer drops an old entry for each new one, always the entry at one
place, the fixed point: what stands before it stays, and behind it are the latest (`Room`).

    tail 4, point 1, new tokens 0 … 6      0 1 2 3 → 0 2 3 4 → 0 3 4 5 → 0 4 5 6

Our reading: text is left as it is, where the paper merges all of the prompt but its first and last
tokens. Where tokens are patches of tiles, buckets end with their tile, and what a tile without an
anchor has is evicted.

The paper's fixed point lies in the prompt, 25 entries before its end, so that the question's last
words are dropped first. Here it lies in the answer, behind its first `point` tokens: a prompt's
entries are written once, and all of its beams and samples read them. So an answer has a budget of
its own, `tail`, in place of one with the prompt; without it all new tokens stay. It holds in every
layer that caches answers: in Llama 3.2 Vision those of self-attention, which see no visual token.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from catp_jax.contract import Keep, Merge, Pruner, Reduction, Site, View, check_tail
from catp_jax.pruning.scores import attention_received, evidence_of, keep_best, keep_visual
from catp_jax.struct import pytree, static


@pytree
class ElasticCache(Pruner[tuple[()]]):
    """Merges a layer's visual tokens into `keep` of them; `limit` leaves fewer to a sample.

    With `evicts` the others are dropped instead, the paper's comparison. Of an answer its first
    `point` tokens and the latest are cached, `tail` together; None: all.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)

    site: Site = static(default=Site.CACHE)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    evicts: bool = static(default=False)
    tail: int | None = static(default=None)
    point: int = static(default=0)

    def __post_init__(self) -> None:
        check_tail("elastic_cache", self.tail, self.point)

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        if not view.num_visual:  # a layer that reads text alone
            return Reduction(), state
        shown = evidence_of(view)
        received = attention_received(shown.queries, shown.keys, view.sees).mean(axis=1)
        if self.evicts:
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
    """Which anchor each entry goes to, -1 for none, and how far away it is.

    Only the anchor before it and the one after can be.
    """
    batch, size = view.valid.shape
    place = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), view.valid.shape)
    tile = jnp.zeros_like(place)
    if view.tiles is not None:
        tile = view.numbers // view.tiles.per_tile
    number = jnp.broadcast_to(jnp.arange(anchors.indices.shape[1]), anchors.indices.shape)
    where = jnp.where(anchors.valid, anchors.indices, size)  # beyond all: dropped
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    which = jnp.full((batch, size), -1, jnp.int32)
    which = which.at[row, where].set(number.astype(jnp.int32), mode="drop")

    before = jax.lax.cummax(jnp.where(which >= 0, place, -1), axis=1)
    after = jax.lax.cummin(jnp.where(which >= 0, place, size), axis=1, reverse=True)

    def away(other: Int[Array, "b n"]) -> Int[Array, "b n"]:
        there = jnp.clip(other, 0, size - 1)
        is_one = (other == there) & (jnp.take_along_axis(tile, there, axis=1) == tile)
        return jnp.where(is_one, jnp.abs(place - other), size)

    closest = jnp.minimum(away(before), away(after))
    chosen = jnp.clip(jnp.where(away(before) <= away(after), before, after), 0, size - 1)
    group = jnp.take_along_axis(which, chosen, axis=1)
    return jnp.where(closest < size, group, -1), closest
