"""ZipVL: each layer keeps as many tokens as hold most of its attention.

Source: He et al., "ZipVL: Efficient Large Vision-Language Models with Dynamic Token
Sparsification", arXiv 2410.08584, version 2, which drops the other tokens (version 1 stores them in
few bits). No code was released.

    attention received   .5 .2 .1 .1 .05 .05      tau = .9
    as a running sum     .5 .7 .8 .9              the fewest that hold it: four

Scores are read off some rows alone, the probes: the last 64, and 64 of the others at random. How
many tokens stay follows from the attention received, summed over probes and heads; which, from that
sum over the number of probes that can see the token. The layer's attention over the prompt is then
computed among these, and they alone are cached.

Our reading: text stays, whatever its score, and `tau` is a share of what visual tokens receive; in
the paper text is pruned alike. With `tau` below 1 tokens leave at any budget. Those that are left
out get nothing from the layer's attention. `keep` is how many there is room for: where more would
be needed, the best of them stay, and `Found` says so. Llama 3.2 Vision's first cross-attention
layer has read everything before it is asked: there the cache alone is pruned.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import (
    Seed,
    attention_received,
    check_keep,
    drawn,
    evidence_of,
    keep_visual,
)
from catp_jax.struct import pytree, static


@pytree
class Found:
    """How many visual tokens each sample wants in a layer, and how many of them have no room."""

    wanted: Int[Array, " b"]
    overflow: Int[Array, " b"]


@pytree
class ZipVL(Pruner[Found]):
    """Keeps in each layer as few visual tokens as receive the share `tau` of the attention, and at
    most `keep` of them; `limit` leaves fewer to a sample. `probes` rows are the last ones, and as
    many are drawn from the others by `seed`.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CACHE,)

    site: Site = static(default=Site.CACHE)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    tau: float = 0.975
    probes: int = static(default=64)
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.probes < 1:
            raise ValueError(f"ZipVL wants at least 1 probe, got {self.probes}")
        if isinstance(self.tau, float) and not 0 < self.tau <= 1:
            raise ValueError(f"ZipVL wants tau above 0 and at most 1, got {self.tau}")

    def start(self, view: View) -> Found:
        nothing = jnp.zeros(view.valid.shape[0], jnp.int32)
        return Found(wanted=nothing, overflow=nothing)

    def __call__(self, view: View, state: Found) -> tuple[Reduction, Found]:
        if not view.num_visual:  # a layer that reads text alone
            return Reduction(), state
        shown = evidence_of(view)
        rows = self.rows(view)
        queries = jnp.take_along_axis(shown.queries, rows[:, :, None, None], axis=1)
        sees = jnp.take_along_axis(view.sees, rows[:, :, None], axis=1)
        received = attention_received(queries, shown.keys, sees).sum(axis=1)
        seen_by = sees.sum(axis=1, dtype=jnp.int32).astype(jnp.float32)
        score = received / jnp.maximum(seen_by, 1)

        is_visual = view.valid & (view.numbers >= 0)
        wanted = fewest(jnp.where(is_visual, received, 0), jnp.asarray(self.tau, jnp.float32))
        wanted = jnp.minimum(wanted, is_visual.sum(axis=1, dtype=jnp.int32))
        room = jnp.full_like(wanted, min(self.keep, view.num_visual))
        room = room if self.limit is None else jnp.minimum(room, self.limit)
        keep = keep_visual(view, self.keep, score, jnp.minimum(wanted, room))
        found = Found(wanted=wanted, overflow=jnp.maximum(wanted - room, 0))
        return Reduction(tokens=keep, among=keep), found

    def rows(self, view: View) -> Int[Array, "b probes"]:
        """The rows that tokens are judged by; where there are too few, some that see nothing."""
        is_row = view.sees.any(axis=2)
        size = is_row.shape[1]
        from_last = jnp.cumsum(is_row[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
        others = drawn(self.seed, from_last)  # by the distance to the last row: of no padding
        order = jnp.where(is_row, jnp.where(from_last <= self.probes, 2.0, others), -1.0)
        best = jnp.argsort(-order, axis=1, stable=True)[:, : min(2 * self.probes, size)]
        return best.astype(jnp.int32)


def fewest(scores: Float[Array, "b n"], share: Float[Array, ""]) -> Int[Array, " b"]:
    """How many of the highest scores hold this share of their sum; one at least."""
    highest = -jnp.sort(-scores, axis=1)
    held = jnp.cumsum(highest, axis=1)
    return 1 + (held < share * held[:, -1:]).sum(axis=1, dtype=jnp.int32)
