"""What a decoder keeps between two tokens, and how a new token reads it.

    prompt   one `Block` a layer, written once by the prefill and only read afterwards
    tail     one `Block` a layer, where new tokens go

The rows of one prompt (its beams, its samples) read the same prompt block and write to the same
tail; each row sees its own slots of the tail.

Slots never shift: a token is written to a slot and stays there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Attention, Basis, Channels, Keep, Select, Site, View
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
    """

    blocks: tuple[Block, ...]
    positions: Int[Array, "b slots"]
    seen: Bool[Array, "r slots"]
    next_slot: Int[Array, " b"]
    next_position: Int[Array, " r"]

    @classmethod
    def empty(
        cls, prompts: Sequence[Prompt], next_position: Int[Array, " b"], new_tokens: int
    ) -> "Tail":
        """Room for so many tokens of one row a prompt, in the layers of these."""
        batch, slots = next_position.shape[0], capacity(new_tokens)
        like = {
            layer: block
            for prompt in prompts
            for layer, block in zip(prompt.layers, prompt.blocks, strict=True)
        }
        return cls(
            blocks=tuple(Block.empty(block, slots) for block in like.values()),
            positions=jnp.zeros((batch, slots), jnp.int32),
            seen=jnp.zeros((batch, slots), bool),
            next_slot=jnp.zeros(batch, jnp.int32),
            next_position=next_position,
        )

    def opened(self) -> "Tail":
        """The tail with a slot for every row's next token, which its layers are yet to write."""
        (batch, slots), rows = self.positions.shape, self.seen.shape[0]
        new = self.next_slot[:, None] + jnp.arange(rows // batch, dtype=jnp.int32)[None]
        is_new = new[:, :, None] == jnp.arange(slots, dtype=jnp.int32)[None, None]
        places = jnp.where(is_new, self.next_position.reshape(batch, -1, 1), 0)
        return replace(
            self,
            positions=jnp.where(is_new.any(axis=1), places.sum(axis=1), self.positions),
            seen=self.seen | is_new.reshape(rows, slots),
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
