"""Generation as compiled programs: prefill, one step, and the whole loop in one.

    generate   = prefill + decode in one program; nothing returns to the host in between (`beam` has
               the same with beam search)
    prefill    → logits of the next token, a cache, what was kept       for streaming and serving
    step       token + cache → logits + cache; the old cache's memory is reused (donated)
    look, go_on   prefill cut in two where the model is first pruned: `look` scores, the host reads
               how many tokens were asked for, `go_on` runs at the capacity chosen

Everything static is an argument here: prompt length, number of images and tiles come with the
inputs' shapes (see `inputs` for the few that occur), budgets with the pruners.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep, Pruners, Select, Site, View, is_at, run_pruners
from catp_jax.generation.sampling import Sampling
from catp_jax.struct import pytree, replace


@runtime_checkable
class Prefillable(Protocol):
    """What a model offers: a prefill cut where it is first pruned, and a step.

    `front` returns something with a `view`, None if there is nothing to prune. `back` shows the
    views that come after it to `select`, and prunes as it says.
    """

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
    """A prompt's result: logits of the next token, and the cache to go on with."""

    logits: Float[Array, "b vocab"]
    cache: Any
    selection: Selection


@pytree
class Generated:
    """New tokens, padding after the end; `lengths` counts them, the end token included.

    `logits` are those of the first new token.
    """

    tokens: Int[Array, "b new"]
    lengths: Int[Array, " b"]
    logits: Float[Array, "b vocab"]
    selection: Selection


class Selector:
    """Answers a model's views with the pruners that work there, and notes what they left.

    `noted` is what another one noted, with the same pruners, of the views before.
    """

    def __init__(self, pruners: Pruners, noted: Selection | None = None):
        self.pruners = pruners
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
    front, select = model.front(inputs), Selector(pruners)
    keep = None if front.view is None else select(front.view)
    logits, cache = model.back(front, keep, select, new_slots)
    select.check()
    return Prefilled(logits=logits, cache=cache, selection=select.selection)


def _decode(
    model: Prefillable,
    start: Prefilled,
    sampling: Sampling,
    ends: Int[Array, " e"],
    pad: Int[Array, ""],
    max_new_tokens: int,
) -> Generated:
    """The decode loop; it stops as soon as every sample has ended."""

    def is_end(token: Int[Array, " b"]) -> Bool[Array, " b"]:
        return (token[:, None] == ends[None]).any(axis=1)

    def going(carry: Any) -> Bool[Array, ""]:
        number, _, _, done, _ = carry
        return (number < max_new_tokens) & ~done.all()

    def add(carry: Any) -> Any:
        number, tokens, last, done, cache = carry
        logits, cache = model.step(last, cache)
        token = jnp.where(done, pad, sampling.pick(logits, number, ends))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], number, axis=1)
        return number + 1, tokens, token, done | is_end(token), cache

    first = sampling.pick(start.logits, jnp.asarray(0, jnp.int32), ends)
    tokens = jnp.full((first.shape[0], max_new_tokens), pad, jnp.int32).at[:, 0].set(first)
    carry = (jnp.asarray(1, jnp.int32), tokens, first, is_end(first), start.cache)
    _, tokens, _, _, _ = jax.lax.while_loop(going, add, carry)

    return conclude(start, tokens, ends)


def conclude(start: Prefilled, tokens: Int[Array, "b new"], ends: Int[Array, " e"]) -> Generated:
    """What came of a prompt, from its new tokens; each answer is as long as its first end token
    says.
    """
    ended = (tokens[:, :, None] == ends[None, None]).any(axis=-1)
    lengths = jnp.where(ended.any(axis=1), ended.argmax(axis=1) + 1, tokens.shape[1])
    return Generated(
        tokens=tokens,
        lengths=lengths.astype(jnp.int32),
        logits=start.logits,
        selection=start.selection,
    )


@partial(jax.jit, static_argnames=("max_new_tokens",))
def generate(
    model: Prefillable,
    pruners: Pruners,
    inputs: Any,
    sampling: Sampling,
    ends: Int[Array, " e"],
    pad: Int[Array, ""],
    *,
    max_new_tokens: int,
) -> Generated:
    """Prefill and decode in one program."""
    start = prefill_with(model, pruners, inputs, max_new_tokens)
    return _decode(model, start, sampling, ends, pad, max_new_tokens)


@partial(jax.jit, static_argnames=("new_slots",))
def prefill(model: Prefillable, pruners: Pruners, inputs: Any, *, new_slots: int) -> Prefilled:
    """The prompt alone; the cache has room for `new_slots` tokens."""
    return prefill_with(model, pruners, inputs, new_slots)


@partial(jax.jit, donate_argnames=("cache",))
def step(
    model: Prefillable, tokens: Int[Array, " b"], cache: Any
) -> tuple[Float[Array, "b vocab"], Any]:
    """One more token for every sample. `cache` is consumed: use the returned one."""
    return model.step(tokens, cache)


@jax.jit
def look(model: Prefillable, pruners: Pruners, inputs: Any) -> tuple[Any, Keep | None, Selection]:
    """The prefill up to the selection, which may be as large as the axis itself.

    Kept entries stand before empty ones, so the host can cut the selection (`cut`) to any capacity
    that holds `keep.valid.sum(axis=1).max()` entries.
    """
    front, select = model.front(inputs), Selector(pruners)
    keep = None if front.view is None else select(front.view)
    return replace(front, view=None), keep, select.selection


def cut(keep: Keep, selection: Selection, capacity: int) -> tuple[Keep, Selection]:
    """The first `capacity` entries of a selection."""

    def first(some: Keep | None) -> Any:
        return jax.tree.map(lambda array: array[:, :capacity], some)

    return first(keep), replace(selection, kept=first(selection.kept))


@partial(jax.jit, static_argnames=("max_new_tokens",))
def go_on(
    model: Prefillable,
    pruners: Pruners,
    front: Any,
    keep: Keep | None,
    selection: Selection,
    sampling: Sampling,
    ends: Int[Array, " e"],
    pad: Int[Array, ""],
    *,
    max_new_tokens: int,
) -> Generated:
    """What `generate` does after `look`; pruners that work further on have their turn here."""
    select = Selector(pruners, selection)
    logits, cache = model.back(front, keep, select, max_new_tokens)
    select.check()
    start = Prefilled(logits=logits, cache=cache, selection=select.selection)
    return _decode(model, start, sampling, ends, pad, max_new_tokens)
