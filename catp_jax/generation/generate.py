"""Generation as compiled programs: prefill, one step, and the whole loop in one.

    generate   = prefill + decode in one program; nothing returns to the host in between
    prefill    → logits of the next token, a cache, what was kept
    first, following   the loop one token at a time, for streaming
    step       token + cache → logits + cache, for the costs of one and whoever has a loop of their
               own; the old cache's memory is reused (donated)
    encode     what comes before any pruning, once; all the others take it in place of the inputs;
               `Late` inputs have their last token read from the cache
    select_tokens, generate_from   prefill cut in two where the model is first pruned: the first
               scores, the host reads how many tokens were asked for, the second runs at the
               capacity chosen

A `Decoding` chooses the tokens, and how many rows a prompt has; there is one loop for all.

Everything static is an argument here: prompt length, number of images and tiles come with the
inputs' shapes (see `buckets` for the few that occur), budgets with the pruners.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep, Pruners, Room, Select, Site
from catp_jax.generation.decoding import Decoding, Stop, Written
from catp_jax.generation.selector import Selection, Selector
from catp_jax.struct import AnyArray, pytree, replace, static


@runtime_checkable
class Prefillable(Protocol):
    """What a model offers: a prefill cut where it is first pruned, and a step.

    `front` returns something with a `view`, None if there is nothing to prune. `back` shows it and
    all further views to `select`, and `step` its own, and both prune as it says. `sites` says where
    views come from.
    """

    @property
    def sites(self) -> frozenset[Site]: ...
    def front(self, inputs: Any) -> Any: ...
    def back(self, front: Any, select: Select, room: Room) -> Any: ...
    def step(self, tokens: Int[Array, " r"], cache: Any, select: Select) -> Any: ...


@pytree
class Encoded:
    """Inputs whose images have been encoded."""

    front: Any


@pytree
class Late:
    """Inputs, or what is `Encoded` of them, without each prompt's `last` token. A step reads that,
    as it reads an answer's: what was pruned in the cache then counts from the first new token on.
    """

    inputs: Any
    last: Int[Array, " b"]


@pytree
class Prefilled:
    """A prompt's result: logits of the next token, and the cache to go on with: `new_slots` tokens
    of each row may come (`contract.Room`).
    """

    new_slots: int = static()
    logits: Float[Array, "b vocab"]
    cache: Any
    selection: Selection


@pytree
class Generated:
    """What was written. A prompt's answers follow each other.

    `is_finite` says of each answer (in a beam search, of each prompt) whether all tokens chosen had
    finite scores, see `Decoding.start`; its tokens are worth nothing otherwise. `logits` are those
    of the first new token.
    """

    written: Written
    is_finite: Bool[Array, " some"]
    logits: Float[Array, "b vocab"]
    selection: Selection

    @property
    def tokens(self) -> Int[AnyArray, "answers new"]:
        """New tokens of each answer, padding after the end."""
        return self.written.tokens

    @property
    def lengths(self) -> Int[AnyArray, " answers"]:
        """How many tokens an answer has, the end token included."""
        return self.written.lengths


def prefill_with(model: Prefillable, pruners: Pruners, inputs: Any, new_slots: int) -> Prefilled:
    """`prefill` as a part of a larger program."""
    select = Selector(pruners, model.sites)
    room = Room.of(pruners, new_slots)
    return _prefilled(model, pruners, _front(model, inputs), select, room)


def _front(model: Prefillable, inputs: Any) -> Any:
    if isinstance(inputs, Late):
        return replace(inputs, inputs=_front(model, inputs.inputs))
    return inputs.front if isinstance(inputs, Encoded) else model.front(inputs)


def _prefilled(
    model: Prefillable, pruners: Pruners, front: Any, select: Selector, room: Room
) -> Prefilled:
    if isinstance(front, Late):
        start = _prefilled(model, pruners, front.inputs, select, room.after(1))
        selection = start.selection
        logits, cache, states = step_with(model, pruners, front.last, start.cache, selection.states)
        selection = replace(selection, states=states)
    else:
        logits, cache = model.back(front, select, room)
        select.check()
        selection = select.selection
    return Prefilled(new_slots=room.new, logits=logits, cache=cache, selection=selection)


@pytree
class Carry:
    """The decode loop between two tokens: each row's `last` one, which the cache does not hold yet,
    the decoding's own state, and those of the pruners.
    """

    last: Int[Array, " r"]
    state: Any
    cache: Any
    states: tuple[Any, ...]


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
    last, parents, state = decoding.advance(logits, decoding.start(batch, stop), stop)
    return _carry(last, parents, state, cache, start.selection.states)


def advance(
    model: Prefillable, pruners: Pruners, carry: Carry, decoding: Decoding, stop: Stop
) -> Carry:
    """The loop after one token more."""
    logits, cache, states = step_with(model, pruners, carry.last, carry.cache, carry.states)
    if any(pruner.site is Site.READ for pruner in pruners):
        states = _of_open_prompts(carry, states)
    last, parents, state = decoding.advance(logits, carry.state, stop)
    return _carry(last, parents, state, cache, states)


def _of_open_prompts(carry: Carry, states: tuple[Any, ...]) -> tuple[Any, ...]:
    """States after a step; a prompt that has ended keeps its own, whatever its neighbours do."""

    def of_open(after: Array, before: Array) -> Array:
        is_open = carry.state.is_open.reshape(before.shape[0], -1).any(axis=1)
        return jnp.where(is_open.reshape(-1, *(1,) * (before.ndim - 1)), after, before)

    return jax.tree.map(of_open, states, carry.states)


def _carry(last: Array, parents: Array | None, state: Any, cache: Any, states: Any) -> Carry:
    cache = cache if parents is None else cache.reorder(parents)
    return Carry(last=last, state=state, cache=cache, states=states)


def step_with(
    model: Prefillable, pruners: Pruners, tokens: Array, cache: Any, states: tuple[Any, ...]
) -> tuple[Array, Any, tuple[Any, ...]]:
    """`step` as a part of a larger program."""
    noted = replace(Selection.start(pruners), states=states)
    select = Selector(pruners, model.sites, noted, is_step=True)
    logits, cache = model.step(tokens, cache, select)
    return logits, cache, tuple(select.states)


def decode(
    model: Prefillable, pruners: Pruners, start: Prefilled, decoding: Decoding, stop: Stop
) -> Generated:
    """The decode loop; it stops as soon as every answer has ended."""

    def is_open(carry: Carry) -> Bool[Array, ""]:
        return (carry.state.number < stop.max_new_tokens) & carry.state.is_open.any()

    carry = jax.lax.while_loop(
        is_open,
        lambda carry: advance(model, pruners, carry, decoding, stop),
        begin(start, decoding, stop),
    )
    return Generated(
        written=decoding.answers(carry.state),
        is_finite=carry.state.is_finite,
        logits=start.logits,
        selection=replace(start.selection, states=carry.states),
    )


@jax.jit
def generate(
    model: Prefillable, pruners: Pruners, inputs: Any, decoding: Decoding, stop: Stop
) -> Generated:
    """Prefill and decode in one program."""
    start = prefill_with(model, pruners, inputs, stop.max_new_tokens)
    return decode(model, pruners, start, decoding, stop)


@jax.jit
def encode(model: Prefillable, inputs: Any) -> Encoded:
    """What all ways of pruning have in common, with what any of them may ask for; not for `Late`
    inputs, which are made of it.
    """
    return Encoded(front=model.front(inputs))


@partial(jax.jit, static_argnames=("new_slots",))
def prefill(model: Prefillable, pruners: Pruners, inputs: Any, *, new_slots: int) -> Prefilled:
    """The prompt alone; `new_slots` tokens of each row may come."""
    return prefill_with(model, pruners, inputs, new_slots)


first = jax.jit(begin)
"""The first token of each row, as a program of its own."""

following = partial(jax.jit, donate_argnames=("carry",))(advance)
"""One token more. `carry` is consumed: use the returned one."""


@partial(jax.jit, donate_argnames=("cache",))
def step(
    model: Prefillable,
    pruners: Pruners,
    tokens: Int[Array, " r"],
    cache: Any,
    states: tuple[Any, ...] = (),
) -> tuple[Float[Array, "r vocab"], Any, tuple[Any, ...]]:
    """One more token for every row. `cache` is consumed: use the returned one.

    It can be called as often as the prefill had `new_slots`; after that, tokens
    take the places of earlier ones. Pruners that work at READ are given again, with the prefill's
    `selection.states` at first.

    Raises ValueError if there are not as many states as pruners.
    """
    if len(states) != len(pruners):
        raise ValueError(
            f"step wants the state of every pruner, got {len(states)} for {len(pruners)}; begin "
            "with the prefill's selection.states"
        )
    return step_with(model, pruners, tokens, cache, states)


@jax.jit
def select_tokens(
    model: Prefillable, pruners: Pruners, inputs: Any
) -> tuple[Any, Keep | None, Selection]:
    """The prefill up to the selection, which may be as large as the axis itself.

    Kept entries stand before empty ones, so the host can `truncate` the selection to any capacity
    that holds `keep.valid.sum(axis=1).max()` entries.
    """
    front, select = _front(model, inputs), Selector(pruners, model.sites)
    first = front.inputs if isinstance(front, Late) else front
    keep = select(first.view).tokens
    first = replace(first, view=None)
    front = replace(front, inputs=first) if isinstance(front, Late) else first
    return front, keep, select.selection


def truncate(keep: Keep, selection: Selection, capacity: int) -> tuple[Keep, Selection]:
    """The first `capacity` entries of a selection."""
    kept = None if selection.kept is None else selection.kept.first(capacity)
    return keep.first(capacity), replace(selection, kept=kept)


@partial(jax.jit, static_argnames=("new_slots",))
def prefill_from(
    model: Prefillable,
    pruners: Pruners,
    front: Any,
    keep: Keep | None,
    selection: Selection,
    *,
    new_slots: int,
) -> Prefilled:
    """What `prefill` does after `select_tokens`."""
    select = Selector(pruners, model.sites, selection, keep)
    return _prefilled(model, pruners, front, select, Room.of(pruners, new_slots))


@jax.jit
def generate_from(
    model: Prefillable,
    pruners: Pruners,
    front: Any,
    keep: Keep | None,
    selection: Selection,
    decoding: Decoding,
    stop: Stop,
) -> Generated:
    """What `generate` does after `select_tokens`; later pruners have their turn here."""
    select = Selector(pruners, model.sites, selection, keep)
    room = Room.of(pruners, stop.max_new_tokens)
    start = _prefilled(model, pruners, front, select, room)
    return decode(model, pruners, start, decoding, stop)
