"""Nearest centroid: tokens at even distances, each with what is most like it, as means; a baseline
for learned grouping (`vistog_grouping`) that learns nothing.

    tokens      a  b  c  d  e  f         keep 2: centroids c and f
    most like   c  f  c  c  f  f         → mean of a, c, d    mean of b, e, f

Likeness is the cosine of two tokens; of centroids as like, a token goes to the earlier. A centroid
is in its own group.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from catp_jax.contract import Merge, Pruner, Reduction, Site, View
from catp_jax.pruning.scores import rank
from catp_jax.pruning.uniform import Uniform
from catp_jax.pruning.vistog_grouping import seen_alike
from catp_jax.struct import pytree, static


@pytree
class NearestCentroid(Pruner[tuple[()]]):
    """Makes `keep` means of a sample's visual tokens, in the order of their centroids; `limit`
    leaves fewer to a sample.

    Tokens that other rows see than see any centroid go nowhere.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY, Site.CROSS)

    site: Site | None = static(default=None)
    keep: int = static()
    limit: Int[Array, " b"] | None = None

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        if view.tokens is None:
            raise ValueError(f"site {view.site.name} shows no tokens to tell which are alike")
        chosen, _ = Uniform(keep=self.keep, limit=self.limit)(view, ())
        centroids = chosen.tokens
        if centroids is None:  # a view without visual tokens
            return Reduction(), state
        is_visual = view.valid & (view.numbers >= 0)
        may = is_visual[:, None] & centroids.valid[..., None]
        may &= seen_alike(view.sees, centroids.indices)
        unit = directions(view.tokens)
        cosine = jnp.einsum("bkd,bnd->bkn", centroids.apply(unit), unit)
        place = jnp.arange(view.valid.shape[1], dtype=jnp.int32)[None, None]
        cosine = jnp.where(centroids.indices[..., None] == place, jnp.inf, cosine)
        cosine = jnp.where(may, cosine, -jnp.inf)
        groups = jnp.where(may.any(axis=1), cosine.argmax(axis=1).astype(jnp.int32), -1)
        size = centroids.indices.shape[1]
        return Reduction(tokens=Merge.of(groups, rank(cosine.max(axis=1)), size)), state


def directions(tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Tokens of length 1, in float32; one of length 0 stays."""
    tokens = tokens.astype(jnp.float32)
    length = jnp.linalg.norm(tokens, axis=2, keepdims=True)
    return tokens / jnp.where(length > 0, length, 1)
