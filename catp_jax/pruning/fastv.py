"""FastV: the tokens that the prompt's last token attends to.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764. The released
code is followed: the score is the last row of the attention, averaged over the heads (the paper's
text speaks of the attention received from all tokens). FastV was made for decoders that hold image
tokens in their sequence; in a cross-attention model the score is taken at the first
cross-attention layer and that layer's and all later keys and values are gathered.
"""

from typing import ClassVar

from jaxtyping import Array, Int

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import keep_best, last_row_attention
from catp_jax.struct import pytree, static


@pytree
class FastV(Pruner[tuple[()]]):
    """Keeps the `keep` visual tokens with most attention from the last row that sees an image."""

    site: ClassVar[Site] = Site.CROSS

    keep: int = static()
    limit: Int[Array, " b"] | None = None

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        score = last_row_attention(view).mean(axis=1)
        return Reduction(tokens=keep_best(self.keep, view.valid, score, limit=self.limit)), state
