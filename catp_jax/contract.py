"""The page that models and pruning methods both read; neither reads the other.

A model shows what it has at a *site* (a `View`); a method answers how an axis of that site shrinks
(a `Reduction`, see `reductions`, whose classes are here too); the model does the shrinking and
carries masks and positions along.

Adding a method: write a `@pytree` with a class attribute `sites`, where it can work, the static
field `site`, where it does, `start(view)` and `__call__(view, state)`. Numbers that fix a shape are
static and counted in entries (`keep`), learned arrays are leaves.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from jaxtyping import Array, Bool, Float, Int

from catp_jax.reductions import Basis as Basis
from catp_jax.reductions import Chained as Chained
from catp_jax.reductions import Channels as Channels
from catp_jax.reductions import Keep, Reduction, chain, keep_columns
from catp_jax.reductions import Merge as Merge
from catp_jax.reductions import Replace as Replace
from catp_jax.struct import pytree, replace, static


class Site(enum.Enum):
    """Where a model can be pruned. A model lists those it has in its `sites`."""

    ENTRY = "visual tokens on their way into the language model"
    CROSS = "visual features at the first cross-attention layer"
    LAYER = "the token sequence between two decoder layers"
    CACHE = "one layer's keys and values of the prompt, before they are cached"
    READ = "what a decode step reads of one layer's prompt"


BY_LAYER = (Site.CACHE, Site.READ)
"""Sites that every layer has: a method is asked for each, and keeps a state for each."""


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
class Tiles:
    """How visual tokens lie in images before any pruning: tile by tile, first `others`, which have
    no place in it (class tokens), then `rows` × `columns` patches, row by row. Entries are in these
    places as long as it `is_whole`: no method has moved them.
    """

    is_whole: bool = static(default=True)
    rows: int = static()
    columns: int = static()
    others: int = static()

    @property
    def per_tile(self) -> int:
        """Tokens of a tile."""
        return self.others + self.rows * self.columns

    def pruned(self) -> "Tiles":
        """The same once entries have moved."""
        return replace(self, is_whole=False)


@pytree
class View:
    """What a model shows at a site. Nothing here costs anything unless a method reads it.

    The axis to prune (`n`) holds visual tokens and, after them, the text tokens that the layer
    reads as well, which always stay, but where a head keeps entries of its own. `numbers` counts a
    sample's visual tokens before any pruning, -1 for text; at most the first `num_visual` entries
    are visual.

    `attention` and `values` are those of the layer whose attention is the evidence: at LAYER the
    one before, the number of which is `layer - 1`. At ENTRY there is none yet, but `evidence`. Rows
    are the prompt's; at READ the new tokens of a prompt's answers, which share what is read.
    `sees` is False in every row that is text padding; a column is `valid` if it holds a token that
    some row sees. At CACHE and READ it is valid if new tokens may read it, for each head (`kv`) if
    a method kept it so, and `tokens` is None.

    `tiles` is how the visual tokens lie that `numbers` counts, None where they have no place.
    After a `Merge` an entry is a mean, and `numbers` say which token stands for it.
    """

    site: Site = static()
    layer: int = static()
    num_visual: int = static()
    tokens: Float[Array, "b n d"] | None = None
    attention: Attention | None = None
    values: Float[Array, "b n kv dk"] | None = None
    evidence: Evidence | None = None
    numbers: Int[Array, "b n"] | Int[Array, "b kv n"]
    valid: Bool[Array, "b n"] | Bool[Array, "b kv n"]
    sees: Bool[Array, "b s n"] | Bool[Array, "b kv s n"]
    tiles: Tiles | None = None


State = TypeVar("State")


class Pruner(Protocol[State]):
    """A pruning method: pure, `(view, state) -> (reduction, state)`.

    `state` is what a method remembers and reports: the last one of every pruner is part of the
    output. At sites that every layer has, there is one for each layer, carried from step to step:
    all its leaves are arrays with the batch first. At READ it starts in the prefill, from a view of
    what is cached and of the prompt's rows.
    """

    sites: ClassVar[tuple[Site, ...]]
    """The sites a method can work at."""

    site: Any
    """The one that this pruner works at; None: the first of `sites` that the model has (`settle`).
    At LAYER, its field `layer` is the number of the decoder layer that it works in front of."""

    keep: Any
    """Entries that stay, a static count. Of a class that `keeps_all`: as many as would take the
    bytes that it leaves; if it `is_by_bytes`, too, only its share of a whole counts, and None is
    what the method has learned.

    None, of any other class: the data decide (`finds_number`). The selection is then as long as the
    axis, and a caller that can wait for the host cuts it to what is used; not in a cache.

    A pruner may also say how many new tokens a cache holds, whatever its site: `tail`, `point`, see
    `Room`."""

    def start(self, view: View) -> State:
        """The state before the first call."""
        ...

    def __call__(self, view: View, state: State) -> tuple[Reduction, State]:
        """What stays: of a sample that has valid entries at least one. And the new state."""
        ...


Pruners = tuple[Any, ...]
"""Pruners in the order in which they apply, each on what the one before left."""


@pytree
class Room:
    """How many `new` tokens of a row come to a cache, and how many of them it holds: all, or `tail`
    of them. Then the first `point` stay, and each further one takes the place of the oldest of the
    others.

        tail 4, point 1      0 · · ·   0 1 2 3   0 4 2 3   0 4 5 3   0 4 5 6   0 7 5 6
    """

    new: int = static()
    tail: int | None = static(default=None)
    point: int = static(default=0)

    @classmethod
    def of(cls, pruners: Pruners, new: int) -> "Room":
        """Room for so many, as a pruner says that has the static fields `tail` and `point`.

        Raises ValueError if two do.
        """
        saying = [pruner for pruner in pruners if getattr(pruner, "tail", None) is not None]
        if not saying:
            return cls(new=new)
        if len(saying) > 1:
            names = " and ".join(type(pruner).__name__ for pruner in saying)
            raise ValueError(f"{names} both say how many new tokens a cache holds; let one do it")
        (pruner,) = saying
        return cls(new=new, tail=pruner.tail, point=pruner.point)

    @property
    def held(self) -> int:
        """How many are there at most."""
        return self.new if self.tail is None else min(self.new, self.tail)

    @property
    def whole(self) -> "Room":
        """Room for all."""
        return Room(new=self.new)

    def after(self, before: int) -> "Room":
        """With room for so many that come before them, and stay."""
        tail = None if self.tail is None else self.tail + before
        return Room(new=self.new + before, tail=tail, point=self.point + before)


def check_tail(name: str, tail: int | None, point: int) -> None:
    """Raises ValueError for a tail and a point that cannot be a `Room`'s."""
    if tail is None and point:
        raise ValueError(f"{name}'s point says which new tokens of a tail stay; give tail, too")
    if tail is not None and not 0 <= point < tail:
        raise ValueError(
            f"{name} wants a tail of at least 1 and a point from 0 to below it, got tail {tail} "
            f"and point {point}"
        )


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
        tokens=None if view.tokens is None else keep.apply(view.tokens),
        attention=attention,
        values=None if view.values is None else keep.apply(view.values),
        evidence=view.evidence,
        numbers=keep.apply(view.numbers),
        valid=keep.apply(view.valid) & keep.valid,
        sees=keep_columns(view.sees, keep),
        tiles=None if view.tiles is None else view.tiles.pruned(),
    )


Select = Callable[[View | None], Reduction]
"""What a model calls with every view that it shows, None where it has nothing to show."""


def keep_all(view: View | None) -> Reduction:
    """A `Select` that prunes nowhere."""
    return Reduction()


def keep_at(site: Site, keep: Keep | None) -> Select:
    """A `Select` that leaves these tokens at one site, and all others as they are."""

    def select(view: View | None) -> Reduction:
        is_here = view is not None and view.site is site
        return Reduction(tokens=keep if is_here else None)

    return select


def finds_number(pruner: Any) -> bool:
    """Whether the data decide how many entries a pruner leaves, so that the host has to read it."""
    return pruner.keep is None and not getattr(pruner, "keeps_all", False)


def is_at(pruner: Any, view: View) -> bool:
    """Whether a pruner works on this view."""
    return pruner.site is view.site and (
        pruner.site is not Site.LAYER or pruner.layer == view.layer
    )


def turn(pruner: Any) -> tuple[int, int]:
    """When a pruner has its turn, to sort by: sites follow each other, and so do layers."""
    return [*Site].index(pruner.site), pruner.layer if pruner.site is Site.LAYER else 0


def run_pruners(
    pruners: Pruners, view: View, states: Sequence[Any] | None = None
) -> tuple[Reduction, tuple[Any, ...]]:
    """Runs the given pruners on one view, from their `states` (None: from the start).

    Returns the reduction in terms of `view`'s entries and the new state of every pruner. Raises
    ValueError for a reduction that cannot be: by head where heads have entries in common or after
    another such, one without the text, or of channels where another method has chosen.
    """
    kept, keys, values, among, after = None, None, None, None, []
    for number, pruner in enumerate(pruners):
        name = type(pruner).__name__
        if kept is not None and kept.is_by_head:
            raise ValueError(
                f"{name} cannot follow a method that keeps other tokens for each head; let it come "
                "first, or leave one out"
            )
        reduction, state = pruner(view, pruner.start(view) if states is None else states[number])
        after.append(state)
        if reduction.keys is not None or reduction.values is not None:
            if view.site is not Site.CACHE:
                raise ValueError(f"{name} chooses channels, which site {view.site.name} cannot")
            if keys is not None or values is not None:
                raise ValueError(f"{name} chooses channels, as a method before it does")
            keys, values = reduction.keys, reduction.values
        if reduction.among is not None:
            among = reduction.among if kept is None else chain(kept, reduction.among)
            if view.site is not Site.CACHE or among.is_by_head or among.merges:
                raise ValueError(
                    f"{name} prunes a layer's attention over the prompt, which wants tokens as "
                    f"they are, the same for all heads, at CACHE; it is at {view.site.name}"
                )
        if (keep := reduction.tokens) is not None:
            if keep.is_by_head and view.site not in BY_LAYER:
                raise ValueError(
                    f"{name} keeps other tokens for each head, which site {view.site.name} cannot"
                )
            if keep.indices.shape[-1] < view.valid.shape[1] - view.num_visual:
                raise ValueError(f"{name} drops text, which always stays (site {view.site.name})")
            view = view if keep.is_by_head else reduce_view(view, keep)
            kept = keep if kept is None else chain(kept, keep)
    return Reduction(tokens=kept, keys=keys, values=values, among=among), tuple(after)


def settle(pruners: Pruners, sites: frozenset[Site]) -> Pruners:
    """The pruners for a model with these sites: where one leaves its site open, it works at the
    first of its `sites` that the model has.

    Raises ValueError if a pruner works where the model has no site, or it itself cannot, or without
    a count where there must be one; and if two work at READ.
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
        if site in BY_LAYER and finds_number(pruner):
            raise ValueError(
                f"{type(pruner).__name__} leaves its number to the data, which site {site.name} "
                "cannot; give it a count to keep"
            )
        settled.append(pruner if pruner.site is site else replace(pruner, site=site))
    if sum(pruner.site is Site.READ for pruner in settled) > 1:
        raise ValueError("one method at most can choose what a step reads (site READ)")
    return tuple(settled)
