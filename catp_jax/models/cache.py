"""What a decoder keeps between two tokens, and how a new token reads it.

    prompt   one `Block` a layer, written once by the prefill and only read afterwards
    tail     one `Block` a layer, where new tokens go

The rows of one prompt (its beams, its samples) read the same prompt block and write to the same
tail; each row sees its own slots of the tail. Heads stand before slots, so that a step reads keys
and values in place: in any other order a GPU's compiler transposes all of them, in every layer of
every step.

Slots never shift: a token is written to a slot and stays there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Attention, Keep, Select, Site, View
from catp_jax.models import one_row
from catp_jax.models.attention import scaled
from catp_jax.struct import pytree, replace, static

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
    def empty(cls, like: "Block", slots: int) -> "Block":
        """So many slots for new tokens, for the prompts and heads of `like`."""
        batch, kv, _, channels = like.keys.shape
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

    def keep(self, keep: Keep) -> "Block":
        """The kept slots."""
        indices = keep.indices if keep.is_by_head else keep.indices[:, None]

        def take(array: Array) -> Array:
            return jnp.take_along_axis(array, indices[..., None], axis=2)

        return Block(keys=take(self.keys), values=take(self.values))


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
class Read:
    """A block that rows attend to: its slots that they see, and what is added to their logits.

    Both are of a prompt, the same for all its rows, or of each row; `seen` may differ from head to
    head.
    """

    block: Block
    seen: Bool[Array, "rows slots"] | Bool[Array, "b kv slots"]
    bias: Float[Array, "others h slots"] | None = None

    @property
    def inputs(self) -> one_row.Inputs:
        """The same as a kernel takes it."""
        return self.block.keys, self.block.values, self.seen, self.bias


def attend_blocks(
    queries: Float[Array, "r one h d"], reads: Sequence[Read], scale: float | None = None
) -> Float[Array, "r one h d"]:
    """One new token a row attends to several blocks: logits by block, one softmax, in float32.

    `r` is a multiple of a block's `b`: so many rows in succession read the same entry. `scale`
    multiplies the logits (None: 1/√d). A row that sees nothing gets a mean of the values: its
    caller drops it.
    """
    factor = queries.shape[-1] ** -0.5 if scale is None else scale
    by_products = partial(_by_products, factor=factor)
    if one_row.refuses(queries, [read.inputs for read in reads]) is not None:
        return by_products(queries, reads)

    def in_one_kernel(queries: Array, reads: Sequence[Read]) -> Array:
        return one_row.attend(queries, [read.inputs for read in reads], factor)

    return jax.lax.platform_dependent(queries, list(reads), cuda=in_one_kernel, default=by_products)


def _by_products(
    queries: Float[Array, "r one h d"], reads: Sequence[Read], factor: float
) -> Float[Array, "r one h d"]:
    rows, _, heads, channels = queries.shape
    logits = [_logits(queries, read, factor) for read in reads]
    if len(reads) == 1:  # a softmax that a GPU has in one kernel, which reads the logits once
        out = _summed(jax.nn.softmax(logits[0], axis=-1), reads[0].block.values)
        return out.astype(reads[0].block.values.dtype)[:, None]
    largest = [part.max(axis=-1).transpose(0, 2, 1, 3).reshape(rows, heads) for part in logits]
    top = jnp.stack(largest).max(axis=0)

    total = jnp.zeros((rows, heads), jnp.float32)
    out = jnp.zeros((rows, heads, channels), jnp.float32)
    for part, read in zip(logits, reads, strict=True):
        batch, kv, own, group, _ = part.shape
        highest = top.reshape(batch, own, kv, group).transpose(0, 2, 1, 3)
        weights = jnp.exp(part - highest[..., None])
        total += weights.sum(axis=-1).transpose(0, 2, 1, 3).reshape(rows, heads)
        out += _summed(weights, read.block.values)
    return (out / total[..., None]).astype(reads[0].block.values.dtype)[:, None]


def _summed(
    weights: Float[Array, "b kv own group slots"], values: Float[Array, "b kv slots d"]
) -> Float[Array, "r h d"]:
    """What rows take of a block's values, in float32."""
    batch, kv, own, group, _ = weights.shape
    summed = jnp.einsum(
        "bkmgn,bknd->bkmgd",
        weights.astype(values.dtype),
        values,
        preferred_element_type=jnp.float32,
    )
    return summed.transpose(0, 2, 1, 3, 4).reshape(batch * own, kv * group, -1)


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
    by_head = read.seen.ndim == 3
    seen = read.seen.reshape((batch, kv, 1, 1, slots) if by_head else (batch, 1, -1, 1, slots))
    # finite, so that a row that sees nothing is no NaN
    return jnp.where(seen, logits, -0.7 * jnp.finfo(jnp.float32).max)


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
    ) -> "Prompt":
        """A prompt's blocks; slots beyond its tokens are empty."""
        missing = capacity(valid.shape[-1]) - valid.shape[-1]
        padding = [(0, 0)] * (valid.ndim - 1) + [(0, missing)]
        return cls(
            layers=tuple(layers),
            num_visual=num_visual,
            blocks=tuple(Block.of(layer) for layer in layers.values()),
            numbers=jnp.pad(numbers, padding, constant_values=-1),
            valid=jnp.pad(valid, padding),
        )


@dataclasses.dataclass(frozen=True)
class PromptLayer:
    """One layer of a prompt, and who chooses what a step reads of it."""

    prompt: Prompt
    layer: int
    block: Block
    select: Select

    def read(self, queries: Float[Array, "r one h d"]) -> Read:
        """What rows with these queries read: the answers of a prompt have it in common."""
        prompt, block = self.prompt, self.block
        valid, rows = prompt.valid, queries.shape[0] // prompt.valid.shape[0]
        keep = self.select(
            View(
                site=Site.READ,
                layer=self.layer,
                num_visual=prompt.num_visual,
                tokens=None,
                attention=Attention(
                    queries=scaled(queries).reshape(-1, rows, *queries.shape[2:]),
                    keys=jnp.swapaxes(block.keys, 1, 2),
                ),
                values=jnp.swapaxes(block.values, 1, 2),
                evidence=None,
                numbers=prompt.numbers,
                valid=valid,
                sees=jnp.repeat(valid[..., None, :], rows, axis=-2),
            )
        )
        if keep is None:
            return Read(block=block, seen=valid)
        return Read(block=block.keep(keep), seen=keep.apply(valid) & keep.valid)


def by_layer(prompts: Sequence[Prompt], select: Select) -> list[PromptLayer]:
    """What new tokens may read, by layer."""
    return [
        PromptLayer(prompt, layer, block, select)
        for prompt in prompts
        for layer, block in zip(prompt.layers, prompt.blocks, strict=True)
    ]


@pytree
class Shown:
    """One layer of the prompt as it was computed: what a method may look at before it is cached."""

    queries: Float[Array, "b s h d"]
    made: KeysValues

    @property
    def attention(self) -> Attention:
        """The layer's attention, for views."""
        return Attention(queries=scaled(self.queries), keys=self.made.keys)


def cached(
    layers: Mapping[int, Shown],
    select: Select,
    *,
    num_visual: int,
    numbers: Int[Array, "b n"],
    sees: Bool[Array, "b s n"],
    read: Bool[Array, "b n"],
) -> tuple[Prompt, ...]:
    """The cache of layers over the same tokens, each as `select` prunes it. New tokens may read
    `read`; `sees` is what the prompt's rows saw.
    """
    prompts: list[Prompt] = []
    whole: dict[int, KeysValues] = {}

    def put_away() -> None:
        if whole:
            prompts.append(Prompt.of(whole, numbers, read, num_visual))
            whole.clear()

    for number, shown in layers.items():
        made = shown.made
        keep = select(
            View(
                site=Site.CACHE,
                layer=number,
                num_visual=num_visual,
                tokens=None,
                attention=shown.attention,
                values=made.values,
                evidence=None,
                numbers=numbers,
                valid=read,
                sees=sees,
            )
        )
        if keep is None:
            whole[number] = made
            continue
        put_away()
        left = num_visual - (read.shape[1] - keep.indices.shape[-1])
        kept = jnp.where(keep.valid, keep.apply(numbers), -1), keep.apply(read) & keep.valid
        prompts.append(Prompt.of({number: made.keep(keep)}, *kept, left))
    put_away()
    return tuple(prompts)


@pytree
class Past:
    """What a new token finds in one layer: the prompt (None: there is none), and the tail that it
    joins at its prompt's `slot`, with the slots there that it sees, its own among them.
    """

    prompt: PromptLayer | None = static()
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
            reads.insert(0, self.prompt.read(queries))
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
        return cls(
            blocks=tuple(Block.empty(like, slots) for prompt in prompts for like in prompt.blocks),
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
