"""Position: the first queries; a baseline of the CATP paper that looks at nothing.

Source: Liao et al., "CATP", arXiv 2404.08567, and its released code.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from catp_jax.contract import Site, View
from catp_jax.pruning.scores import Scored
from catp_jax.struct import pytree, static


@pytree
class Position(Scored):
    """Keeps the first `keep` visual tokens."""

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY,)

    site: Site = static(default=Site.ENTRY)

    def score(self, view: View) -> Float[Array, "b n"]:
        return -view.numbers.astype(jnp.float32)
