"""Random selection: the baseline that every method has to beat, at each place where one prunes.

- Where tokens go into the language model (site ENTRY), or at the first cross-attention layer (site
  CROSS): what a site left open means.
- In front of a decoder layer (site LAYER), as FastV: the layers before it have all tokens.
- In the cache (site CACHE), as K-norm by head or CSP: once the prompt was read, the same tokens
  stay in every layer and every head, which papers call random eviction.
"""

from typing import ClassVar

from jaxtyping import Array, Float

from catp_jax.contract import Site, View
from catp_jax.pruning.scores import Scored, Seed, drawn
from catp_jax.struct import pytree, static


@pytree
class Random(Scored):
    """Keeps `keep` visual tokens at random.

    The draw depends on `seed` and on a token's number alone, so a sample keeps the same tokens
    whatever else is in its batch and wherever it is pruned, and a smaller budget keeps a part of
    what a larger one keeps. A seed for each sample gives each a draw of its own. `layer` is read at
    LAYER alone.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY, Site.CROSS, Site.LAYER, Site.CACHE)

    site: Site | None = static(default=None)
    seed: Seed = 0
    layer: int = static(default=2)

    def __post_init__(self) -> None:
        if isinstance(self.seed, int) and not 0 <= self.seed < 2**31:
            raise ValueError(f"Random wants a seed between 0 and 2**31 - 1, got {self.seed}")
        if self.layer < 1:
            raise ValueError(f"Random wants the number of a layer from 1 on, got {self.layer}")

    def score(self, view: View) -> Float[Array, "b n"]:
        return drawn(self.seed, view.numbers)
