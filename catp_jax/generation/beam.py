"""Beam search as one compiled program: the likeliest answers, not the likeliest tokens.

    beams     the `num_beams` likeliest unfinished answers; each step gives `2·num_beams` or more
              candidates, of which those that end join the finished ones and the rest go on
    finished  the `num_beams` best ended answers, by log-probability / length ** length_penalty

The beams of a prompt share its cache; where one goes on from another, only what it sees of the
answers' tail changes (`models.cache.Tail`).

The rules, and which candidates count, are those of Hugging Face transformers
(`GenerationMixin._beam_search`), so that both find the same answers. Each sample has its own end:
one that is done changes no more, whatever its neighbours do.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.generation.decoding import Stop
from catp_jax.struct import pytree, static

NEVER = -1.0e9  # the score of what must not be chosen, as transformers has it

EarlyStopping = Literal["heuristic", "first", "never"]
"""When a sample is done. "first" (transformers' `early_stopping=True`): as soon as there are
`num_beams` finished answers. "heuristic" (False, the default): when the best beam, ended now, would
not be better than the worst finished answer. "never": when no beam could ever get better."""


@pytree
class Search:
    """The state after `number` tokens; `k` is the number of beams.

    `running`, `running_scores`: unfinished answers and their log-probability. `finished`,
    `finished_scores`, `is_finished`: ended ones, and whether there are that many. `is_open`:
    prompts that still search.
    """

    number: Int[Array, ""]
    running: Int[Array, "b k new"]
    running_scores: Float[Array, "b k"]
    finished: Int[Array, "b k new"]
    finished_scores: Float[Array, "b k"]
    is_finished: Bool[Array, "b k"]
    is_open: Bool[Array, " b"]


def _take(array: Array, index: Int[Array, "b m"]) -> Array:
    """The beams `index` of every sample."""
    return jnp.take_along_axis(array, index.reshape(index.shape + (1,) * (array.ndim - 2)), axis=1)


@pytree
class Beams:
    """How to search. `length_penalty` above 0 favours long answers; 0 does not look at length.

    `min_new_tokens`: none ends before it has that many tokens, the end token apart. Of each prompt
    the best `num_answers` are given, the best one first.
    """

    num_beams: int = static()
    num_answers: int = static(default=1)
    early_stopping: EarlyStopping = static(default="heuristic")
    length_penalty: Float[Array, ""]
    min_new_tokens: Int[Array, ""]

    @property
    def rows(self) -> int:
        """Answers that a prompt has in the making at a time."""
        return self.num_beams

    def start(self, batch: int, stop: Stop) -> Search:
        """No token yet; all beams but the first of a prompt wait, or all would be the same."""
        k = self.num_beams
        tokens = jnp.full((batch, k, stop.max_new_tokens), stop.pad, jnp.int32)
        first = jnp.where(jnp.arange(k) == 0, 0.0, NEVER)
        return Search(
            number=jnp.asarray(0, jnp.int32),
            running=tokens,
            running_scores=jnp.broadcast_to(first, (batch, k)),
            finished=tokens,
            finished_scores=jnp.full((batch, k), NEVER),
            is_finished=jnp.zeros((batch, k), bool),
            is_open=jnp.ones((batch,), bool),
        )

    def advance(
        self, logits: Float[Array, "r vocab"], state: Search, stop: Stop
    ) -> tuple[Int[Array, " r"], Int[Array, " r"], Search]:
        """The best continuations: each beam's last token, the row it came from, the new state."""
        batch, k, new = state.running.shape
        vocab, number = logits.shape[-1], state.number
        scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        is_end_token = stop.is_end(jnp.arange(vocab, dtype=jnp.int32))
        too_early = is_end_token & (number < self.min_new_tokens)
        scores = jnp.where(too_early[None], -jnp.inf, scores).reshape(batch, k, vocab)
        scores = (scores + state.running_scores[:, :, None]).reshape(batch, k * vocab)

        candidates = max(2, 1 + stop.ends.shape[0]) * k
        scores, place = jax.lax.top_k(scores, min(candidates, k * vocab))
        parents, tokens = place // vocab, (place % vocab).astype(jnp.int32)
        answers = jax.lax.dynamic_update_slice_in_dim(
            _take(state.running, parents), tokens[:, :, None], number, axis=2
        )
        ended = is_end_token[tokens] | (number + 1 >= new)

        # those that go on
        scores_on, best = jax.lax.top_k(scores + jnp.where(ended, NEVER, 0.0), k)
        running, last, parents_on = (_take(x, best) for x in (answers, tokens, parents))

        # those that have ended: only the first k candidates count, where nothing is settled
        length = (number + 1).astype(jnp.float32)
        settled = ~state.is_open
        if self.early_stopping == "first":
            settled = settled | state.is_finished.all(axis=1)
        counts = ended & (jnp.arange(scores.shape[1]) < k)[None]
        ended_scores = scores / length**self.length_penalty
        ended_scores += jnp.where(settled[:, None], NEVER, 0.0) + jnp.where(counts, 0.0, NEVER)
        merged = jnp.concatenate([state.finished_scores, ended_scores], axis=1)
        finished_scores, best = jax.lax.top_k(merged, k)
        finished = _take(jnp.concatenate([state.finished, answers], axis=1), best)
        is_finished = _take(jnp.concatenate([state.is_finished, counts], axis=1), best)

        # whether the best beam may still beat the worst finished answer
        hopeful = jnp.where(
            (self.early_stopping == "never") & (self.length_penalty > 0), float(new), length
        )
        best_possible = scores_on[:, :1] / hopeful**self.length_penalty
        worst = jnp.where(is_finished, finished_scores.min(axis=1, keepdims=True), NEVER)
        still_open = state.is_open & (best_possible > worst).any(axis=1)
        if self.early_stopping == "first":
            still_open = still_open & ~is_finished.all(axis=1)

        def keep_settled(new_value: Array, old: Array) -> Array:
            return jnp.where(state.is_open.reshape((-1,) + (1,) * (old.ndim - 1)), new_value, old)

        state = Search(
            number=number + 1,
            running=running,
            running_scores=scores_on,
            finished=keep_settled(finished, state.finished),
            finished_scores=keep_settled(finished_scores, state.finished_scores),
            is_finished=keep_settled(is_finished, state.is_finished),
            is_open=still_open,
        )
        first = jnp.arange(batch, dtype=jnp.int32)[:, None] * k
        return last.reshape(-1), (first + parents_on).reshape(-1), state

    def answers(self, state: Search) -> Int[Array, "answers new"]:
        """The best finished ones."""
        return state.finished[:, : self.num_answers].reshape(-1, state.finished.shape[-1])


def beams(
    num_beams: int,
    *,
    answers: int = 1,
    length_penalty: float = 1.0,
    min_new_tokens: int = 0,
    early_stopping: EarlyStopping = "heuristic",
) -> Beams:
    """Beam search's numbers. Raises ValueError for those out of range."""
    if num_beams < 1:
        raise ValueError(f"num_beams is at least 1, got {num_beams}")
    if not 1 <= answers <= num_beams:
        raise ValueError(
            f"{num_beams} beams find 1 to {num_beams} answers to a prompt, got {answers}"
        )
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
        num_answers=answers,
        early_stopping=early_stopping,
        length_penalty=jnp.asarray(length_penalty, jnp.float32),
        min_new_tokens=jnp.asarray(min_new_tokens, jnp.int32),
    )
