"""L2 norm: the Q-Former's queries whose output is long; a baseline of the CATP paper.

Source: Liao et al., "CATP", arXiv 2404.08567, and its released code: the norm of the query's last
hidden state, before it is projected into the language model.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import keep_visual
from catp_jax.struct import pytree, static


@pytree
class L2Norm(Pruner[tuple[()]]):
    """Keeps the `keep` visual tokens with the largest L2 norm."""

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY,)

    site: Site = static(default=Site.ENTRY)
    keep: int = static()
    limit: Int[Array, " b"] | None = None

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        norms = jnp.linalg.norm(view.tokens.astype(jnp.float32), axis=-1)
        return Reduction(tokens=keep_visual(view, self.keep, norms, self.limit)), state
