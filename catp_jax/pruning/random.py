"""Random selection: the baseline that every method has to beat."""

from typing import ClassVar

from jaxtyping import Array, Float

from catp_jax.contract import Site, View
from catp_jax.pruning.scores import Scored, Seed, drawn
from catp_jax.struct import pytree, static


@pytree
class Random(Scored):
    """Keeps `keep` visual tokens at random.

    The draw depends on `seed` and on a token's number alone, so a sample keeps the same tokens
    whatever else is in its batch, and a smaller budget keeps a part of what a larger one keeps.
    A seed for each sample gives each a draw of its own.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY, Site.CROSS)

    site: Site | None = static(default=None)
    seed: Seed = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, int) and not 0 <= self.seed < 2**31:
            raise ValueError(f"Random wants a seed between 0 and 2**31 - 1, got {self.seed}")

    def score(self, view: View) -> Float[Array, "b n"]:
        return drawn(self.seed, view.numbers)
