"""Self-attention: the queries that the Q-Former's other queries look at; a baseline of CATP.

Source: Liao et al., "CATP", arXiv 2404.08567, and its released code, which names it after Wang et
al., "SpAtten", arXiv 2012.09852: attention received, summed over all layers, heads and query rows.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from catp_jax.contract import Attention, Pruner, Reduction, Site, View
from catp_jax.pruning.catp import queries_evidence
from catp_jax.pruning.scores import attention_received, keep_visual
from catp_jax.struct import pytree, static


@pytree
class SelfAttention(Pruner[tuple[()]]):
    """Keeps the `keep` queries that receive most self-attention in the Q-Former."""

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY,)

    site: Site = static(default=Site.ENTRY)
    keep: int = static()
    limit: Int[Array, " b"] | None = None

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        received = [received_by(layer) for layer in queries_evidence(view, "SelfAttention").among]
        score = jnp.take_along_axis(sum(received[1:], received[0]), view.numbers, axis=1)
        return Reduction(tokens=keep_visual(view, self.keep, score, self.limit)), state


def received_by(layer: Attention) -> Float[Array, "b q"]:
    """Attention that each query receives in one layer, over all heads and rows."""
    batch, queries = layer.keys.shape[:2]
    seen = jnp.ones((batch, queries, queries), bool)
    return attention_received(layer.queries, layer.keys, seen).sum(axis=1)
