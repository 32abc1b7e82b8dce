"""FastV: the tokens that the prompt's last token attends to.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764. The released
code is followed: the score is the last row of the attention, averaged over the heads. The paper's
text speaks of the attention received from all tokens, which is `rows="all"`.

- In a decoder that holds visual tokens in its sequence (site LAYER), the score is the attention of
  the layer before `layer`, and from `layer` on the sequence is shorter. The paper's K is `layer`.
- In a cross-attention model (site CROSS), it is that of the first cross-attention layer, whose and
  all later keys and values are gathered.
"""

from typing import ClassVar, Literal

from jaxtyping import Array, Float

from catp_jax.contract import Site, View
from catp_jax.pruning.scores import (
    Scored,
    attention_received,
    evidence_of,
    last_row_attention,
)
from catp_jax.struct import pytree, static


@pytree
class FastV(Scored):
    """Keeps the `keep` visual tokens with most attention from the last row that sees any, or from
    all rows together.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.LAYER, Site.CROSS)

    site: Site | None = static(default=None)
    layer: int = static(default=2)
    rows: Literal["last", "all"] = static(default="last")

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(f"FastV wants the number of a layer from 1 on, got {self.layer}")

    def score(self, view: View) -> Float[Array, "b n"]:
        if self.rows == "last":
            return last_row_attention(view).mean(axis=1)
        shown = evidence_of(view)
        return attention_received(shown.queries, shown.keys, view.sees).mean(axis=1)
