"""K-norm: the tokens whose keys are short. Needs no attention weights at all.

Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
arXiv 2406.11430: in trained decoders a low key norm goes with high attention.

- In the cache (site CACHE) as in the paper: every head of every layer keeps tokens of its own,
  after the prompt was read. The paper prunes text too; here text stays.
- At the first cross-attention layer (site CROSS) one set serves all heads and layers, so norms are
  averaged over the key-value heads (our reading); later layers then project fewer features.

In Llama 3.2 Vision's cross-attention keys are cached after an RMSNorm, which leaves only what its
learned scale makes of their directions.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from catp_jax.contract import Site, View
from catp_jax.pruning.scores import Scored, evidence_of
from catp_jax.struct import pytree, static


@pytree
class KNorm(Scored):
    """Keeps the `keep` visual tokens with the smallest key norm: in the cache each head its own,
    before it those with the smallest mean.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.CROSS, Site.CACHE)

    site: Site | None = static(default=None)

    def score(self, view: View) -> Float[Array, "b n"] | Float[Array, "b kv n"]:
        norms = jnp.linalg.norm(evidence_of(view).keys.astype(jnp.float32), axis=-1)
        return -jnp.swapaxes(norms, 1, 2) if view.site is Site.CACHE else -norms.mean(axis=-1)
