"""The page that models and pruning methods both read; neither reads the other.

A model shows what it has at a *site* (a `View`); a method answers how an axis of that site shrinks
(a `Reduction`); the model does the shrinking and carries masks and positions along.

Adding a method: write a `@pytree` with a class attribute `site` and a `__call__(view, state)`.
Numbers that fix a shape are static and counted in entries (`keep`), learned arrays are leaves.
"""

import enum
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.struct import pytree, static


class Site(enum.Enum):
    """Where a model can be pruned. A model lists those it has in its `sites`."""

    ENTRY = "visual tokens on their way into the language model"
    CROSS = "visual features at the first cross-attention layer"
    LAYER = "the token sequence between two decoder layers"
    CACHE = "one layer's cache, once the prompt is in"
    WRITE = "the cache slot that one new token goes to"
    READ = "what one decode step reads of one layer's cache"


@pytree
class View:
    """What a model shows at a site. Nothing here costs anything unless a method reads it.

    Queries are scaled, in float32, and keys are as cached, so that `queries · keys` is the
    attention logit.
    `sees` is False in every row that is text padding; a column is `valid` if it holds a token that
    some row sees.
    """

    layer: int = static()
    tokens: Float[Array, "b n d"]
    queries: Float[Array, "b s h dk"]
    keys: Float[Array, "b n kv dk"]
    values: Float[Array, "b n kv dk"]
    positions: Int[Array, "b n"]
    valid: Bool[Array, "b n"]
    sees: Bool[Array, "b s n"]


@pytree
class Keep:
    """Selection: output entry `j` is input entry `indices[:, j]`; where not `valid` it is empty."""

    indices: Int[Array, "b k"]
    valid: Bool[Array, "b k"]

    def apply(self, array: Array) -> Array:
        """Reduces axis 1 of `array` [b, n, …] to [b, k, …]."""
        indices = self.indices.reshape(self.indices.shape + (1,) * (array.ndim - 2))
        return jnp.take_along_axis(array, indices, axis=1)


@pytree
class Reduction:
    """How the axes of a site shrink; None leaves an axis as it is."""

    tokens: Keep | None = None


State = TypeVar("State")


class Pruner(Protocol[State]):
    """A pruning method: pure, `(view, state) -> (reduction, state)`.

    `state` is what a method carries between the calls of one generation, and what it reports: the
    last state of every pruner is part of the output.
    """

    site: ClassVar[Site]

    keep: Any
    """Entries that stay, a static count. None: the data decide; the selection is then as long as
    the axis, and a caller that can wait for the host cuts it to what is used."""

    def start(self, view: View) -> State:
        """The state before the first call."""
        ...

    def __call__(self, view: View, state: State) -> tuple[Reduction, State]: ...


Pruners = tuple[Any, ...]
"""Pruners in the order in which they apply, each on what the one before left."""


def reduce_view(view: View, keep: Keep) -> View:
    """The view that the next pruner at the same site gets."""
    return View(
        layer=view.layer,
        tokens=keep.apply(view.tokens),
        queries=view.queries,
        keys=keep.apply(view.keys),
        values=keep.apply(view.values),
        positions=keep.apply(view.positions),
        valid=keep.apply(view.valid) & keep.valid,
        sees=keep_columns(view.sees, keep),
    )


def keep_columns(mask: Bool[Array, "b s n"], keep: Keep) -> Bool[Array, "b s k"]:
    """The columns of an attention mask that belong to the kept tokens; empty ones are False."""
    columns = jnp.take_along_axis(mask, keep.indices[:, None, :], axis=2)
    return columns & keep.valid[:, None, :]


def chain(first: Keep, then: Keep) -> Keep:
    """One selection that does what `first` and, on its result, `then` do."""
    return Keep(
        indices=then.apply(first.indices),
        valid=then.apply(first.valid) & then.valid,
    )


def run_pruners(pruners: Pruners, view: View) -> tuple[Keep | None, tuple[Any, ...]]:
    """Runs all pruners of one site.

    Returns the selection in terms of `view`'s entries (None if nothing was pruned) and the state of
    every pruner.
    """
    kept, states = None, []
    for pruner in pruners:
        reduction, state = pruner(view, pruner.start(view))
        states.append(state)
        if reduction.tokens is not None:
            view = reduce_view(view, reduction.tokens)
            kept = reduction.tokens if kept is None else chain(kept, reduction.tokens)
    return kept, tuple(states)


def check_sites(pruners: Sequence[Any], sites: frozenset[Site], model: str) -> None:
    """Raises ValueError if a pruner works at a site that the model does not have."""
    for pruner in pruners:
        if pruner.site not in sites:
            raise ValueError(
                f"{type(pruner).__name__} prunes {pruner.site.value} (site {pruner.site.name}), "
                f"which {model} does not have; it has {', '.join(sorted(s.name for s in sites))}"
            )
