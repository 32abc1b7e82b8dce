"""What decoder-only language models share: a prefill that can be pruned between two layers.

visual tokens and text → layer 0 ─ LAYER ─ layer 1 ─ LAYER ─ … → norm → head
                                   └ views: the layer before shows its queries and keys
"""

import abc
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep, Reduction, Room, Select, Site, View
from catp_jax.models.cache import (
    Cache,
    Past,
    Prompt,
    Slots,
    Tail,
    by_layer,
    causal_mask,
)
from catp_jax.models.caching import Among, Shown, Stretch
from catp_jax.struct import pytree, replace


@pytree
class DecoderCache(Cache):
    """The prompt's layers in order."""

    prompts: tuple[Prompt, ...]


@runtime_checkable
class Layer(Protocol):
    """A layer that knows the positions of its rows: their output, their queries, and their keys
    and values, or the tail of the past that they join. `among` is asked once about a prompt's.
    """

    def __call__(
        self,
        x: Float[Array, "b s d"],
        *,
        mask: Bool[Array, "b s n"] | None,
        past: Past | None = None,
        among: Among | None = None,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b s h dk"], Any]: ...


class Decoder(nnx.Module):
    """A language model that reads embedded visual tokens, then text, and writes more text."""

    sites = frozenset({Site.LAYER, Site.CACHE, Site.READ})

    @abc.abstractmethod
    def embed(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Word embeddings, without positions."""

    @abc.abstractmethod
    def placed(
        self, x: Float[Array, "b s d"], positions: Int[Array, "b s"]
    ) -> Float[Array, "b s d"]:
        """Embeddings as the first layer takes them."""

    @abc.abstractmethod
    def layers_at(self, positions: Int[Array, "b s"]) -> Sequence[Layer]:
        """All layers, for rows at these positions."""

    @abc.abstractmethod
    def logits(self, x: Float[Array, "b s d"]) -> Float[Array, "b s vocab"]:
        """Scores of the next token from the last layer's output."""

    def prefill(
        self,
        x: Float[Array, "b n d"],
        slots: Slots,
        numbers: Int[Array, "b n"],
        num_visual: int,
        select: Select,
        room: Room,
    ) -> tuple[Float[Array, "b vocab"], DecoderCache]:
        """Logits of each prompt's next token, and a cache with `room` for new tokens.

        `x` has embedded visual tokens, then text; `numbers` says which visual token an entry is,
        -1 for text. `select` may prune between the layers.
        """
        next_position = slots.valid.sum(axis=1, dtype=jnp.int32)
        x = self.placed(x, slots.positions)
        prompts: list[Prompt] = []
        made: dict[int, Shown] = {}  # since the last pruning
        shrinks: dict[int, Reduction] = {}

        def laid_out() -> tuple[Sequence[Layer], Stretch]:
            mask = causal_mask(slots, slots)
            stretch = Stretch(
                select=select,
                num_visual=num_visual,
                numbers=numbers,
                mask=mask,
                sees=mask & slots.valid[:, :, None],
                read=slots.valid,
            )
            return self.layers_at(slots.positions), stretch

        def among(shown: Shown) -> Keep | None:
            shrinks[number] = stretch.ask(number, shown)
            return shrinks[number].among

        layers, stretch = laid_out()
        before: Shown | None = None
        for number in range(len(layers)):
            if before is not None:
                view = View(
                    site=Site.LAYER,
                    layer=number,
                    num_visual=num_visual,
                    tokens=x,
                    attention=before.attention,
                    values=before.made.values,
                    numbers=numbers,
                    valid=slots.valid,
                    sees=stretch.sees,
                )
                if (keep := select(view).tokens) is not None:
                    prompts += stretch.cached(made, shrinks)
                    made.clear()
                    num_visual -= x.shape[1] - keep.indices.shape[1]
                    x, numbers, slots = keep.apply(x), keep.apply(numbers), slots.keep(keep)
                    layers, stretch = laid_out()
            x, queries, new = layers[number](x, mask=stretch.mask, among=among)
            made[number] = before = Shown(queries=queries, made=new)
        prompts += stretch.cached(made, shrinks)
        last = jnp.where(slots.valid, slots.positions, -1).argmax(axis=1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        tail = Tail.empty(prompts, next_position, room)
        return self.logits(x)[:, 0], DecoderCache(tail=tail, prompts=tuple(prompts))

    def step(
        self, tokens: Int[Array, " b"], cache: DecoderCache, select: Select
    ) -> tuple[Float[Array, "b vocab"], DecoderCache]:
        """Adds one token to every sample. The caller sees to it that a slot is left."""
        tail, written = cache.tail.opened(), []
        position = tail.next_position[:, None]
        x = self.placed(self.embed(tokens[:, None]), position)
        prompt = by_layer(cache.prompts, select)
        for layer, past in zip(self.layers_at(position), tail.pasts(prompt), strict=True):
            x, _, block = layer(x, mask=None, past=past)
            written.append(block)
        return self.logits(x)[:, 0], replace(cache, tail=tail.closed(written))

    def __call__(self, x: Float[Array, "b n d"], slots: Slots) -> Float[Array, "b n vocab"]:
        """Logits of every row, nothing cached: for training and for comparison."""
        x, mask = self.placed(x, slots.positions), causal_mask(slots, slots)
        for layer in self.layers_at(slots.positions):
            x, _, _ = layer(x, mask=mask)
        return self.logits(x)
