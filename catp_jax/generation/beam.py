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

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.generation.decoding import Chosen, Stop, Written, with_logprobs
from catp_jax.generation.rules import Rules
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
    running: Written
    running_scores: Float[Array, "b k"]
    finished: Written
    finished_scores: Float[Array, "b k"]
    is_finished: Bool[Array, "b k"]
    is_open: Bool[Array, " b"]
    is_finite: Bool[Array, " b"]


def _take(beams: Any, index: Int[Array, "b m"]) -> Any:
    """The beams `index` of every sample, of an array or of several."""

    def taken(array: Array) -> Array:
        places = index.reshape(index.shape + (1,) * (array.ndim - 2))
        return jnp.take_along_axis(array, places, axis=1)

    return jax.tree.map(taken, beams)


@pytree
class Beams:
    """How to search. `length_penalty` above 0 favours long answers; 0 does not look at length.

    Of each prompt the best `num_answers` are given, the best one first. `rules` change
    log-probabilities here, which are what `logprobs` notes, as in transformers: those of a token
    need not sum to 1 then.
    """

    num_beams: int = static()
    num_answers: int = static(default=1)
    early_stopping: EarlyStopping = static(default="heuristic")
    logprobs: int | None = static(default=None)
    length_penalty: Float[Array, ""]
    rules: Rules

    @property
    def rows(self) -> int:
        """Answers that a prompt has in the making at a time."""
        return self.num_beams

    def start(self, batch: int, stop: Stop) -> Search:
        """No token yet; all beams but the first of a prompt wait, or all would be the same."""
        k = self.num_beams
        written = Written.start((batch, k), stop, self.logprobs)
        first = jnp.where(jnp.arange(k) == 0, 0.0, NEVER)
        return Search(
            number=jnp.asarray(0, jnp.int32),
            running=written,
            running_scores=jnp.broadcast_to(first, (batch, k)),
            finished=written,
            finished_scores=jnp.full((batch, k), NEVER),
            is_finished=jnp.zeros((batch, k), bool),
            is_open=jnp.ones((batch,), bool),
            is_finite=jnp.ones((batch,), bool),
        )

    def advance(
        self, logits: Float[Array, "r vocab"], state: Search, stop: Stop
    ) -> tuple[Int[Array, " r"], Int[Array, " r"], Search]:
        """The best continuations: each beam's last token, the row it came from, the new state."""
        batch, k, new = state.running.tokens.shape
        vocab, number = logits.shape[-1], state.number
        scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        # a NaN or an infinite logit makes all of its row NaN
        are_numbers = ~jnp.isnan(scores[:, 0]).reshape(batch, k).any(axis=1)
        scores = self.rules(scores, state.running.tokens.reshape(-1, new), number, stop)
        scores = scores.reshape(batch, k, vocab)
        sums = (scores + state.running_scores[:, :, None]).reshape(batch, k * vocab)

        candidates = max(2, 1 + stop.ends.shape[0]) * k
        sums, place = jax.lax.top_k(sums, min(candidates, k * vocab))
        finite = (are_numbers & (sums[:, 0] > -jnp.inf)) | ~state.is_open
        parents, tokens = place // vocab, (place % vocab).astype(jnp.int32)
        chosen = Chosen(tokens=tokens, scores=sums)
        if self.logprobs is not None:
            chosen = with_logprobs(chosen, _take(scores, parents), self.logprobs)
        answers = _take(state.running, parents).extended(chosen, number, stop)
        ended = answers.has_ended(chosen, stop) | (number + 1 >= new)

        # those that go on
        scores_on, best = jax.lax.top_k(sums + jnp.where(ended, NEVER, 0.0), k)
        running, last, parents_on = (_take(x, best) for x in (answers, tokens, parents))

        # those that have ended: only the first k candidates count, where nothing is settled
        length = (number + 1).astype(jnp.float32)
        settled = ~state.is_open
        if self.early_stopping == "first":
            settled = settled | state.is_finished.all(axis=1)
        counts = ended & (jnp.arange(sums.shape[1]) < k)[None]
        ended_scores = sums / length**self.length_penalty
        ended_scores += jnp.where(settled[:, None], NEVER, 0.0) + jnp.where(counts, 0.0, NEVER)
        merged = jnp.concatenate([state.finished_scores, ended_scores], axis=1)
        finished_scores, best = jax.lax.top_k(merged, k)
        finished = _take(_joined(state.finished, answers), best)
        is_finished = _take(_joined(state.is_finished, counts), best)

        # whether the best beam may still beat the worst finished answer
        hopeful = jnp.where(
            (self.early_stopping == "never") & (self.length_penalty > 0), float(new), length
        )
        best_possible = scores_on[:, :1] / hopeful**self.length_penalty
        worst = jnp.where(is_finished, finished_scores.min(axis=1, keepdims=True), NEVER)
        still_open = state.is_open & finite & (best_possible > worst).any(axis=1)
        if self.early_stopping == "first":
            still_open = still_open & ~is_finished.all(axis=1)

        def keep_settled(new_values: Any, olds: Any) -> Any:
            def kept(value: Array, old: Array) -> Array:
                return jnp.where(state.is_open.reshape((-1,) + (1,) * (old.ndim - 1)), value, old)

            return jax.tree.map(kept, new_values, olds)

        state = Search(
            number=number + 1,
            running=running,
            running_scores=scores_on,
            finished=keep_settled(finished, state.finished),
            finished_scores=keep_settled(finished_scores, state.finished_scores),
            is_finished=keep_settled(is_finished, state.is_finished),
            is_open=still_open,
            is_finite=state.is_finite & finite,
        )
        first = jnp.arange(batch, dtype=jnp.int32)[:, None] * k
        return last.reshape(-1), (first + parents_on).reshape(-1), state

    def answers(self, state: Search) -> Written:
        """The best finished ones."""

        def best(array: Array) -> Array:
            return array[:, : self.num_answers].reshape(-1, *array.shape[2:])

        return jax.tree.map(best, state.finished)


def _joined(one: Any, other: Any) -> Any:
    """The beams of both, of an array or of several."""
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=1), one, other)


def beams(
    num_beams: int,
    *,
    answers: int = 1,
    length_penalty: float = 1.0,
    rules: Rules | None = None,
    early_stopping: EarlyStopping = "heuristic",
    logprobs: int | None = None,
) -> Beams:
    """Beam search's numbers. Raises ValueError as `check_beams` does."""
    check_beams(num_beams, answers, length_penalty, early_stopping)
    return Beams(
        num_beams=num_beams,
        num_answers=answers,
        early_stopping=early_stopping,
        length_penalty=jnp.asarray(length_penalty, jnp.float32),
        rules=rules or Rules.of(),
        logprobs=logprobs,
    )


def check_beams(num_beams: int, answers: int, length_penalty: float, early_stopping: Any) -> None:
    """Raises ValueError for numbers out of range."""
    if num_beams < 1:
        raise ValueError(f"num_beams is at least 1, got {num_beams}")
    if not 1 <= answers <= num_beams:
        raise ValueError(
            f"{num_beams} beams find 1 to {num_beams} answers to a prompt, got {answers}"
        )
    if not -100 <= length_penalty <= 100:
        raise ValueError(f"length_penalty lies between -100 and 100, got {length_penalty}")
    if early_stopping not in get_args(EarlyStopping):
        raise ValueError(
            f"early_stopping is 'heuristic', 'first' or 'never', got {early_stopping!r}"
        )
