"""What a decoder keeps between two tokens.

Slots never shift: a token is written to a slot and stays there, its RoPE position beside it, so a
method may drop, gather or overwrite slots without touching the others.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep
from catp_jax.struct import pytree


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
class Cache:
    """The whole decoder's cache.

    `layers` has one entry per decoder layer, None for a cross-attention layer if no sample of the
    batch has an image. `text` describes the slots of self-attention, `visual` those of
    cross-attention (there a position is the number of the visual token before any pruning).
    `seen` marks the visual slots that generated tokens attend to.
    """

    layers: tuple[LayerCache | None, ...]
    text: Slots
    visual: Slots | None
    seen: Bool[Array, "b n"] | None
    next_position: Int[Array, " b"]
    next_slot: Int[Array, ""]
