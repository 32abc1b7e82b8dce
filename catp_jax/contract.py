"""The page that models and pruning methods both read; neither reads the other.

A model shows what it has at a *site* (a `View`); a method answers how an axis of that site shrinks
(a `Reduction`); the model does the shrinking and carries masks and positions along.

Adding a method: write a `@pytree` with a class attribute `site` and a `__call__(view, state)`.
Numbers that fix a shape are static and counted in entries (`keep`), learned arrays are leaves.
"""

import enum
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.struct import pytree, replace, static


class Site(enum.Enum):
    """Where a model can be pruned. A model lists those it has in its `sites`."""

    ENTRY = "visual tokens on their way into the language model"
    CROSS = "visual features at the first cross-attention layer"
    LAYER = "the token sequence between two decoder layers"
    CACHE = "one layer's cache, once the prompt is in"
    WRITE = "the cache slot that one new token goes to"
    READ = "what one decode step reads of one layer's cache"


@pytree
class Attention:
    """One attention layer's logits, `queries · keys`: queries are scaled, in float32, and keys are
    as the layer uses them.
    """

    queries: Float[Array, "b s h dk"]
    keys: Float[Array, "b n kv dk"]


@pytree
class Evidence:
    """How visual tokens came about, where a querying transformer makes them.

    `cross`: from the visual tokens to the image tokens, by cross-attention layer. `among`: of the
    visual tokens among themselves, by layer. `vision`: of the image tokens among themselves, in the
    last block of the image encoder. It speaks of all visual tokens there were before any pruning:
    entry `j` of a view is token `numbers[:, j]` here.

    Where text goes through the same transformer, the visual tokens look at it too: the columns of
    `among` are then the visual tokens and the text after them, its rows the visual tokens alone.
    `among_valid` says which columns are no padding (None: all).
    """

    cross: tuple[Attention, ...]
    among: tuple[Attention, ...]
    vision: Attention
    among_valid: Bool[Array, "b m"] | None = None


@pytree
class View:
    """What a model shows at a site. Nothing here costs anything unless a method reads it.

    The axis to prune (`n`) holds visual tokens and, at site LAYER, text tokens after them, which
    always stay. `numbers` counts a sample's visual tokens before any pruning, -1 for text; at most
    the first `num_visual` entries are visual.

    `attention` and `values` are those of the layer whose attention is the evidence: at LAYER the
    one before, the number of which is `layer - 1`. At ENTRY there is none yet, but `evidence`.
    `sees` is False in every row that is text padding; a column is `valid` if it holds a token that
    some row sees.
    """

    site: Site = static()
    layer: int = static()
    num_visual: int = static()
    tokens: Float[Array, "b n d"]
    attention: Attention | None
    values: Float[Array, "b n kv dk"] | None
    evidence: Evidence | None
    numbers: Int[Array, "b n"]
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

    `state` is what a method reports: the last state of every pruner is part of the output. Today
    each call begins with `start`; none is carried from one view to the next.
    """

    sites: ClassVar[tuple[Site, ...]]
    """The sites a method can work at."""

    site: Any
    """The one that this pruner works at; None: the first of `sites` that the model has (`settle`).
    At LAYER, its field `layer` is the number of the decoder layer that it works in front of."""

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
    attention = view.attention
    if attention is not None:
        attention = Attention(queries=attention.queries, keys=keep.apply(attention.keys))
    dropped = view.valid.shape[1] - keep.indices.shape[1]
    return View(
        site=view.site,
        layer=view.layer,
        num_visual=view.num_visual - dropped,
        tokens=keep.apply(view.tokens),
        attention=attention,
        values=None if view.values is None else keep.apply(view.values),
        evidence=view.evidence,
        numbers=keep.apply(view.numbers),
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


Select = Callable[[View], Keep | None]
"""What a model calls with every view that it shows; None: nothing is pruned there."""


def is_at(pruner: Any, view: View) -> bool:
    """Whether a pruner works on this view."""
    return pruner.site is view.site and (
        pruner.site is not Site.LAYER or pruner.layer == view.layer
    )


def run_pruners(pruners: Pruners, view: View) -> tuple[Keep | None, tuple[Any, ...]]:
    """Runs the given pruners on one view.

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


def settle(pruners: Pruners, sites: frozenset[Site]) -> Pruners:
    """The pruners for a model with these sites: where one leaves its site open, it works at the
    first of its `sites` that the model has.

    Raises ValueError if a pruner works where the model has no site, or it itself cannot.
    """
    settled = []
    for pruner in pruners:
        if pruner.site is not None and pruner.site not in pruner.sites:
            raise ValueError(
                f"{type(pruner).__name__} cannot work at site {pruner.site.name}; it can at "
                f"{', '.join(site.name for site in pruner.sites)}"
            )
        could = [site for site in pruner.sites if site in sites]
        site = pruner.site or (could or pruner.sites)[0]
        if site not in sites:
            name = type(pruner).__name__
            way_out = f"; give {name} site=Site.{could[0].name}" if could else ""
            raise ValueError(
                f"{name} prunes {site.value} (site {site.name}), which this model does not have; "
                f"it has {', '.join(sorted(s.name for s in sites)) or 'none'}{way_out}"
            )
        settled.append(pruner if pruner.site is site else replace(pruner, site=site))
    return tuple(settled)
