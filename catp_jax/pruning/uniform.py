"""Uniform selection: visual tokens at even distances; a baseline that looks at nothing."""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from catp_jax.contract import Site, View
from catp_jax.pruning.scores import Scored
from catp_jax.struct import pytree, static


@pytree
class Uniform(Scored):
    """Keeps `keep` visual tokens at even distances, in the order in which the model has them.

    Of eight tokens, two are the fourth and the last.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY, Site.CROSS)

    site: Site | None = static(default=None)

    def score(self, view: View) -> Float[Array, "b n"]:
        is_visual = view.valid & (view.numbers >= 0)
        available = is_visual.sum(axis=1, dtype=jnp.int32, keepdims=True)
        keep = self.keep if self.limit is None else jnp.minimum(self.keep, self.limit)[:, None]
        before = (jnp.cumsum(is_visual, axis=1, dtype=jnp.int32) - 1) * keep
        is_next = (before + keep) // jnp.maximum(available, 1) > before // jnp.maximum(available, 1)
        return is_next.astype(jnp.float32)
