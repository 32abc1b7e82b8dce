"""SGL: a small model looks where to look, a large one keeps what it looked at.

Source: Zhao et al., "A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating
Large VLMs", arXiv 2412.03324, "Small VLM-Guided Visual Token Pruning"; the released code is
followed.

    small model   prompt ─ READ ─ token ─ READ ─ token …    Watch: sums attention by visual token
    large model   prompt ─ LAYER, CROSS or ENTRY ─ …        SGL: keeps those with the largest sums

A visual token's score is the attention that it receives in the small model: in all layers and
heads, from the rows of the prompt from the last visual token on, that one included, and from every
new token that is fed back. All answers of a prompt (its beams, its samples) add to one sum.

- In a decoder those rows are the last visual token's own and those of the text behind it. The
  weights are the layer's own for the prompt; a new token's are over the prompt alone (our reading:
  READ does not show what else it attends to), where the code's are over new tokens, too.
- In cross-attention layers visual tokens have no rows. All rows of text count that see an image,
  but where marks of several images follow each other: there, those from the last mark on.

The large model is pruned in front of `layer` (site LAYER), the paper's K = ⌊f · layers⌋ with f of
0.4, 0.19 or 0.04 for 40 %, 20 % or 5 % of the tokens; K = 0 is site ENTRY. A cross-attention model
is pruned at its first cross-attention layer, as by FastV (our reading; the paper has none).

The two models must have the same visual tokens in the same order, see `catp_jax.guided`.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import Scored, attention_received, evidence_of
from catp_jax.struct import pytree, replace, static


@pytree
class Watched:
    """What one layer's visual tokens have received so far. `numbers` says which tokens they are
    (-1: none).
    """

    numbers: Int[Array, "b n"]
    received: Float[Array, "b n"]


@pytree
class Watch(Pruner[Watched]):
    """Prunes nothing; its state is how much attention each visual token of a layer received.

    A step reads everything, which is what `keep` says: a method at READ must have one, and a share
    is no count that a model with few visual tokens could refuse.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.READ,)

    site: Site = static(default=Site.READ)
    keep: str = static(default="100%")

    def start(self, view: View) -> Watched:
        return Watched(numbers=view.numbers[:, : view.num_visual], received=seen_by_rows(view))

    def __call__(self, view: View, state: Watched) -> tuple[Reduction, Watched]:
        return Reduction(), replace(state, received=state.received + seen_by_rows(view))


def seen_by_rows(view: View) -> Float[Array, "b n"]:
    """Attention that each visual token of a view receives, summed over heads and the rows that
    count.
    """
    visual = view.num_visual
    if not visual:  # a layer that reads text alone
        return jnp.zeros((view.valid.shape[0], 0), jnp.float32)
    shown = evidence_of(view)
    sees = view.sees & behind_images(view.sees[:, :, :visual])[:, :, None]
    return attention_received(shown.queries, shown.keys, sees).sum(axis=1)[:, :visual]


def behind_images(sees: Bool[Array, "b s n"]) -> Bool[Array, "b s"]:
    """The rows from the last visual token on: each sees as far as any row does that sees the first
    token it sees.

        decoder   1000   cross-attention   ---------   text before any image
                  1100                     11-------   first image
                  1110                     11-------
                  1111 ←  these            --111----   second one's mark, then the third's
                  1111 ←                   --1111111
    """
    index = jnp.arange(sees.shape[2], dtype=jnp.int32)[None, None]
    first = sees.argmax(axis=2)
    last = jnp.where(sees, index, -1).max(axis=2)
    farthest = jnp.where(sees, last[:, :, None], -1).max(axis=1)
    return (last >= 0) & (last == jnp.take_along_axis(farthest, first, axis=1))


def received(states: Mapping[int, Watched], size: int) -> Float[Array, "b n"]:
    """What each of `size` visual tokens, as they were before any pruning, received in all layers;
    `states` is what Watch reports.
    """
    batch = next(iter(states.values())).received.shape[0]
    row, total = jnp.arange(batch, dtype=jnp.int32)[:, None], jnp.zeros((batch, size), jnp.float32)
    for layer in states.values():
        numbers = jnp.asarray(layer.numbers)
        places = jnp.where(numbers < 0, size, numbers)
        total = total.at[row, places].add(jnp.asarray(layer.received), mode="drop")
    return total


@pytree
class SGL(Scored):
    """Keeps the `keep` visual tokens with the highest `scores`, which a guide gives: one for every
    visual token there was before any pruning, by its number. Raises ValueError without them.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.LAYER, Site.CROSS, Site.ENTRY)

    site: Site | None = static(default=None)
    layer: int = static(default=2)
    scores: Float[Array, "b all"] | None = None

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(
                f"SGL wants the number of a layer from 1 on, got {self.layer}; in front of all "
                "layers is site=Site.ENTRY"
            )

    def score(self, view: View) -> Float[Array, "b n"]:
        if self.scores is None:
            raise ValueError(
                "SGL wants a guide: a smaller model that has seen the same images says which "
                "visual tokens matter; ask with catp_jax.guided, or give scores"
            )
        numbers = jnp.clip(view.numbers, 0, self.scores.shape[1] - 1)
        return jnp.take_along_axis(self.scores, numbers, axis=1)
