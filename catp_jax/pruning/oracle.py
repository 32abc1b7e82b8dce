"""What knowing the answer would keep, and the reverse: the bounds between which methods lie.

Neither is a method: both are told which visual tokens the answer depends on, as only a task of
drawn scenes can. Where `Oracle` is not near the unpruned model and `Anti` not near chance, a study
measures something else than which tokens stay.
"""

from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from catp_jax.contract import View
from catp_jax.pruning.random import Random
from catp_jax.struct import pytree


@pytree
class Oracle(Random):
    """Keeps the needed tokens first, then others at random.

    `needed` says of every visual token there was before any pruning, by its number, how much of
    what is needed it shows, from 0 to 1. Raises ValueError if nobody says.
    """

    sign: ClassVar[float] = 1.0

    needed: Float[Array, "b all"] | None = None

    def score(self, view: View) -> Float[Array, "b n"]:
        if self.needed is None:
            raise ValueError(
                f"{type(self).__name__} must be told which visual tokens are needed; a study does, "
                "of a task that knows (scenes)"
            )
        numbers = jnp.clip(view.numbers, 0, self.needed.shape[1] - 1)
        needed = jnp.take_along_axis(self.needed, numbers, axis=1)
        drawn = super().score(view)
        return 1000 * self.sign * needed + drawn  # the draw decides among equals
