"""L2 norm: the Q-Former's queries whose output is long; a baseline of the CATP paper.

Source: Liao et al., "CATP", arXiv 2404.08567, and its released code: the norm of the query's last
hidden state, before it is projected into the language model.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from catp_jax.contract import Site, View
from catp_jax.pruning.scores import Scored
from catp_jax.struct import pytree, static


@pytree
class L2Norm(Scored):
    """Keeps the `keep` visual tokens with the largest L2 norm."""

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY,)

    site: Site = static(default=Site.ENTRY)

    def score(self, view: View) -> Float[Array, "b n"]:
        if view.tokens is None:
            raise ValueError(f"L2Norm reads tokens, which are not shown at site {view.site.name}")
        return jnp.linalg.norm(view.tokens.astype(jnp.float32), axis=-1)
