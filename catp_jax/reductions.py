"""How the axes of a site shrink: entries stay or become means of several, channels stay, keys and
values are put down in few directions. Selection, mean and projection are linear maps on one axis.

    tokens   Keep, Merge (means), Replace (other tokens in their place), Chained (one after another)
    keys     Channels, Basis
    values   Basis
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.struct import pytree, replace, static


@pytree
class Keep:
    """Selection: output entry `j` is input entry `indices[:, j]`; where not `valid` it is empty.

    At CACHE and READ each key-value head may keep entries of its own.
    """

    merges: ClassVar[bool] = False
    """Whether entries are means of several."""

    indices: Int[Array, "b k"] | Int[Array, "b kv k"]
    valid: Bool[Array, "b k"] | Bool[Array, "b kv k"]

    @property
    def is_by_head(self) -> bool:
        """Whether each key-value head keeps entries of its own."""
        return self.indices.ndim == 3

    def apply(self, array: Array) -> Array:
        """Reduces axis 1 of `array` [b, n, …] to [b, k, …]; by head [b, n, kv, …] to [b, k, kv, …],
        and [b, n], which all heads have in common, to [b, kv, k].
        """
        if not self.is_by_head:
            indices = self.indices
        elif array.ndim == 2:
            return jnp.take_along_axis(array[:, None], self.indices, axis=2)
        else:
            indices = jnp.swapaxes(self.indices, 1, 2)
        indices = indices.reshape(indices.shape + (1,) * (array.ndim - indices.ndim))
        return jnp.take_along_axis(array, indices, axis=1)

    def first(self, size: int) -> "Keep":
        """The first `size` entries of it."""
        return replace(self, indices=self.indices[..., :size], valid=self.valid[..., :size])


@pytree
class Merge(Keep):
    """Means: output entry `j` is the mean of the input entries `i` with `groups[:, i] == j`, and
    empty if there are none. An entry with another number (-1) goes nowhere.

    Only real numbers have a mean. In all else, its number, its position, who sees it, it is like
    its member `indices[:, j]`, which stands for it: let a group be of entries that the same rows
    see. Text stays what it is: each is a group of its own, behind the visual ones.
    """

    merges: ClassVar[bool] = True

    groups: Int[Array, "b n"] | Int[Array, "b kv n"]

    @classmethod
    def of(
        cls,
        groups: Int[Array, "b *n"],
        off_centre: Int[Array, "b *n"],
        size: int,
    ) -> "Merge":
        """`size` groups, for each of which the member stands that is least `off_centre`."""
        known = jnp.where((groups >= 0) & (groups < size), groups, size)
        index = jax.lax.broadcasted_iota(jnp.int32, groups.shape, groups.ndim - 1)
        by_group = jax.lax.sort((known, off_centre, index), num_keys=3)[-1]
        members = _members(groups, size).sum(axis=-1, dtype=jnp.int32)
        start = jnp.minimum(jnp.cumsum(members, axis=-1) - members, groups.shape[-1] - 1)
        indices = jnp.take_along_axis(by_group, start, axis=-1)
        return cls(indices=indices, valid=members > 0, groups=groups)

    def apply(self, array: Array) -> Array:
        """As a selection's, with means in place of entries."""
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return super().apply(array)
        members = _members(self.groups, self.indices.shape[-1])
        number = members.sum(axis=-1, dtype=jnp.float32)
        number = jnp.swapaxes(number, 1, 2) if self.is_by_head else number
        total = jnp.einsum(
            "bhkn,bnh...->bkh..." if self.is_by_head else "bkn,bn...->bk...",
            members.astype(array.dtype),
            array,
            precision=jax.lax.Precision.HIGHEST,  # the mean of one entry is that entry
            preferred_element_type=jnp.float32,
        )
        number = number.reshape(number.shape + (1,) * (total.ndim - number.ndim))
        return (total / jnp.maximum(number, 1)).astype(array.dtype)


def _members(groups: Int[Array, "b *n"], size: int) -> Bool[Array, "b *kv k n"]:
    """Which entries a group has."""
    numbers = jnp.arange(size, dtype=jnp.int32)
    return groups[..., None, :] == numbers.reshape((1,) * (groups.ndim - 1) + (size, 1))


@pytree
class Replace(Merge):
    """Other tokens in the place of visual ones, at ENTRY or CROSS: `tokens[:, j]` stands for the
    group `j`. They need not be its mean, nor anything linear.

    What there is of each head, keys and values, does become means: a layer has made nothing of the
    new tokens yet when the next pruner looks. In all else it is as a `Merge`.
    """

    tokens: Float[Array, "b k d"]

    @classmethod
    def merged(cls, merge: Merge, tokens: Float[Array, "b k d"]) -> "Replace":
        """The groups of `merge`, with `tokens` instead of means."""
        return cls(indices=merge.indices, valid=merge.valid, groups=merge.groups, tokens=tokens)

    def apply(self, array: Array) -> Array:
        """As a selection's, with the new tokens in place of a site's own, in their number type.

        Raises ValueError for an array of so many axes that is not of this width.
        """
        if array.ndim != self.tokens.ndim or not jnp.issubdtype(array.dtype, jnp.floating):
            return super().apply(array)
        if array.shape[2] != self.tokens.shape[2]:
            raise ValueError(
                f"tokens of width {self.tokens.shape[2]} cannot take the place of others of width "
                f"{array.shape[2]}"
            )
        return self.tokens.astype(array.dtype)

    def first(self, size: int) -> "Replace":
        """The first `size` groups."""
        return replace(
            self,
            indices=self.indices[:, :size],
            valid=self.valid[:, :size],
            tokens=self.tokens[:, :size],
        )


@pytree
class Chained(Keep):
    """`before` and, on its result, `then`, where one of them merges. `indices` and `valid` are of
    both, in terms of the entries that `before` was given.
    """

    merges: ClassVar[bool] = True

    before: Keep
    then: Keep

    def apply(self, array: Array) -> Array:
        """One after the other."""
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return super().apply(array)
        return self.then.apply(self.before.apply(array))

    def first(self, size: int) -> "Chained":
        """The first `size` entries of it."""
        fewer = self.then.first(size)
        return replace(
            self, indices=self.indices[..., :size], valid=self.valid[..., :size], then=fewer
        )


@pytree
class Channels:
    """Key channels that stay, of each key-value head: `h` keeps `indices[:, h]`. Keys of the last
    `recent` tokens of text and of new ones have all of them.
    """

    recent: int = static()
    indices: Int[Array, "b kv c"]

    def apply(self, array: Float[Array, "b kv *rest d"]) -> Float[Array, "b kv *rest c"]:
        """What of keys, or of queries, stays."""
        shape = (*self.indices.shape[:2], *(1,) * (array.ndim - 3), self.indices.shape[2])
        return jnp.take_along_axis(array, self.indices.reshape(shape), axis=-1)


@pytree
class Basis:
    """Directions that keys or values are put down in, of each key-value head: `matrix` has
    orthonormal columns. Those of new tokens have all of theirs.
    """

    recent: ClassVar[int] = 0

    matrix: Float[Array, "kv d rank"]

    def apply(self, array: Float[Array, "b kv *rest d"]) -> Float[Array, "b kv *rest r"]:
        """Keys, queries or values in this basis."""
        return self._product("kdr,bk...d->bk...r", array)

    def back(self, array: Float[Array, "b kv *rest r"]) -> Float[Array, "b kv *rest d"]:
        """Values out of it."""
        return self._product("kdr,bk...r->bk...d", array)

    def _product(self, axes: str, array: Array) -> Array:
        matrix = self.matrix.astype(array.dtype)  # first: else a CPU lacks it in 16 bits
        product = jnp.einsum(axes, matrix, array, preferred_element_type=jnp.float32)
        return product.astype(array.dtype)


@pytree
class Reduction:
    """How the axes of a site shrink; None leaves an axis as it is. `tokens` may be a `Merge`, at
    ENTRY and CROSS a `Replace`.

    The others are a matter of CACHE: the channels or directions of keys and of values, and `among`,
    the tokens to which the layer's attention over the prompt, too, is confined, where it is yet to
    be computed: a model may have read everything in a layer where it is first pruned.
    """

    tokens: Keep | None = None
    keys: Channels | Basis | None = None
    values: Basis | None = None
    among: Keep | None = None


def keep_columns(mask: Bool[Array, "b s n"], keep: Keep) -> Bool[Array, "b *kv s k"]:
    """The columns of an attention mask that belong to the kept tokens; empty ones are False."""
    mask = mask[:, None] if keep.is_by_head else mask
    columns = jnp.take_along_axis(mask, keep.indices[..., None, :], axis=-1)
    return columns & keep.valid[..., None, :]


def chain(first: Keep, then: Keep) -> Keep:
    """One reduction that does what `first` and, on its result, `then` do."""
    indices = then.apply(first.indices)
    valid = then.apply(first.valid) & then.valid
    if first.merges or then.merges:
        return Chained(indices=indices, valid=valid, before=first, then=then)
    return Keep(indices=indices, valid=valid)
