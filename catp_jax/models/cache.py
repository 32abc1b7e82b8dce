"""What a decoder keeps between two tokens.

Slots never shift: a token is written to a slot and stays there, its RoPE position beside it, so a
method may drop, gather or overwrite slots without touching the others.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep
from catp_jax.struct import pytree, replace, static


@pytree
class LayerCache:
    """Keys and values of one attention layer, keys as the attention uses them (normed, rotated)."""

    keys: Float[Array, "b slots kv d"]
    values: Float[Array, "b slots kv d"]

    def keep(self, keep: Keep) -> "LayerCache":
        """The slots of the kept tokens."""
        return LayerCache(keys=keep.apply(self.keys), values=keep.apply(self.values))

    def grow(self, slots: int) -> "LayerCache":
        """Adds empty slots at the end."""
        padding = ((0, 0), (0, slots), (0, 0), (0, 0))
        return LayerCache(keys=jnp.pad(self.keys, padding), values=jnp.pad(self.values, padding))

    def write(self, new: "LayerCache", slot: Int[Array, ""]) -> "LayerCache":
        """Overwrites the slots from `slot` on, the same ones in every sample."""
        return LayerCache(
            keys=jax.lax.dynamic_update_slice_in_dim(self.keys, new.keys, slot, axis=1),
            values=jax.lax.dynamic_update_slice_in_dim(self.values, new.values, slot, axis=1),
        )

    def reorder(self, parents: Int[Array, " b"], first: int) -> "LayerCache":
        """Row i gets what row `parents[i]` has in the slots from `first` on."""

        def moved(array: Array) -> Array:
            return array.at[:, first:].set(array[parents, first:])

        return LayerCache(keys=moved(self.keys), values=moved(self.values))


@pytree
class Slots:
    """Which token each slot holds, and whether it holds one at all."""

    positions: Int[Array, "b slots"]
    valid: Bool[Array, "b slots"]

    def keep(self, keep: Keep) -> "Slots":
        """The slots of the kept tokens."""
        return Slots(
            positions=keep.apply(self.positions), valid=keep.apply(self.valid) & keep.valid
        )

    def grow(self, slots: int) -> "Slots":
        """Adds empty slots at the end."""
        padding = ((0, 0), (0, slots))
        return Slots(positions=jnp.pad(self.positions, padding), valid=jnp.pad(self.valid, padding))

    def write(self, new: "Slots", slot: Int[Array, ""]) -> "Slots":
        """Overwrites the slots from `slot` on, the same ones in every sample."""
        return Slots(
            positions=jax.lax.dynamic_update_slice_in_dim(
                self.positions, new.positions, slot, axis=1
            ),
            valid=jax.lax.dynamic_update_slice_in_dim(self.valid, new.valid, slot, axis=1),
        )


@pytree
class Past:
    """A cache that new rows join, from `slot` on."""

    cache: LayerCache
    slot: Int[Array, ""]


def causal_mask(rows: Slots, columns: Slots) -> Bool[Array, "b s n"]:
    """Each row sees the valid columns at its own and earlier positions."""
    earlier = columns.positions[:, None, :] <= rows.positions[:, :, None]
    return earlier & columns.valid[:, None, :]


@pytree
class Segment:
    """Layers that hold the same tokens. The last `new_slots` slots are for new tokens, which take
    them in order, from `next_slot` on; rows of one beam search differ in nothing else.
    """

    new_slots: int = static()
    layers: tuple[LayerCache, ...]
    slots: Slots
    next_slot: Int[Array, ""]

    @classmethod
    def after_prompt(cls, layers: Sequence[LayerCache], slots: Slots, new_slots: int) -> "Segment":
        """A prompt's caches, with room for `new_slots` tokens."""
        return cls(
            new_slots=new_slots,
            layers=tuple(layer.grow(new_slots) for layer in layers),
            slots=slots.grow(new_slots),
            next_slot=jnp.asarray(slots.valid.shape[1], jnp.int32),
        )

    def reorder(self, parents: Int[Array, " b"]) -> "Segment":
        """Row i goes on from what row `parents[i]` wrote; both have the same prompt."""
        first = self.slots.valid.shape[1] - self.new_slots
        return replace(self, layers=tuple(layer.reorder(parents, first) for layer in self.layers))
