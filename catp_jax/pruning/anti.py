"""The reverse of the oracle: what is needed goes first."""

from typing import ClassVar

from catp_jax.pruning.oracle import Oracle
from catp_jax.struct import pytree


@pytree
class Anti(Oracle):
    """Keeps the needed tokens last: a bound that is near chance, if tokens matter at all."""

    sign: ClassVar[float] = -1.0
