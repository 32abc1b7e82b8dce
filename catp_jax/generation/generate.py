"""Generation as compiled programs: prefill, one step, and the whole loop in one.

    generate   = prefill + decode in one program; nothing returns to the host in between
    prefill    → logits of the next token, a cache, what was kept       for streaming and serving
    step       token + cache → logits + cache; the old cache's memory is reused (donated)
    look, go_on   prefill cut in two where the model is first pruned: `look` scores, the host reads
               how many tokens were asked for, `go_on` runs at the capacity chosen

A `Decoding` chooses the tokens, and how many rows a prompt has; there is one loop for all.

Everything static is an argument here: prompt length, number of images and tiles come with the
inputs' shapes (see `inputs` for the few that occur), budgets with the pruners.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep, Pruners, Select, Site, View, is_at, run_pruners, settle
from catp_jax.generation.decoding import Decoding, Stop
from catp_jax.struct import pytree, replace, static


@runtime_checkable
class Prefillable(Protocol):
    """What a model offers: a prefill cut where it is first pruned, and a step.

    `front` returns something with a `view`, None if there is nothing to prune. `back` shows the
    views that come after it to `select`, and prunes as it says. `sites` says where views come from.
    """

    @property
    def sites(self) -> frozenset[Site]: ...
    def front(self, inputs: Any) -> Any: ...
    def back(self, front: Any, keep: Keep | None, select: Select, new_slots: int) -> Any: ...
    def step(self, tokens: Int[Array, " b"], cache: Any) -> Any: ...


@pytree
class Selection:
    """What pruning left: `kept` counts a sample's visual tokens before pruning (None: all stay).

    `states` has the last state of every pruner, in their order; None for one that had nothing to
    look at.
    """

    kept: Keep | None
    states: tuple[Any, ...]


@pytree
class Prefilled:
    """A prompt's result: logits of the next token, and the cache to go on with, which has room for
    `new_slots` tokens of each row.
    """

    new_slots: int = static()
    logits: Float[Array, "b vocab"]
    cache: Any
    selection: Selection


@pytree
class Generated:
    """New tokens of each answer, padding after the end; `lengths` counts them, the end token
    included. A prompt's answers follow each other.

    `logits` are those of the first new token.
    """

    tokens: Int[Array, "answers new"]
    lengths: Int[Array, " answers"]
    logits: Float[Array, "b vocab"]
    selection: Selection


class Selector:
    """Answers a model's views with the pruners that work there, and notes what they left.

    `sites` are the model's; `noted` is what another one noted, with the same pruners, of the views
    before.
    """

    def __init__(self, pruners: Pruners, sites: frozenset[Site], noted: Selection | None = None):
        self.pruners = settle(pruners, sites)
        self.kept: Keep | None = None if noted is None else noted.kept
        self.states: list[Any] = [None] * len(pruners) if noted is None else [*noted.states]
        self.idle = {number for number, state in enumerate(self.states) if state is None}
        self.was_shown = noted is not None and len(self.idle) < len(pruners)

    def __call__(self, view: View) -> Keep | None:
        self.was_shown = True
        mine = [number for number, pruner in enumerate(self.pruners) if is_at(pruner, view)]
        if not mine:
            return None
        self.idle -= {*mine}
        keep, states = run_pruners(tuple(self.pruners[number] for number in mine), view)
        for number, state in zip(mine, states, strict=True):
            self.states[number] = state
        if keep is not None:
            # the visual tokens that are left, in terms of those before any pruning
            room = view.num_visual - (view.valid.shape[1] - keep.indices.shape[1])
            numbers = keep.apply(view.numbers)[:, :room]
            self.kept = Keep(indices=numbers, valid=keep.valid[:, :room] & (numbers >= 0))
        return keep

    def check(self) -> None:
        """Raises ValueError if a pruner was never asked, since it works where no view was shown.

        If there was none at all, there was nothing to prune.
        """
        if not self.was_shown:
            return
        for number in sorted(self.idle):
            pruner = self.pruners[number]
            where = f"layer {pruner.layer}" if pruner.site is Site.LAYER else pruner.site.value
            raise ValueError(
                f"{type(pruner).__name__} works at {where}, which this model does not have; layers "
                "are counted from 0, and the first that can be pruned in front of is 1"
            )

    @property
    def selection(self) -> Selection:
        """What was noted."""
        return Selection(kept=self.kept, states=tuple(self.states))


def prefill_with(model: Prefillable, pruners: Pruners, inputs: Any, new_slots: int) -> Prefilled:
    """`prefill` as a part of a larger program."""
    front, select = model.front(inputs), Selector(pruners, model.sites)
    keep = None if front.view is None else select(front.view)
    logits, cache = model.back(front, keep, select, new_slots)
    select.check()
    return Prefilled(new_slots=new_slots, logits=logits, cache=cache, selection=select.selection)


@pytree
class Carry:
    """The decode loop between two tokens: each row's `last` one, which the cache does not hold yet,
    and the decoding's own state.
    """

    last: Int[Array, " r"]
    state: Any
    cache: Any


def begin(start: Prefilled, decoding: Decoding, stop: Stop) -> Carry:
    """The loop after the first token.

    Raises ValueError if the cache has too little room for `stop.max_new_tokens`.
    """
    if start.new_slots < stop.max_new_tokens - 1:  # the last one is not fed back
        raise ValueError(
            f"the cache has room for {start.new_slots} new tokens of a row, and max_new_tokens is "
            f"{stop.max_new_tokens}; give prefill new_slots={stop.max_new_tokens}"
        )
    batch, rows = start.logits.shape[0], decoding.rows
    logits, cache = start.logits, start.cache
    if rows > 1:
        logits, cache = jnp.repeat(logits, rows, axis=0), cache.spread(rows)
    return _chosen(logits, decoding.start(batch, stop), cache, decoding, stop)


def advance(model: Prefillable, carry: Carry, decoding: Decoding, stop: Stop) -> Carry:
    """The loop after one token more."""
    logits, cache = model.step(carry.last, carry.cache)
    return _chosen(logits, carry.state, cache, decoding, stop)


def _chosen(logits: Array, state: Any, cache: Any, decoding: Decoding, stop: Stop) -> Carry:
    last, parents, state = decoding.advance(logits, state, stop)
    return Carry(last=last, state=state, cache=cache if parents is None else cache.reorder(parents))


def decode(model: Prefillable, start: Prefilled, decoding: Decoding, stop: Stop) -> Generated:
    """The decode loop; it stops as soon as every answer has ended."""

    def is_open(carry: Carry) -> Bool[Array, ""]:
        return (carry.state.number < stop.max_new_tokens) & carry.state.is_open.any()

    carry = jax.lax.while_loop(
        is_open,
        lambda carry: advance(model, carry, decoding, stop),
        begin(start, decoding, stop),
    )
    tokens = decoding.answers(carry.state)
    ended = stop.is_end(tokens)
    lengths = jnp.where(ended.any(axis=1), ended.argmax(axis=1) + 1, tokens.shape[1])
    return Generated(
        tokens=tokens,
        lengths=lengths.astype(jnp.int32),
        logits=start.logits,
        selection=start.selection,
    )


@jax.jit
def generate(
    model: Prefillable, pruners: Pruners, inputs: Any, decoding: Decoding, stop: Stop
) -> Generated:
    """Prefill and decode in one program."""
    start = prefill_with(model, pruners, inputs, stop.max_new_tokens)
    return decode(model, start, decoding, stop)


@partial(jax.jit, static_argnames=("new_slots",))
def prefill(model: Prefillable, pruners: Pruners, inputs: Any, *, new_slots: int) -> Prefilled:
    """The prompt alone; the cache has room for `new_slots` tokens."""
    return prefill_with(model, pruners, inputs, new_slots)


@partial(jax.jit, donate_argnames=("cache",))
def step(
    model: Prefillable, tokens: Int[Array, " b"], cache: Any
) -> tuple[Float[Array, "b vocab"], Any]:
    """One more token for every sample. `cache` is consumed: use the returned one.

    It can be called as often as the prefill had `new_slots`; after that, tokens overwrite others.
    """
    return model.step(tokens, cache)


@jax.jit
def look(model: Prefillable, pruners: Pruners, inputs: Any) -> tuple[Any, Keep | None, Selection]:
    """The prefill up to the selection, which may be as large as the axis itself.

    Kept entries stand before empty ones, so the host can cut the selection (`cut`) to any capacity
    that holds `keep.valid.sum(axis=1).max()` entries.
    """
    front, select = model.front(inputs), Selector(pruners, model.sites)
    keep = None if front.view is None else select(front.view)
    return replace(front, view=None), keep, select.selection


def cut(keep: Keep, selection: Selection, capacity: int) -> tuple[Keep, Selection]:
    """The first `capacity` entries of a selection."""

    def first(some: Keep | None) -> Any:
        return jax.tree.map(lambda array: array[:, :capacity], some)

    return first(keep), replace(selection, kept=first(selection.kept))


@jax.jit
def go_on(
    model: Prefillable,
    pruners: Pruners,
    front: Any,
    keep: Keep | None,
    selection: Selection,
    decoding: Decoding,
    stop: Stop,
) -> Generated:
    """What `generate` does after `look`; pruners that work further on have their turn here."""
    select = Selector(pruners, model.sites, selection)
    logits, cache = model.back(front, keep, select, stop.max_new_tokens)
    select.check()
    start = Prefilled(
        new_slots=stop.max_new_tokens, logits=logits, cache=cache, selection=select.selection
    )
    return decode(model, start, decoding, stop)
