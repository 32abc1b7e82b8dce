"""K-norm: the tokens whose keys are short. Needs no attention weights at all.

Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
arXiv 2406.11430: in trained decoders a low key norm goes with high attention. The paper selects per
head; here one set serves all heads and layers, so norms are averaged over the KV heads (our
reading). In Llama 3.2 Vision's cross-attention keys are cached after an RMSNorm, which leaves only
what its learned scale makes of their directions.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from catp_jax.contract import Site, View
from catp_jax.pruning.scores import Scored, evidence_of
from catp_jax.struct import pytree, static


@pytree
class KNorm(Scored):
    """Keeps the `keep` visual tokens with the smallest mean key norm."""

    sites: ClassVar[tuple[Site, ...]] = (Site.CROSS,)

    site: Site = static(default=Site.CROSS)

    def score(self, view: View) -> Float[Array, "b n"]:
        norms = jnp.linalg.norm(evidence_of(view).keys.astype(jnp.float32), axis=-1).mean(axis=-1)
        return -norms
