"""CSP: cross-self pruning, each head's cache by attention within and between modalities.

Source: Pei et al., "Cross-Self KV Cache Pruning for Efficient Vision-Language Inference", arXiv
2412.04652; where paper and released code differ, the code is followed, but where it lists a token
twice: here the next best one takes its place.

          columns    visual         text        recent
    last rows    ┌──────────────┬─────────────┬────────┐
      of text    │ inter        │ intra       │  stay  │     two lists of the best columns,
      of visual  │ intra        │ inter       │        │     one by each sum
                 └──────────────┴─────────────┴────────┘

The last tenth of the rows looks, one row at least. A column's sum over rows of its own modality is
its intra score, that over the other rows its inter score; `ratio` of the budget goes to the best by
inter (the code gives each list one at least). As many of the last columns as there are rows that
look stay anyway. Attention is an n-softmax here, which need not add up to one:
exp(o) / (1 + Σ exp(o)). What the layer itself computes is not touched.

The budget is `keep` visual tokens and all text, and may be spent on either. Keys of a group of
query heads are scored by the mean over the group (our reading; the code knows no grouped queries).
Where a layer attends to visual tokens alone there are only inter scores.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep, Pruner, Reduction, Site, View
from catp_jax.pruning.scores import attention_received, check_keep, evidence_of, last_rows
from catp_jax.struct import pytree, static

ONE_OF = 10
"""So many rows one looks, the last ones of a sample."""


@pytree
class CSP(Pruner[tuple[()]]):
    """Keeps, in each head of each layer's cache, so many entries as `keep` visual tokens and the
    text are; `limit` leaves fewer to a sample.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)

    site: Site = static(default=Site.CACHE)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    ratio: float | Float[Array, ""] = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.ratio, int | float) and not 0 <= self.ratio <= 1:
            raise ValueError(f"CSP wants a ratio between 0 and 1, got {self.ratio}")
        check_keep(self.keep)

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        if not view.num_visual:  # a layer that reads text alone
            return Reduction(), state
        intra, inter, recent = scores(view)
        is_text = view.valid & (view.numbers < 0)
        size = view.valid.shape[1]
        budget = jnp.full(view.valid.shape[0], min(self.keep, view.num_visual), jnp.int32)
        if self.limit is not None:
            budget = jnp.minimum(budget, self.limit)
        budget = budget + is_text.sum(axis=1, dtype=jnp.int32)

        from_last = jnp.cumsum(recent[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
        recent &= from_last <= budget[:, None]
        left = budget - recent.sum(axis=1, dtype=jnp.int32)
        share = left.astype(jnp.float32) * jnp.asarray(self.ratio, jnp.float32)
        by_inter = jnp.floor(share + 1e-4).astype(jnp.int32)  # float32 may lie just below
        candidates = jnp.broadcast_to((view.valid & ~recent)[:, None], intra.shape)
        chosen = best(left - by_inter, candidates, intra, inter)
        chosen |= best(by_inter, candidates & ~chosen, inter, intra)
        kept = chosen | recent[:, None]

        width = size - view.num_visual + min(self.keep, view.num_visual)
        index = jax.lax.broadcasted_iota(jnp.int32, kept.shape, 2)
        empty, indices = jax.lax.sort((~kept, index), num_keys=2, dimension=2)
        keep = Keep(indices=indices[..., :width], valid=~empty[..., :width])
        return Reduction(tokens=keep), state


def scores(
    view: View,
) -> tuple[Float[Array, "b kv n"], Float[Array, "b kv n"], Bool[Array, "b n"]]:
    """Intra and inter scores by head, and which columns stay as the last ones."""
    shown = evidence_of(view)
    is_row = view.sees.any(axis=2)
    number = jnp.maximum(is_row.sum(axis=1, dtype=jnp.int32, keepdims=True) // ONE_OF, 1)
    rows, looks = last_rows(is_row, number, max(is_row.shape[1] // ONE_OF, 1))
    queries = jnp.take_along_axis(shown.queries, rows[:, :, None, None], axis=1)
    sees = jnp.take_along_axis(view.sees, rows[:, :, None], axis=1) & looks[..., None]

    # a decoder's last rows are those of its text; in cross-attention all rows are of text
    text = view.valid.shape[1] - view.num_visual
    row_is_visual = (rows < view.sees.shape[1] - text) & (text > 0)
    is_visual = (view.numbers >= 0)[:, None]
    kv = shown.keys.shape[2]

    def received(is_from: Bool[Array, "b o"]) -> Float[Array, "b kv n"]:
        some = attention_received(queries, shown.keys, sees & is_from[..., None], n_softmax)
        return some.reshape(some.shape[0], kv, -1, some.shape[2]).mean(axis=2)

    of_text = received(~row_is_visual)
    of_visual = received(row_is_visual) if text else jnp.zeros_like(of_text)
    from_last = jnp.cumsum(view.valid[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
    recent = view.valid & (from_last <= number) & (text > 0)
    intra, inter = (
        jnp.where(is_visual, *pair) for pair in ((of_visual, of_text), (of_text, of_visual))
    )
    return intra, inter, recent


def n_softmax(
    logits: Float[Array, "b h s n"], sees: Bool[Array, "b one s n"]
) -> Float[Array, "b h s n"]:
    """exp(o) / (1 + Σ exp(o)) over what each row sees."""
    logits = jnp.where(sees, logits, -jnp.inf)
    most = jnp.maximum(logits.max(axis=-1, keepdims=True), 0)
    weights = jnp.exp(logits - most)
    return weights / (jnp.exp(-most) + weights.sum(axis=-1, keepdims=True))


def best(
    number: Int[Array, " b"],
    among: Bool[Array, "b kv n"],
    first: Float[Array, "b kv n"],
    second: Float[Array, "b kv n"],
) -> Bool[Array, "b kv n"]:
    """Those with the highest first score, and of equals with the highest second one."""
    index = jax.lax.broadcasted_iota(jnp.int32, among.shape, 2)
    order = jax.lax.sort((~among, -first, -second, index), num_keys=4, dimension=2)[-1]
    place = jnp.argsort(order, axis=2)
    return among & (place < number[:, None, None])
