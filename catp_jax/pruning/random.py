"""Random selection: the baseline that every method has to beat."""

from typing import ClassVar

import jax
from jaxtyping import Array, Int, UInt32

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import keep_visual
from catp_jax.struct import pytree, static


@pytree
class Random(Pruner[tuple[()]]):
    """Keeps `keep` visual tokens at random.

    The draw depends on `seed` and on a token's number alone, so a sample keeps the same tokens
    whatever else is in its batch, and a smaller budget keeps a part of what a larger one keeps.
    """

    sites: ClassVar[tuple[Site, ...]] = (Site.ENTRY, Site.CROSS)

    site: Site = static(default=Site.CROSS)
    keep: int = static()
    limit: Int[Array, " b"] | None = None
    seed: int | Int[Array, ""] | UInt32[Array, ""] = 0

    def __post_init__(self) -> None:
        if isinstance(self.seed, int) and not 0 <= self.seed < 2**31:
            raise ValueError(f"Random wants a seed between 0 and 2**31 - 1, got {self.seed}")

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        key = jax.random.key(self.seed)
        draw = jax.vmap(
            jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(key, number)))
        )
        drawn = draw(view.numbers)
        return Reduction(tokens=keep_visual(view, self.keep, drawn, self.limit)), state
