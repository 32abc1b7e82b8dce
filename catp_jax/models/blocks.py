"""A layer's keys and values, as projections make them and as decoding reads them.

Heads stand before slots, so that a step reads keys and values in place: in any other order a GPU's
compiler transposes all of them, in every layer of every step.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Basis, Channels, Keep
from catp_jax.struct import pytree, replace

ALIGNED = 32
"""Matrix products on a GPU read a block in place if its slots are a multiple of this."""

LONG = 128
"""A shorter block is as long as its tokens: copying it costs less than padding it."""


LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The logit of what a row does not see: finite, so that a row that sees nothing is no NaN."""


def capacity(slots: int) -> int:
    """How many slots a block has for so many tokens."""
    return slots if slots < LONG else -(-slots // ALIGNED) * ALIGNED


@pytree
class KeysValues:
    """One attention layer's keys and values as its projections make them, keys as the attention
    uses them (normed, rotated).
    """

    keys: Float[Array, "b n kv d"]
    values: Float[Array, "b n kv d"]

    def keep(self, keep: Keep) -> "KeysValues":
        """Those of the kept tokens."""
        return KeysValues(keys=keep.apply(self.keys), values=keep.apply(self.values))


@pytree
class Block:
    """One attention layer's keys and values as decoding reads them: all channels, or what `keys_in`
    and `values_in` leave of them.
    """

    keys: Float[Array, "b kv slots c"]
    values: Float[Array, "b kv slots d"]
    keys_in: Channels | Basis | None = None
    values_in: Basis | None = None

    @classmethod
    def of(
        cls,
        made: KeysValues,
        keys_in: Channels | Basis | None = None,
        values_in: Basis | None = None,
    ) -> "Block":
        """A prompt's block; slots beyond its tokens are zero."""

        def stored(array: Array) -> Array:
            size = array.shape[1]
            array = jnp.pad(array, ((0, 0), (0, capacity(size) - size), (0, 0), (0, 0)))
            return jnp.swapaxes(array, 1, 2)

        keys, values = stored(made.keys), stored(made.values)
        if isinstance(keys_in, Basis):
            keys_in = replace(keys_in, matrix=keys_in.matrix.astype(keys.dtype))
        if values_in is not None:
            values_in = replace(values_in, matrix=values_in.matrix.astype(values.dtype))
        return cls(
            keys=keys if keys_in is None else keys_in.apply(keys),
            values=values if values_in is None else values_in.apply(values),
            keys_in=keys_in,
            values_in=values_in,
        )

    @classmethod
    def empty(cls, like: "Block", slots: int) -> "Block":
        """So many slots for new tokens, for the prompts and heads of `like`."""
        batch, kv, _, channels = like.values.shape
        if like.values_in is not None:
            channels = like.values_in.matrix.shape[1]
        nothing = jnp.zeros((batch, kv, slots, channels), like.values.dtype)
        return cls(keys=nothing, values=nothing)

    def write(self, new: KeysValues, slot: Int[Array, " b"]) -> "Block":
        """One token of each row is put into a slot of its own, those of a prompt's rows side by
        side from the prompt's `slot` on.
        """

        def put(array: Array, some: Array) -> Array:
            rows = jnp.swapaxes(some.reshape(array.shape[0], -1, *some.shape[2:]), 1, 2)
            write = partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            return jax.vmap(write)(array, rows, slot)

        return Block(keys=put(self.keys, new.keys), values=put(self.values, new.values))

    def keep(self, keep: Keep) -> "Block":
        """The kept slots."""
        indices = keep.indices if keep.is_by_head else keep.indices[:, None]

        def take(array: Array) -> Array:
            return jnp.take_along_axis(array, indices[..., None], axis=2)

        return replace(self, keys=take(self.keys), values=take(self.values))


@pytree
class Read:
    """A block that rows attend to: its slots that they see, and what is added to their logits.

    Both are of a prompt, the same for all its rows, or of each row; `seen` may differ from head to
    head.
    """

    block: Block
    seen: Bool[Array, "rows slots"] | Bool[Array, "b kv slots"]
    bias: Float[Array, "others h slots"] | None = None
