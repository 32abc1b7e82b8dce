"""Beam search as one compiled program: the likeliest answers, not the likeliest tokens.

    beams     the `num_beams` likeliest unfinished answers; each step gives `2·num_beams` or more
              candidates, of which those that end join the finished ones and the rest go on
    finished  the `num_beams` best ended answers, by log-probability / length ** length_penalty

The beams of a prompt read one cache of it; each has only a tail of its own, which is what a step
moves.

The rules, and which candidates count, are those of Hugging Face transformers
(`GenerationMixin._beam_search`), so that both find the same answers. Each sample has its own end:
one that is done changes no more, whatever its neighbours do.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.contract import Pruners
from catp_jax.generation.generate import (
    Generated,
    Prefillable,
    Prefilled,
    conclude,
    prefill_with,
)
from catp_jax.struct import pytree, static

NEVER = -1.0e9  # the score of what must not be chosen, as transformers has it

EarlyStopping = Literal["heuristic", "first", "never"]
"""When a sample is done. "first" (transformers' `early_stopping=True`): as soon as there are
`num_beams` finished answers. "heuristic" (False, the default): when the best beam, ended now, would
not be better than the worst finished answer. "never": when no beam could ever get better."""


@pytree
class Beams:
    """How to search. `length_penalty` above 0 favours long answers; 0 does not look at length.

    `min_new_tokens`: none ends before it has that many tokens, the end token apart.
    """

    num_beams: int = static()
    early_stopping: EarlyStopping = static(default="heuristic")
    length_penalty: Float[Array, ""]
    min_new_tokens: Int[Array, ""]


def beams(
    num_beams: int,
    *,
    length_penalty: float = 1.0,
    min_new_tokens: int = 0,
    early_stopping: EarlyStopping = "heuristic",
) -> Beams:
    """Beam search's numbers. Raises ValueError for those out of range."""
    if num_beams < 1:
        raise ValueError(f"num_beams is at least 1, got {num_beams}")
    if min_new_tokens < 0:
        raise ValueError(f"min_new_tokens is at least 0, got {min_new_tokens}")
    if not -100 <= length_penalty <= 100:
        raise ValueError(f"length_penalty lies between -100 and 100, got {length_penalty}")
    if early_stopping not in get_args(EarlyStopping):
        raise ValueError(
            f"early_stopping is 'heuristic', 'first' or 'never', got {early_stopping!r}"
        )
    return Beams(
        num_beams=num_beams,
        early_stopping=early_stopping,
        length_penalty=jnp.asarray(length_penalty, jnp.float32),
        min_new_tokens=jnp.asarray(min_new_tokens, jnp.int32),
    )


@pytree
class Search:
    """The state between two steps; `k` is the number of beams.

    `running`, `running_scores`: unfinished answers and their log-probability. `finished`,
    `finished_scores`, `is_finished`: ended ones, and whether there are that many. `open`: samples
    that still search.
    """

    length: Int[Array, ""]
    running: Int[Array, "b k new"]
    running_scores: Float[Array, "b k"]
    finished: Int[Array, "b k new"]
    finished_scores: Float[Array, "b k"]
    is_finished: Bool[Array, "b k"]
    open: Bool[Array, " b"]


def _start(batch: int, k: int, new: int, pad: Int[Array, ""]) -> Search:
    tokens = jnp.full((batch, k, new), pad, jnp.int32)
    first = jnp.where(jnp.arange(k) == 0, 0.0, NEVER)  # or all beams would be the same
    return Search(
        length=jnp.asarray(0, jnp.int32),
        running=tokens,
        running_scores=jnp.broadcast_to(first, (batch, k)),
        finished=tokens,
        finished_scores=jnp.full((batch, k), NEVER),
        is_finished=jnp.zeros((batch, k), bool),
        open=jnp.ones((batch,), bool),
    )


def _take(array: Array, index: Int[Array, "b m"]) -> Array:
    """The beams `index` of every sample."""
    return jnp.take_along_axis(array, index.reshape(index.shape + (1,) * (array.ndim - 2)), axis=1)


def _advance(
    state: Search, logits: Float[Array, "bk vocab"], how: Beams, ends: Int[Array, " e"]
) -> tuple[Search, Int[Array, "b k"], Int[Array, "b k"]]:
    """One step: the new state, each beam's parent (which beam it came from) and its last token."""
    batch, k, new = state.running.shape
    vocab, number = logits.shape[-1], state.length
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    is_end_token = (jnp.arange(vocab, dtype=jnp.int32)[:, None] == ends[None]).any(axis=1)
    too_early = is_end_token & (number < how.min_new_tokens)
    scores = jnp.where(too_early[None], -jnp.inf, scores).reshape(batch, k, vocab)
    scores = (scores + state.running_scores[:, :, None]).reshape(batch, k * vocab)

    candidates = max(2, 1 + ends.shape[0]) * k
    scores, place = jax.lax.top_k(scores, min(candidates, k * vocab))
    parents, tokens = place // vocab, (place % vocab).astype(jnp.int32)
    answers = jax.lax.dynamic_update_slice_in_dim(
        _take(state.running, parents), tokens[:, :, None], number, axis=2
    )
    ended = is_end_token[tokens] | (number + 1 >= new)

    # those that go on
    scores_on, best = jax.lax.top_k(scores + jnp.where(ended, NEVER, 0.0), k)
    running, last, parents_on = (_take(x, best) for x in (answers, tokens, parents))

    # those that have ended: only the first k candidates count, and only where nothing is settled
    length = (number + 1).astype(jnp.float32)
    settled = ~state.open
    if how.early_stopping == "first":
        settled = settled | state.is_finished.all(axis=1)
    counts = ended & (jnp.arange(scores.shape[1]) < k)[None]
    ended_scores = scores / length**how.length_penalty
    ended_scores += jnp.where(settled[:, None], NEVER, 0.0) + jnp.where(counts, 0.0, NEVER)
    merged = jnp.concatenate([state.finished_scores, ended_scores], axis=1)
    finished_scores, best = jax.lax.top_k(merged, k)
    finished = _take(jnp.concatenate([state.finished, answers], axis=1), best)
    is_finished = _take(jnp.concatenate([state.is_finished, counts], axis=1), best)

    # whether the best beam may still beat the worst finished answer
    hopeful = jnp.where(
        (how.early_stopping == "never") & (how.length_penalty > 0), float(new), length
    )
    best_possible = scores_on[:, :1] / hopeful**how.length_penalty
    worst = jnp.where(is_finished, finished_scores.min(axis=1, keepdims=True), NEVER)
    still_open = state.open & (best_possible > worst).any(axis=1)
    if how.early_stopping == "first":
        still_open = still_open & ~is_finished.all(axis=1)

    def keep_settled(new_value: Array, old: Array) -> Array:
        return jnp.where(state.open.reshape((-1,) + (1,) * (old.ndim - 1)), new_value, old)

    state = Search(
        length=number + 1,
        running=running,
        running_scores=scores_on,
        finished=keep_settled(finished, state.finished),
        finished_scores=keep_settled(finished_scores, state.finished_scores),
        is_finished=keep_settled(is_finished, state.is_finished),
        open=still_open,
    )
    return state, parents_on.astype(jnp.int32), last


@partial(jax.jit, static_argnames=("max_new_tokens",))
def generate_beam(
    model: Prefillable,
    pruners: Pruners,
    inputs: Any,
    how: Beams,
    ends: Int[Array, " e"],
    pad: Int[Array, ""],
    *,
    max_new_tokens: int,
) -> Generated:
    """Prefill and beam search in one program: the best answer of each prompt."""
    start = prefill_with(model, pruners, inputs, max_new_tokens)
    return _search(model, start, how, ends, pad, max_new_tokens)


def _search(
    model: Prefillable,
    start: Prefilled,
    how: Beams,
    ends: Int[Array, " e"],
    pad: Int[Array, ""],
    max_new_tokens: int,
) -> Generated:
    batch, k = start.logits.shape[0], how.num_beams

    def going(carry: Any) -> Bool[Array, ""]:
        state, _, _ = carry
        return (state.length < max_new_tokens) & state.open.any()

    def add(carry: Any) -> Any:
        state, last, cache = carry
        logits, cache = model.step(last.reshape(-1), cache)
        return advanced(state, logits, cache)

    def advanced(state: Search, logits: Array, cache: Any) -> Any:
        state, parents, last = _advance(state, logits, how, ends)
        first = jnp.arange(batch, dtype=jnp.int32)[:, None] * k
        return state, last, cache.reorder((first + parents).reshape(-1))

    state = _start(batch, k, max_new_tokens, pad)
    logits = jnp.repeat(start.logits, k, axis=0)
    carry = advanced(state, logits, start.cache.spread(k))
    state, _, _ = jax.lax.while_loop(going, add, carry)

    return conclude(start, state.finished[:, 0], ends)
