"""Random selection: the baseline that every method has to beat."""

from typing import ClassVar

import jax
from jaxtyping import Array, Int, UInt32

from catp_jax.contract import Pruner, Reduction, Site, View
from catp_jax.pruning.scores import keep_best
from catp_jax.struct import pytree, static


@pytree
class Random(Pruner[tuple[()]]):
    """Keeps `keep` visual tokens at random.

    The draw depends on `seed` and on a token's place alone, so a sample keeps the same tokens
    whatever else is in its batch, and a smaller budget keeps a part of what a larger one keeps.
    """

    site: ClassVar[Site] = Site.CROSS

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
        draw = jax.vmap(jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(key, place))))
        drawn = draw(view.positions)
        return Reduction(tokens=keep_best(self.keep, view.valid, drawn, limit=self.limit)), state
