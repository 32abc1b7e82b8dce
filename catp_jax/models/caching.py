"""How the layers of a prompt are pruned, and put into the cache.

    a layer's queries, keys, values ─ CACHE ─┬─ attention over the prompt
                                             └─ the cache ─ READ ─ steps

Each layer is shown before its own attention, so that a method may compute that among the tokens
alone that stay.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Attention, Keep, Reduction, Select, Site, Tiles, View, keep_columns
from catp_jax.models.attention import attend, scaled
from catp_jax.models.blocks import KeysValues
from catp_jax.models.cache import Prompt, by_layer
from catp_jax.struct import pytree


@pytree
class Shown:
    """One layer of the prompt as it was computed: what a method may look at before it is cached."""

    queries: Float[Array, "b s h d"]
    made: KeysValues

    @property
    def attention(self) -> Attention:
        """The layer's attention, for views."""
        return Attention(queries=scaled(self.queries), keys=self.made.keys)


Among = Callable[[Shown], Keep | None]
"""Says among which of its tokens a layer's attention over the prompt is; None: all."""


def attend_prompt(
    queries: Float[Array, "b s h d"],
    made: KeysValues,
    mask: Bool[Array, "b s n"] | None,
    among: Among | None,
) -> Float[Array, "b s h d"]:
    """Attention of a prompt's tokens to each other; nothing for those that are left out of it."""
    keep = None if among is None else among(Shown(queries=queries, made=made))
    if keep is None or mask is None:
        return attend(queries, made.keys, made.values, mask)
    some, mask = made.keep(keep), keep_columns(mask, keep)
    mask = jnp.take_along_axis(mask, keep.indices[..., None], axis=1)
    attended = attend(keep.apply(queries), some.keys, some.values, mask)
    batch, size = queries.shape[:2]
    rows = jnp.where(keep.valid, keep.indices, size)  # beyond all: dropped
    which = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return jnp.zeros_like(attended, shape=queries.shape).at[which, rows].set(attended, mode="drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """Layers over the same tokens of the prompt, and who prunes them.

    The prompt's rows attend by `mask`; `sees` is what they see, without rows of padding. New tokens
    may read `read`, and `tiles` is how visual tokens lie.
    """

    select: Select
    num_visual: int
    numbers: Int[Array, "b n"]
    mask: Bool[Array, "b s n"]
    sees: Bool[Array, "b s n"]
    read: Bool[Array, "b n"]
    tiles: Tiles | None = None

    def ask(self, number: int, shown: Shown) -> Reduction:
        """How a layer shrinks."""
        return self.select(
            View(
                site=Site.CACHE,
                layer=number,
                num_visual=self.num_visual,
                attention=shown.attention,
                values=shown.made.values,
                numbers=self.numbers,
                valid=self.read,
                sees=self.sees,
                tiles=self.tiles,
            )
        )

    def cached(
        self, layers: Mapping[int, Shown], shrinks: Mapping[int, Reduction]
    ) -> tuple[Prompt, ...]:
        """The cache of some of the layers, each as it shrinks, and then shown as what is read."""
        prompts: list[Prompt] = []
        whole: dict[int, KeysValues] = {}
        seen: dict[int, Array] = {}

        def put_away() -> None:
            if whole:
                prompts.append(Prompt.of(whole, self.numbers, self.read, self.num_visual))
                whole.clear()

        for number, shown in layers.items():
            if not any((shrinks[number].tokens, shrinks[number].keys, shrinks[number].values)):
                whole[number], seen[number] = shown.made, self.sees
                continue
            put_away()
            parts, seen[number] = self._shrunk(number, shown.made, shrinks[number])
            prompts += parts
        put_away()
        for layer in by_layer(prompts, self.select):
            rows = seen[layer.layer]
            missing = layer.block.keys.shape[2] - rows.shape[-1]
            padding = [(0, 0)] * (rows.ndim - 1) + [(0, missing)]
            self.select(layer.view(layers[layer.layer].queries, jnp.pad(rows, padding)))
        return tuple(prompts)

    def _shrunk(
        self, number: int, made: KeysValues, shrinks: Reduction
    ) -> tuple[list[Prompt], Bool[Array, "b *kv s k"]]:
        """A layer's cache, and what the prompt's rows saw of it."""
        keep, keys, left = shrinks.tokens, shrinks.keys, self.num_visual
        held, sees = (made, self.numbers, self.read), self.sees
        if keep is not None:
            left -= self.read.shape[1] - keep.indices.shape[-1]
            held, sees = kept(keep, *held), keep_columns(sees, keep)
        made, numbers, there = held
        if keys is None and shrinks.values is None:
            return [Prompt.of({number: made}, numbers, there, left)], sees
        recent: list[Prompt] = []
        if keys is not None and keys.recent:
            before, last = (kept(part, *held) for part in apart(numbers, there, keys.recent))
            made, numbers, there = before
            recent.append(Prompt.of({number: last[0]}, last[1], last[2], 0))
        thin = Prompt.of({number: made}, numbers, there, left, keys, shrinks.values)
        # what is without all its channels shows nothing
        nothing = jnp.zeros((*there.shape[:-1], sees.shape[-2], there.shape[-1]), bool)
        return [thin, *recent], nothing


def kept(
    keep: Keep, made: KeysValues, numbers: Int[Array, "b *n"], valid: Bool[Array, "b *n"]
) -> tuple[KeysValues, Int[Array, "b *k"], Bool[Array, "b *k"]]:
    """What is left of a layer's keys and values, and of what says which tokens they are of."""

    def take(array: Array) -> Array:
        if array.ndim < keep.indices.ndim:  # heads had them in common so far
            return keep.apply(array)
        return jnp.take_along_axis(array, keep.indices, axis=-1)

    return made.keep(keep), jnp.where(keep.valid, take(numbers), -1), take(valid) & keep.valid


def apart(numbers: Int[Array, "b *n"], valid: Bool[Array, "b *n"], recent: int) -> list[Keep]:
    """All but the last `recent` tokens of text, and those."""
    size, last = valid.shape[-1], valid.ndim - 1
    is_text = valid & (numbers < 0)
    from_last = jnp.cumsum(is_text[..., ::-1], axis=last, dtype=jnp.int32)[..., ::-1]
    is_recent = is_text & (from_last <= recent)
    index = jax.lax.broadcasted_iota(jnp.int32, valid.shape, last)

    def members(is_in: Bool[Array, "b *n"], count: int) -> Keep:
        empty, indices = jax.lax.sort((~is_in, index), num_keys=2, dimension=last)
        return Keep(indices=indices[..., :count], valid=~empty[..., :count])

    return [members(valid & ~is_recent, size - recent), members(is_recent, recent)]
