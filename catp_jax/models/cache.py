"""What a decoder keeps between two tokens, and how a new token reads it.

    prompt   one `Block` a layer, written once by the prefill and only read afterwards
    tail     one `Block` a layer, where new tokens go

Each row of the decode loop has a tail of its own; the rows of one prompt (its beams) read the same
prompt block, which is held once. Heads stand before slots, so that a step reads keys and values in
place: in any other order a GPU's compiler transposes all of them, in every layer of every step.

Slots never shift: a token is written to a slot and stays there.
"""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep
from catp_jax.struct import pytree, replace

ALIGNED = 8
"""Matrix products on a GPU read a block in place if its slots are a multiple of this."""

Tree = TypeVar("Tree")

LONG = 128
"""A shorter block is as long as its tokens: copying it costs less than padding it."""


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
    """One attention layer's keys and values as decoding reads them."""

    keys: Float[Array, "b kv slots d"]
    values: Float[Array, "b kv slots d"]

    @classmethod
    def of(cls, made: KeysValues) -> "Block":
        """A prompt's block; slots beyond its tokens are zero."""

        def stored(array: Array) -> Array:
            size = array.shape[1]
            array = jnp.pad(array, ((0, 0), (0, capacity(size) - size), (0, 0), (0, 0)))
            return jnp.swapaxes(array, 1, 2)

        return cls(keys=stored(made.keys), values=stored(made.values))

    @classmethod
    def empty(cls, like: KeysValues, slots: int) -> "Block":
        """Room for `slots` new tokens, for the rows and heads of `like`."""
        batch, _, kv, channels = like.keys.shape
        nothing = jnp.zeros((batch, kv, capacity(slots), channels), like.keys.dtype)
        return cls(keys=nothing, values=nothing)

    def write(self, new: KeysValues, slot: Int[Array, ""]) -> "Block":
        """Overwrites the slots from `slot` on, the same ones in every row."""

        def written(array: Array, some: Array) -> Array:
            some = jnp.swapaxes(some, 1, 2)
            return jax.lax.dynamic_update_slice_in_dim(array, some, slot, axis=2)

        return Block(keys=written(self.keys, new.keys), values=written(self.values, new.values))


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


def causal_mask(rows: Slots, columns: Slots) -> Bool[Array, "b s n"]:
    """Each row sees the valid columns at its own and earlier positions."""
    earlier = columns.positions[:, None, :] <= rows.positions[:, :, None]
    return earlier & columns.valid[:, None, :]


def padded(valid: Bool[Array, "b n"]) -> Bool[Array, "b slots"]:
    """Which slots of a prompt's block hold a token."""
    return jnp.pad(valid, ((0, 0), (0, capacity(valid.shape[1]) - valid.shape[1])))


@pytree
class Read:
    """A block that rows attend to: its slots that they see, and what is added to their logits."""

    block: Block
    seen: Bool[Array, "#b slots"]
    bias: Float[Array, "h slots"] | None = None


def attend_blocks(
    queries: Float[Array, "r one h d"], reads: Sequence[Read], scale: float | None = None
) -> Float[Array, "r one h d"]:
    """One new token a row attends to several blocks: logits by block, one softmax, in float32.

    `r` is a multiple of a block's `b`: so many rows in succession read the same entry. `scale`
    multiplies the logits (None: 1/√d). A row that sees nothing gets a mean of the values: its
    caller drops it.
    """
    rows, _, heads, channels = queries.shape
    factor = channels**-0.5 if scale is None else scale
    logits = [_logits(queries, read, factor) for read in reads]
    largest = [part.max(axis=-1).transpose(0, 2, 1, 3).reshape(rows, heads) for part in logits]
    top = jnp.stack(largest).max(axis=0)

    total = jnp.zeros((rows, heads), jnp.float32)
    out = jnp.zeros((rows, heads, channels), jnp.float32)
    for part, read in zip(logits, reads, strict=True):
        batch, kv, beams, group, _ = part.shape
        highest = top.reshape(batch, beams, kv, group).transpose(0, 2, 1, 3)
        weights = jnp.exp(part - highest[..., None])
        total += weights.sum(axis=-1).transpose(0, 2, 1, 3).reshape(rows, heads)
        values = read.block.values
        summed = jnp.einsum(
            "bkmgn,bknd->bkmgd",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        out += summed.transpose(0, 2, 1, 3, 4).reshape(rows, heads, channels)
    return (out / total[..., None]).astype(reads[0].block.values.dtype)[:, None]


def _logits(
    queries: Float[Array, "r one h d"], read: Read, scale: float
) -> Float[Array, "b kv beams group slots"]:
    (rows, _, heads, channels), (batch, kv, slots, _) = queries.shape, read.block.keys.shape
    grouped = queries.reshape(batch, rows // batch, kv, heads // kv, channels)
    logits = jnp.einsum(
        "bmkgd,bknd->bkmgn", grouped, read.block.keys, preferred_element_type=jnp.float32
    )
    logits = logits * scale
    if read.bias is not None:
        bias = read.bias.astype(jnp.float32).reshape(kv, heads // kv, slots)
        logits = logits + bias[None, :, None]
    # finite, so that a row that sees nothing is no NaN
    return jnp.where(read.seen[:, None, None, None], logits, -0.7 * jnp.finfo(jnp.float32).max)


@pytree
class Past:
    """What a new token finds in one layer: the prompt (None: there is none) and the tail that it
    joins, at `slot`.
    """

    prompt: Read | None
    tail: Block
    slot: Int[Array, ""]

    def attend(
        self,
        queries: Float[Array, "r one h d"],
        new: KeysValues,
        bias: Float[Array, "h slots"] | None = None,
        scale: float | None = None,
    ) -> tuple[Float[Array, "r one h d"], Block]:
        """What the token attends to, itself included, and the tail with it. `bias` is that on the
        tail's logits.
        """
        tail = self.tail.write(new, self.slot)
        seen = jnp.arange(tail.keys.shape[2], dtype=jnp.int32) <= self.slot
        reads = [Read(block=tail, seen=seen[None], bias=bias)]
        if self.prompt is not None:
            reads.insert(0, self.prompt)
        return attend_blocks(queries, reads, scale), tail


@pytree
class Segment:
    """Layers that hold the same tokens: `valid` says which slots of the prompt's blocks hold one.

    New tokens take the tails' slots in order, from `next_slot` on, the same one in every row.
    """

    prompt: tuple[Block, ...]
    valid: Bool[Array, "b slots"]
    tail: tuple[Block, ...]
    next_slot: Int[Array, ""]

    @classmethod
    def after_prompt(
        cls, layers: Sequence[KeysValues], valid: Bool[Array, "b n"], new_slots: int
    ) -> "Segment":
        """A prompt's blocks, with room for `new_slots` tokens."""
        return cls(
            prompt=tuple(Block.of(layer) for layer in layers),
            valid=padded(valid),
            tail=tuple(Block.empty(layer, new_slots) for layer in layers),
            next_slot=jnp.asarray(0, jnp.int32),
        )

    def pasts(self) -> list[Past]:
        """What a new token finds, by layer."""
        return [
            Past(prompt=Read(block=prompt, seen=self.valid), tail=tail, slot=self.next_slot)
            for prompt, tail in zip(self.prompt, self.tail, strict=True)
        ]

    def grown(self, tail: Sequence[Block]) -> "Segment":
        """The segment after a token was written to every layer's tail."""
        return replace(self, tail=tuple(tail), next_slot=self.next_slot + 1)

    def spread(self, rows: int) -> "Segment":
        """So many rows a prompt, each with a tail of its own; all read the prompt's blocks."""
        return replace(self, tail=spread(self.tail, rows))

    def reorder(self, parents: Int[Array, " r"]) -> "Segment":
        """Row i goes on from what row `parents[i]` wrote; both have the same prompt."""
        return replace(self, tail=jax.tree.map(lambda array: array[parents], self.tail))


def spread(tree: Tree, rows: int) -> Tree:
    """Arrays with each entry of the first axis repeated so often in succession."""
    return jax.tree.map(lambda array: jnp.repeat(array, rows, axis=0), tree)
