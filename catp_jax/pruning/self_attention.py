"""Self-attention: the queries that the Q-Former's other queries look at; a baseline of CATP.

Source: Liao et al., "CATP", arXiv 2404.08567, and its released code, which names it after Wang et
al., "SpAtten", arXiv 2012.09852: attention received, summed over all layers, heads and query rows.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from catp_jax.contract import Attention, Site, View
from catp_jax.pruning.catp import queries_evidence
from catp_jax.pruning.scores import Scored, attention_received
from catp_jax.struct import pytree, static


@pytree
class SelfAttention(Scored):
    """Keeps the `keep` queries that receive most self-attention in the Q-Former."""

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY,)

    site: Site = static(default=Site.ENTRY)

    def score(self, view: View) -> Float[Array, "b n"]:
        evidence = queries_evidence(view, "SelfAttention")
        received = [received_by(layer, evidence.among_valid) for layer in evidence.among]
        return jnp.take_along_axis(sum(received[1:], received[0]), view.numbers, axis=1)


def received_by(layer: Attention, valid: Bool[Array, "b m"] | None = None) -> Float[Array, "b q"]:
    """Attention that each query receives from the queries in one layer, over all heads.

    Text that they look at besides takes its share of a row; `valid` tells it from padding.
    """
    batch, queries, columns = *layer.queries.shape[:2], layer.keys.shape[1]
    valid = jnp.ones((batch, columns), bool) if valid is None else valid
    seen = jnp.broadcast_to(valid[:, None], (batch, queries, columns))
    return attention_received(layer.queries, layer.keys, seen).sum(axis=1)[:, :queries]
