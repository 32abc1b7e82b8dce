"""CATP: the Q-Former's queries, elected by the image tokens.

Source: Liao et al., "CATP: Cross-Attention Token Pruning for Accuracy Preserved Multimodal Model
Inference", arXiv 2404.08567; where paper and released code differ, the code is followed.

           image tokens 0 … N-1            each column ranks the queries
    ┌───────────────────────┐              q0  2 0 1 …
    │ cross-attention of    │   ───────→   q1  0 2 2 …   → points of q1: 0+2+2+…
    │ the queries, per head │   by rank    q2  1 1 0 …
    └───────────────────────┘

A Borda count: in every head every image token gives a query as many points as there are queries
that it has less attention from. Points go by rank, since each query's attention sums to 1. The
`keep` queries with most points stay.

With image weights (the paper's variant) an image token's vote counts as much as the attention that
it receives in the last block of the image encoder. The released code multiplies the attention by
them *before* ranking, which cannot change a rank; here they weigh the votes.
"""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from catp_jax.contract import Attention, Evidence, Site, View
from catp_jax.pruning.scores import Scored, attention, attention_received
from catp_jax.struct import pytree, static


@pytree
class CATP(Scored):
    """Keeps the `keep` queries with most votes. Whose votes count, by cross-attention layer:

        CATP(keep=8)                        # the last layer's: the released default
        CATP(keep=8, layers="first")        # the best in the paper's own study; "all" for all
        CATP(keep=8, layers=2)              # one layer's, counted from 1 as in the paper
        CATP(keep=8, weights=jnp.asarray([1, 0, 0, 0, 0, 0.5]))  # each layer's votes, weighted

    `weights` is an array leaf: other weights reuse the program.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY,)

    site: Site = static(default=Site.ENTRY)
    layers: Literal["last", "first", "all"] | int = static(default="last")
    weights: Float[Array, " layers"] | None = None
    image_weights: bool = static(default=False)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) and self.layers not in ("last", "first", "all"):
            raise ValueError(
                f"CATP takes the votes of layers 'last', 'first', 'all' or a number from 1 on, "
                f"got {self.layers!r}"
            )
        if isinstance(self.weights, list | tuple):
            raise ValueError("CATP takes its weights as an array: jnp.asarray([…])")
        if self.weights is not None and self.layers != "last":
            raise ValueError("CATP takes layers or weights, not both")

    def score(self, view: View) -> Float[Array, "b n"]:
        evidence = queries_evidence(view, "CATP")
        image = image_token_weights(evidence.vision) if self.image_weights else None
        points = [weight * votes(layer, image) for weight, layer in self._voters(evidence)]
        return jnp.take_along_axis(sum(points[1:], points[0]), view.numbers, axis=1)

    def _voters(
        self, evidence: Evidence
    ) -> list[tuple[float, Attention] | tuple[Float[Array, ""], Attention]]:
        """The layers whose votes count, with their weights."""
        cross = evidence.cross
        if self.weights is not None:
            if self.weights.shape != (len(cross),):
                raise ValueError(
                    f"CATP got {self.weights.size} layer weights, but this model has "
                    f"{len(cross)} cross-attention layers; give one for each"
                )
            weights = self.weights.astype(jnp.float32)
            return [(weights[number], layer) for number, layer in enumerate(cross)]
        if self.layers == "all":
            return [(1.0, layer) for layer in cross]
        if isinstance(self.layers, int):
            if not 1 <= self.layers <= len(cross):
                raise ValueError(
                    f"CATP got layers={self.layers}, but this model's cross-attention layers are "
                    f"1 to {len(cross)}"
                )
            return [(1.0, cross[self.layers - 1])]
        return [(1.0, cross[0 if self.layers == "first" else -1])]


def queries_evidence(view: View, method: str) -> Evidence:
    """What a Q-Former shows. Raises ValueError if there is none."""
    if view.evidence is None:
        raise ValueError(
            f"{method} reads a Q-Former's attention, which this model does not have at site "
            f"{view.site.name}"
        )
    return view.evidence


def votes(layer: Attention, image: Float[Array, "b n"] | None) -> Float[Array, "b q"]:
    """Each query's points from one cross-attention layer, over all heads and image tokens.

    Of queries with equal attention the one with the lower number has less, as in a stable sort.
    """
    queries, columns = layer.queries.shape[1], layer.keys.shape[1]
    seen = jnp.ones((layer.queries.shape[0], queries, columns), bool)
    weights = attention(layer.queries, layer.keys, seen)
    mine, other = weights[:, :, :, None], weights[:, :, None, :]
    numbers = jnp.arange(queries, dtype=jnp.int32)
    is_later = (numbers[:, None] > numbers[None])[None, None, :, :, None]
    beats = (mine > other) | ((mine == other) & is_later)
    # the barrier keeps XLA from one sum over all three axes, which takes 6 × as long on a CPU
    points = jax.lax.optimization_barrier(beats.sum(axis=(1, 3), dtype=jnp.int32))
    if image is None:
        return points.sum(axis=-1).astype(jnp.float32)
    return jnp.einsum("bqn,bn->bq", points.astype(jnp.float32), image)


def image_token_weights(vision: Attention) -> Float[Array, "b n"]:
    """Attention that each image token receives, over all heads and rows; sums to 1."""
    batch, tokens = vision.keys.shape[:2]
    seen = jnp.ones((batch, tokens, tokens), bool)
    received = attention_received(vision.queries, vision.keys, seen).sum(axis=1)
    return received / received.sum(axis=1, keepdims=True)
