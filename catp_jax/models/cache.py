"""What a decoder keeps between two tokens, and how a new token reads it.

    prompt   one `Block` a layer, written once by the prefill and only read afterwards
    tail     one `Block` a layer, where new tokens go

The rows of one prompt (its beams, its samples) read the same prompt block and write to the same
tail; each row sees its own slots of the tail. Heads stand before slots, so that a step reads keys
and values in place: in any other order a GPU's compiler transposes all of them, in every layer of
every step.

Slots never shift: a token is written to a slot and stays there.
"""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep
from catp_jax.struct import pytree, replace

ALIGNED = 32
"""Matrix products on a GPU read a block in place if its slots are a multiple of this."""

Own = TypeVar("Own", bound="Cache")

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
        """So many slots for new tokens, for the prompts and heads of `like`."""
        batch, _, kv, channels = like.keys.shape
        nothing = jnp.zeros((batch, kv, slots, channels), like.keys.dtype)
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
    """A block that rows attend to: its slots that they see, and what is added to their logits.

    Both are of a prompt, the same for all its rows, or of each row.
    """

    block: Block
    seen: Bool[Array, "rows slots"]
    bias: Float[Array, "others h slots"] | None = None


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
        batch, kv, own, group, _ = part.shape
        highest = top.reshape(batch, own, kv, group).transpose(0, 2, 1, 3)
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
) -> Float[Array, "b kv own group slots"]:
    (rows, _, heads, channels), (batch, kv, slots, _) = queries.shape, read.block.keys.shape
    grouped = queries.reshape(batch, rows // batch, kv, heads // kv, channels)
    # the barrier keeps XLA from merging the products of two blocks, for which it transposes both
    grouped, keys = jax.lax.optimization_barrier((grouped, read.block.keys))
    logits = jnp.einsum("bmkgd,bknd->bkmgn", grouped, keys, preferred_element_type=jnp.float32)
    logits = logits * scale
    if read.bias is not None:
        bias = read.bias.astype(jnp.float32).reshape(batch, -1, kv, heads // kv, slots)
        logits = logits + bias.transpose(0, 2, 1, 3, 4)
    seen = read.seen.reshape(batch, 1, -1, 1, slots)
    # finite, so that a row that sees nothing is no NaN
    return jnp.where(seen, logits, -0.7 * jnp.finfo(jnp.float32).max)


@pytree
class Past:
    """What a new token finds in one layer: the prompt (None: there is none), and the tail that it
    joins at its prompt's `slot`, with the slots there that it sees, its own among them.
    """

    prompt: Read | None
    tail: Block
    slot: Int[Array, " b"]
    seen: Bool[Array, "r slots"]

    def attend(
        self,
        queries: Float[Array, "r one h d"],
        new: KeysValues,
        bias: Float[Array, "b h slots"] | None = None,
        scale: float | None = None,
    ) -> tuple[Float[Array, "r one h d"], Block]:
        """What the token attends to, itself included, and the tail with it. `bias` is that on the
        tail's logits.
        """
        tail = self.tail.write(new, self.slot)
        reads = [Read(block=tail, seen=self.seen, bias=bias)]
        if self.prompt is not None:
            reads.insert(0, self.prompt)
        return attend_blocks(queries, reads, scale), tail


@pytree
class Prompt:
    """Layers that hold the same tokens of the prompt: `valid` says which slots hold one."""

    blocks: tuple[Block, ...]
    valid: Bool[Array, "b slots"]

    @classmethod
    def of(cls, layers: Sequence[KeysValues], valid: Bool[Array, "b n"]) -> "Prompt":
        """A prompt's blocks."""
        return cls(blocks=tuple(Block.of(layer) for layer in layers), valid=padded(valid))

    def reads(self) -> list[Read]:
        """What a new token reads, by layer."""
        return [Read(block=block, seen=self.valid) for block in self.blocks]


@pytree
class Tail:
    """Where new tokens go, one block a layer. The rows of a prompt (its beams, its samples) share
    its blocks: each step takes a slot for every row.

    A step's logits are over the slots of all rows of a prompt, so many samples of long answers are
    better asked for in several calls.

    `positions` says where in its answer a slot's token stands; `seen` which slots a row sees, those
    that its own answer wrote. When a row goes on from another one, nothing moves but `seen`. The
    next token of a row stands at `next_position`; those of a prompt are written from its
    `next_slot` on.
    """

    blocks: tuple[Block, ...]
    positions: Int[Array, "b slots"]
    seen: Bool[Array, "r slots"]
    next_slot: Int[Array, " b"]
    next_position: Int[Array, " r"]

    @classmethod
    def empty(
        cls, layers: Sequence[KeysValues], next_position: Int[Array, " b"], new_tokens: int
    ) -> "Tail":
        """Room for so many tokens of one row a prompt."""
        batch, slots = next_position.shape[0], capacity(new_tokens)
        return cls(
            blocks=tuple(Block.empty(layer, slots) for layer in layers),
            positions=jnp.zeros((batch, slots), jnp.int32),
            seen=jnp.zeros((batch, slots), bool),
            next_slot=jnp.zeros(batch, jnp.int32),
            next_position=next_position,
        )

    def opened(self) -> "Tail":
        """The tail with a slot for every row's next token, which its layers are yet to write."""
        (batch, slots), rows = self.positions.shape, self.seen.shape[0]
        own = self.next_slot[:, None] + jnp.arange(rows // batch, dtype=jnp.int32)[None]
        is_own = own[:, :, None] == jnp.arange(slots, dtype=jnp.int32)[None, None]
        places = jnp.where(is_own, self.next_position.reshape(batch, -1, 1), 0)
        return replace(
            self,
            positions=jnp.where(is_own.any(axis=1), places.sum(axis=1), self.positions),
            seen=self.seen | is_own.reshape(rows, slots),
        )

    def pasts(self, prompts: Sequence[Read | None]) -> list[Past]:
        """What each row's token finds in an opened tail, by layer."""
        return [
            Past(prompt=prompt, tail=block, slot=self.next_slot, seen=self.seen)
            for prompt, block in zip(prompts, self.blocks, strict=True)
        ]

    def closed(self, blocks: Sequence[Block]) -> "Tail":
        """An opened tail once every layer has written to its block."""
        return replace(
            self,
            blocks=tuple(blocks),
            next_slot=self.next_slot + self.seen.shape[0] // self.positions.shape[0],
            next_position=self.next_position + 1,
        )

    def spread(self, rows: int) -> "Tail":
        """So many rows a prompt where there was one, with as many tokens of room for each."""
        slots = self.seen.shape[1]
        more = capacity(slots * rows) - slots

        def longer(array: Array, axis: int) -> Array:
            sizes = [(0, more if number == axis else 0) for number in range(array.ndim)]
            return jnp.pad(array, sizes)

        return Tail(
            blocks=jax.tree.map(partial(longer, axis=2), self.blocks),
            positions=longer(self.positions, 1),
            seen=jnp.repeat(longer(self.seen, 1), rows, axis=0),
            next_slot=self.next_slot,
            next_position=jnp.repeat(self.next_position, rows),
        )

    def reorder(self, parents: Int[Array, " r"]) -> "Tail":
        """Row i goes on from what row `parents[i]` wrote; both have the same prompt."""
        return replace(self, seen=self.seen[parents])


@pytree
class Cache:
    """What a decoder keeps between two tokens; a model's own adds its prompt's blocks, which are
    held once, however many rows a prompt has.
    """

    tail: Tail

    def spread(self: Own, rows: int) -> Own:
        """So many rows a prompt."""
        return replace(self, tail=self.tail.spread(rows))

    def reorder(self: Own, parents: Int[Array, " r"]) -> Own:
        """Row i goes on from what row `parents[i]` wrote; both have the same prompt."""
        return replace(self, tail=self.tail.reorder(parents))
