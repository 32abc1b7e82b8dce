"""Generation as compiled programs: prefill, one step, and the whole loop in one.

    generate   = prefill + decode in one program; nothing returns to the host in between
    prefill    → logits of the next token, a cache, what was kept       for streaming and serving
    step       token + cache → logits + cache; the old cache's memory is reused (donated)
    look, go_on   prefill cut in two at the first cross-attention layer: `look` scores, the host
               reads how many tokens were asked for, `go_on` runs at the capacity chosen

Everything static is an argument here: prompt length, number of images and tiles come with the
inputs' shapes (see `inputs` for the few that occur), budgets with the pruners.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Keep, Pruners, View, run_pruners
from catp_jax.generation.sampling import Sampling
from catp_jax.struct import pytree, replace


@runtime_checkable
class Prefillable(Protocol):
    """What a model offers: a prefill cut where it is pruned, and a step."""

    def front(self, inputs: Any, mode: Any) -> Any: ...
    def back(self, front: Any, keep: Keep | None, mode: Any, new_slots: int) -> Any: ...
    def step(self, tokens: Int[Array, " b"], cache: Any, mode: Any) -> Any: ...


@pytree
class Selection:
    """What pruning left: `kept` counts a sample's visual tokens before pruning (None: all stay).

    `states` has the last state of every pruner, in their order.
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


def _select(view: View | None, pruners: Pruners) -> tuple[Keep | None, Selection]:
    """The selection in terms of the view, and in terms of the sample's visual tokens."""
    if view is None or not pruners:
        return None, Selection(kept=None, states=())
    keep, states = run_pruners(pruners, view)
    if keep is None:
        return None, Selection(kept=None, states=states)
    kept = Keep(indices=keep.apply(view.positions), valid=keep.valid)
    return keep, Selection(kept=kept, states=states)


def _prefill(
    model: Prefillable, pruners: Pruners, inputs: Any, mode: str, new_slots: int
) -> Prefilled:
    front = model.front(inputs, mode)
    keep, selection = _select(front.view, pruners)
    logits, cache = model.back(front, keep, mode, new_slots)
    return Prefilled(logits=logits, cache=cache, selection=selection)


def _decode(
    model: Prefillable,
    start: Prefilled,
    sampling: Sampling,
    ends: Int[Array, " e"],
    pad: Int[Array, ""],
    mode: str,
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
        logits, cache = model.step(last, cache, mode)
        token = jnp.where(done, pad, sampling.pick(logits, number))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], number, axis=1)
        return number + 1, tokens, token, done | is_end(token), cache

    first = sampling.pick(start.logits, jnp.asarray(0, jnp.int32))
    tokens = jnp.full((first.shape[0], max_new_tokens), pad, jnp.int32).at[:, 0].set(first)
    carry = (jnp.asarray(1, jnp.int32), tokens, first, is_end(first), start.cache)
    _, tokens, _, _, _ = jax.lax.while_loop(going, add, carry)

    ended = (tokens[:, :, None] == ends[None, None]).any(axis=-1)
    lengths = jnp.where(ended.any(axis=1), ended.argmax(axis=1) + 1, max_new_tokens)
    return Generated(
        tokens=tokens,
        lengths=lengths.astype(jnp.int32),
        logits=start.logits,
        selection=start.selection,
    )


@partial(jax.jit, static_argnames=("mode", "max_new_tokens"))
def generate(
    model: Prefillable,
    pruners: Pruners,
    inputs: Any,
    sampling: Sampling,
    ends: Int[Array, " e"],
    pad: Int[Array, ""],
    *,
    mode: str,
    max_new_tokens: int,
) -> Generated:
    """Prefill and decode in one program."""
    start = _prefill(model, pruners, inputs, mode, max_new_tokens)
    return _decode(model, start, sampling, ends, pad, mode, max_new_tokens)


@partial(jax.jit, static_argnames=("mode", "new_slots"))
def prefill(
    model: Prefillable, pruners: Pruners, inputs: Any, *, mode: str, new_slots: int
) -> Prefilled:
    """The prompt alone; the cache has room for `new_slots` tokens."""
    return _prefill(model, pruners, inputs, mode, new_slots)


@partial(jax.jit, static_argnames=("mode",), donate_argnames=("cache",))
def step(
    model: Prefillable, tokens: Int[Array, " b"], cache: Any, *, mode: str
) -> tuple[Float[Array, "b vocab"], Any]:
    """One more token for every sample. `cache` is consumed: use the returned one."""
    return model.step(tokens, cache, mode)


@partial(jax.jit, static_argnames=("mode",))
def look(
    model: Prefillable, pruners: Pruners, inputs: Any, *, mode: str
) -> tuple[Any, Keep | None, Selection]:
    """The prefill up to the selection, which may be as large as the axis itself.

    Kept entries stand before empty ones, so the host can cut the selection (`cut`) to any capacity
    that holds `keep.valid.sum(axis=1).max()` entries.
    """
    front = model.front(inputs, mode)
    keep, selection = _select(front.view, pruners)
    return replace(front, view=None), keep, selection


def cut(keep: Keep, selection: Selection, capacity: int) -> tuple[Keep, Selection]:
    """The first `capacity` entries of a selection."""

    def first(some: Keep | None) -> Any:
        return jax.tree.map(lambda array: array[:, :capacity], some)

    return first(keep), replace(selection, kept=first(selection.kept))


@partial(jax.jit, static_argnames=("mode", "max_new_tokens"))
def go_on(
    model: Prefillable,
    front: Any,
    keep: Keep | None,
    selection: Selection,
    sampling: Sampling,
    ends: Int[Array, " e"],
    pad: Int[Array, ""],
    *,
    mode: str,
    max_new_tokens: int,
) -> Generated:
    """What `generate` does after `look`."""
    logits, cache = model.back(front, keep, mode, max_new_tokens)
    start = Prefilled(logits=logits, cache=cache, selection=selection)
    return _decode(model, start, sampling, ends, pad, mode, max_new_tokens)
