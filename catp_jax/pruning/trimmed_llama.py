"""Trimmed Llama: visual features chosen by the first cross-attention layer's heads.

Source: "Efficient LLaMA-3.2-Vision by Trimming Cross-attended Visual Features", arXiv 2504.00557.
No code was released with the paper.

            image tokens 0 … N-1                head 0's two best   ▒ ▒ · · · ·
    rows ┌───────────────────────┐  column      head 1's two best   · ▒ · ▒ · ·
         │ attention weights,    │  ───────→    union, kept         ▒ ▒ · ▒ · ·
         │ one such map per head │   sums       N = 6, k = 2, 3 of 6 kept
         └───────────────────────┘

Every query head takes the k image tokens that receive most of its attention, summed over the text
rows; the union over the heads is kept. Later cross-attention layers project and cache only those.

Not stated in the paper, our reading: the first layer itself attends to everything during prefill
and its cache is gathered afterwards; rows of padding and rows that see no image have no vote; N
counts the image tokens that some row sees; the set is chosen once per sample. Where the union is
cut, tokens go by their best rank within any head, then by the attention they get from all heads.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import attention_received, evidence_of, keep_best, rank
from catp_jax.struct import pytree, static


@pytree
class TrimmedReport:
    """What Trimmed Llama found, per sample.

    `union`: tokens that at least one head asked for. `overflow`: how many of them did not fit.
    (With `keep` alone heads ask for no number: the union is what is kept.)
    `mass`: share of the voting rows' attention that the kept tokens had, 0 … 1.
    """

    union: Int[Array, " b"]
    overflow: Int[Array, " b"]
    mass: Float[Array, " b"]


@pytree
class TrimmedLlama(Pruner[TrimmedReport]):
    """Three forms, by which fields are set:

        TrimmedLlama(keep=64)                 # exactly 64: the best by rank within any head
        TrimmedLlama(keep=64, per_head=16)    # union of 16 per head, capacity 64
        TrimmedLlama(keep=None, k_ratio=0.25) # the paper: union of ⌈0.25·N⌉ per head, uncut

    `k_ratio` may go with a capacity as well. It is an array leaf: other ratios reuse the program.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CROSS,)

    site: Site = static(default=Site.CROSS)
    keep: int | None = static()
    limit: Int[Array, " b"] | None = None
    per_head: int | None = static(default=None)
    k_ratio: float | Float[Array, ""] | None = None

    def __post_init__(self) -> None:
        if self.keep is None and not self._asks_for_a_number:
            raise ValueError(
                "TrimmedLlama(keep=None) keeps the whole union, so it wants per_head or k_ratio"
            )
        if self.per_head is not None and self.k_ratio is not None:
            raise ValueError("TrimmedLlama takes per_head (a count) or k_ratio, not both")
        if self.per_head is not None and self.per_head < 1:
            raise ValueError(f"TrimmedLlama wants per_head of at least 1, got {self.per_head}")
        if isinstance(self.k_ratio, int | float) and not 0 < self.k_ratio <= 1:
            raise ValueError(f"TrimmedLlama wants 0 < k_ratio <= 1, got {self.k_ratio}")

    def start(self, view: View) -> TrimmedReport:
        nothing = jnp.zeros(view.valid.shape[0], jnp.int32)
        return TrimmedReport(union=nothing, overflow=nothing, mass=nothing.astype(jnp.float32))

    def __call__(self, view: View, state: TrimmedReport) -> tuple[Reduction, TrimmedReport]:
        shown = evidence_of(view)
        received = attention_received(shown.queries, shown.keys, view.sees)
        total = received.sum(axis=1)
        best_rank = rank(jnp.where(view.valid[:, None], received, -1)).min(axis=1)
        union = view.valid & (best_rank < self._per_head(view)[:, None])

        size = view.valid.shape[1]
        keep = size if self.keep is None else self.keep
        kept = keep_best(keep, union, -best_rank, total, limit=self.limit)
        stay = kept.valid.sum(axis=1, dtype=jnp.int32)
        asked = union.sum(axis=1, dtype=jnp.int32) if self._asks_for_a_number else stay
        mass = jnp.where(kept.valid, kept.apply(total), 0).sum(axis=1)
        return Reduction(tokens=kept), TrimmedReport(
            union=asked,
            overflow=asked - stay,
            mass=mass / jnp.maximum(total.sum(axis=1), jnp.finfo(jnp.float32).tiny),
        )

    @property
    def _asks_for_a_number(self) -> bool:
        return self.per_head is not None or self.k_ratio is not None

    def _per_head(self, view: View) -> Int[Array, " b"]:
        """k, the number of tokens that each head may ask for."""
        available = view.valid.sum(axis=1, dtype=jnp.int32)
        if self.per_head is not None:
            return jnp.minimum(available, self.per_head)
        if self.k_ratio is None:
            return available
        share = jnp.asarray(self.k_ratio, jnp.float32) * available.astype(jnp.float32)
        asked = jnp.ceil(share - 1e-4).astype(jnp.int32)  # float32 may lie just above a whole k
        return jnp.clip(asked, jnp.minimum(available, 1), available)
