"""What a decoder keeps between two tokens, and how a new token reads it.

    prompt   one `Block` a layer, written once by the prefill and only read afterwards
    tail     one `Block` a layer, where new tokens go

The rows of one prompt (its beams, its samples) read the same prompt block and write to the same
tail; each row sees its own slots of the tail.

Slots never shift: a token is written to a slot and stays there, until another one takes its place
where more come than there is room for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Attention, Basis, Channels, Keep, Room, Select, Site, View
from catp_jax.models.attention import attend_blocks, scaled
from catp_jax.models.blocks import Block, KeysValues, Read, capacity
from catp_jax.struct import pytree, replace, static

Own = TypeVar("Own", bound="Cache")


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


@pytree
class Prompt:
    """Layers that hold the same tokens of the prompt, by their numbers in the decoder.

    `numbers` says which visual token a slot holds, -1 for text, and `valid` which slots new tokens
    may read; the first `num_visual` are of visual tokens. With heads that keep tokens of their own
    there is one layer.
    """

    layers: tuple[int, ...] = static()
    num_visual: int = static()
    blocks: tuple[Block, ...]
    numbers: Int[Array, "b slots"] | Int[Array, "b kv slots"]
    valid: Bool[Array, "b slots"] | Bool[Array, "b kv slots"]

    @classmethod
    def of(
        cls,
        layers: Mapping[int, KeysValues],
        numbers: Int[Array, "b *n"],
        valid: Bool[Array, "b *n"],
        num_visual: int,
        keys_in: Channels | Basis | None = None,
        values_in: Basis | None = None,
    ) -> "Prompt":
        """A prompt's blocks; slots beyond its tokens are empty."""
        missing = capacity(valid.shape[-1]) - valid.shape[-1]
        padding = [(0, 0)] * (valid.ndim - 1) + [(0, missing)]
        return cls(
            layers=tuple(layers),
            num_visual=num_visual,
            blocks=tuple(Block.of(made, keys_in, values_in) for made in layers.values()),
            numbers=jnp.pad(numbers, padding, constant_values=-1),
            valid=jnp.pad(valid, padding),
        )


@dataclasses.dataclass(frozen=True)
class PromptLayer:
    """One layer of a prompt, and who chooses what a step reads of it.

    `recent` are the last tokens, apart from the others where those have fewer key channels.
    """

    prompt: Prompt
    layer: int
    block: Block
    select: Select
    recent: tuple[Prompt, Block] | None = None

    def view(
        self,
        queries: Float[Array, "b s h d"],
        sees: Bool[Array, "b s slots"] | Bool[Array, "b kv s slots"],
    ) -> View:
        """What rows of each prompt may read; what is without all its channels is not shown."""
        attention, values = None, None
        if self.block.keys_in is None:
            keys = jnp.swapaxes(self.block.keys, 1, 2)
            attention = Attention(queries=scaled(queries), keys=keys)
        if self.block.values_in is None:
            values = jnp.swapaxes(self.block.values, 1, 2)
        return View(
            site=Site.READ,
            layer=self.layer,
            num_visual=self.prompt.num_visual,
            attention=attention,
            values=values,
            numbers=self.prompt.numbers,
            valid=self.prompt.valid,
            sees=sees,
        )

    def reads(self, queries: Float[Array, "r one h d"]) -> list[Read]:
        """What new tokens with these queries read: a prompt's rows have it in common."""
        valid = self.prompt.valid
        by_prompt = queries.reshape(valid.shape[0], -1, *queries.shape[2:])
        sees = jnp.repeat(valid[..., None, :], by_prompt.shape[1], axis=-2)
        keep = self.select(self.view(by_prompt, sees)).tokens
        read = Read(block=self.block, seen=valid)
        if keep is not None:
            read = Read(block=self.block.keep(keep), seen=keep.apply(valid) & keep.valid)
        if self.recent is None:
            return [read]
        prompt, block = self.recent
        return [read, Read(block=block, seen=prompt.valid)]


def by_layer(prompts: Sequence[Prompt], select: Select) -> list[PromptLayer]:
    """What new tokens may read, by layer."""
    found: dict[int, PromptLayer] = {}
    for prompt in prompts:
        for layer, block in zip(prompt.layers, prompt.blocks, strict=True):
            if layer in found:
                found[layer] = dataclasses.replace(found[layer], recent=(prompt, block))
            else:
                found[layer] = PromptLayer(prompt, layer, block, select)
    return [*found.values()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Past:
    """What a new token finds in one layer: the prompt (None: there is none), and the tail that it
    joins at its prompt's `slot`, with the slots there that it sees, its own among them.
    """

    prompt: PromptLayer | None
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
            reads = [*self.prompt.reads(queries), *reads]
        return attend_blocks(queries, reads, scale), tail


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

    A row has `held` tokens at most. One more than that takes the slots of token number `point`, the
    next one those of the token after it, round and round: the oldest of those that do not stay is
    the same for all rows of a prompt. Positions go on counting.
    """

    held: int = static()
    point: int = static()
    blocks: tuple[Block, ...]
    positions: Int[Array, "b slots"]
    seen: Bool[Array, "r slots"]
    next_slot: Int[Array, " b"]
    next_position: Int[Array, " r"]

    @classmethod
    def empty(
        cls, prompts: Sequence[Prompt], next_position: Int[Array, " b"], room: Room
    ) -> "Tail":
        """Room for new tokens of one row a prompt, in the layers of these."""
        batch, slots = next_position.shape[0], capacity(room.held)
        like = {
            layer: block
            for prompt in prompts
            for layer, block in zip(prompt.layers, prompt.blocks, strict=True)
        }
        return cls(
            held=room.held,
            point=max(min(room.point, room.held - 1), 0),  # also if there is less room
            blocks=tuple(Block.empty(block, slots) for block in like.values()),
            positions=jnp.zeros((batch, slots), jnp.int32),
            seen=jnp.zeros((batch, slots), bool),
            next_slot=jnp.zeros(batch, jnp.int32),
            next_position=next_position,
        )

    def opened(self) -> "Tail":
        """The tail with a slot for every row's next token, which its layers are yet to write; what
        stood there is seen no more.
        """
        (batch, slots), rows = self.positions.shape, self.seen.shape[0]
        each = rows // batch
        is_full = self.next_slot == self.held * each
        next_slot = jnp.where(is_full, self.point * each, self.next_slot)
        new = next_slot[:, None] + jnp.arange(each, dtype=jnp.int32)[None]
        is_new = new[:, :, None] == jnp.arange(slots, dtype=jnp.int32)[None, None]
        is_taken = is_new.any(axis=1)
        places = jnp.where(is_new, self.next_position.reshape(batch, -1, 1), 0)
        seen = (self.seen.reshape(batch, each, slots) & ~is_taken[:, None]) | is_new
        return replace(
            self,
            positions=jnp.where(is_taken, places.sum(axis=1), self.positions),
            seen=seen.reshape(rows, slots),
            next_slot=next_slot,
        )

    def pasts(self, prompts: Sequence[PromptLayer | None]) -> list[Past]:
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

    def where(self, is_new: Bool[Array, " b"], before: "Tail") -> "Tail":
        """After a step of one row a prompt that counts only where `is_new`: the other rows' token
        is seen by none, and the next one takes its slot.
        """
        kept = {}
        for name in ("positions", "seen", "next_slot", "next_position"):
            new, old = getattr(self, name), getattr(before, name)
            kept[name] = jnp.where(is_new.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
        return replace(self, **kept)

    def spread(self, rows: int) -> "Tail":
        """So many rows a prompt where there was one, with as many tokens of room for each. A token
        has as many slots: of one that was there already, the first.
        """
        slots = self.seen.shape[1]
        more = capacity(self.held * rows) - max((slots - 1) * rows + 1, 0)

        def apart(array: Array, axis: int) -> Array:
            sizes = [(0, 0, 0)] * array.ndim
            sizes[axis] = (0, more, rows - 1)
            return jax.lax.pad(array, jnp.zeros((), array.dtype), sizes)

        return replace(
            self,
            blocks=jax.tree.map(partial(apart, axis=2), self.blocks),
            positions=apart(self.positions, 1),
            seen=jnp.repeat(apart(self.seen, 1), rows, axis=0),
            next_slot=self.next_slot * rows,
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
