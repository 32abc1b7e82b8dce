"""Position: the first queries; a baseline of the CATP paper that looks at nothing.

Source: Liao et al., "CATP", arXiv 2404.08567, and its released code.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import keep_visual
from catp_jax.struct import pytree, static


@pytree
class Position(Pruner[tuple[()]]):
    """Keeps the first `keep` visual tokens."""

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY,)

    site: Site = static(default=Site.ENTRY)
    keep: int = static()
    limit: Int[Array, " b"] | None = None

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        score = -view.numbers.astype(jnp.float32)
        return Reduction(tokens=keep_visual(view, self.keep, score, self.limit)), state
