"""Choosing the next token: greedy, temperature, top-k, top-p.

All numbers are array leaves, so that changing one compiles nothing; only whether the choice is
greedy, and whether tokens are left out at all (which takes a sort), is part of the program.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from catp_jax.generation.decoding import Chosen, Stop, Written, with_logprobs
from catp_jax.generation.rules import Rules
from catp_jax.struct import pytree, replace, static


@pytree
class Drawing:
    """Answers in the making: `number` tokens of each are there, `is_open` where none is the end."""

    number: Int[Array, ""]
    written: Written
    is_open: Bool[Array, " r"]
    is_finite: Bool[Array, " r"]


@pytree
class Sampling:
    """How to choose. Each answer has a seed of its own, so its tokens don't depend on its
    neighbours. `top_k` 0 and `top_p` 1 leave all tokens in play. A prompt gets `rows` answers.

    Log-probabilities, of the `logprobs` likeliest tokens too, are those that a token is drawn with:
    after rules, temperature, top-k and top-p, as in transformers' `scores`.
    """

    rows: int = static(default=1)
    is_greedy: bool = static()
    is_filtered: bool = static()
    logprobs: int | None = static(default=None)
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    seeds: UInt32[Array, " r"]
    rules: Rules

    def start(self, batch: int, stop: Stop) -> Drawing:
        """No token yet."""
        answers = batch * self.rows
        return Drawing(
            number=jnp.asarray(0, jnp.int32),
            written=Written.start((answers,), stop, self.logprobs),
            is_open=jnp.ones(answers, bool),
            is_finite=jnp.ones(answers, bool),
        )

    def advance(
        self, logits: Float[Array, "r vocab"], state: Drawing, stop: Stop
    ) -> tuple[Int[Array, " r"], None, Drawing]:
        """One token more for each answer, padding for one that has ended."""
        allowed = self.rules(logits, state.written.tokens, state.number, stop)
        chosen = self.choose(allowed, state.number)
        finite = jnp.isfinite(chosen.scores) | ~state.is_open
        chosen = replace(chosen, tokens=jnp.where(state.is_open, chosen.tokens, stop.pad))
        written = state.written.extended(chosen, state.number, stop)
        state = Drawing(
            number=state.number + 1,
            written=replace(
                written, lengths=jnp.where(state.is_open, written.lengths, state.written.lengths)
            ),
            is_open=state.is_open & finite & ~written.has_ended(chosen, stop),
            is_finite=state.is_finite & finite,
        )
        return chosen.tokens, None, state

    def answers(self, state: Drawing) -> Written:
        """All of them."""
        return state.written

    def choose(self, logits: Float[Array, "r vocab"], step: Int[Array, ""]) -> Chosen:
        """A token for each row; `step` numbers the new tokens of a generation, from 0."""
        logits = logits.astype(jnp.float32)
        if self.is_greedy:
            return self._noted(jnp.argmax(logits, axis=-1).astype(jnp.int32), logits)
        logits = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(self.seeds)
        if not self.is_filtered:
            return self._noted(jax.vmap(jax.random.categorical)(keys, logits), logits)
        order = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
        ordered = jnp.take_along_axis(logits, order, axis=-1)

        # top-k first, then top-p of what is left, as in transformers
        place = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        ordered = jnp.where((self.top_k > 0) & (place >= self.top_k), -jnp.inf, ordered)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        ordered = jnp.where((before >= self.top_p) & (place > 0), -jnp.inf, ordered)
        places = self._noted(jax.vmap(jax.random.categorical)(keys, ordered), ordered)

        def token(place: Array) -> Array:
            return jnp.take_along_axis(order, place.reshape(len(order), -1), axis=-1)

        top = None if places.top_tokens is None else token(places.top_tokens)
        return replace(places, tokens=token(places.tokens)[:, 0], top_tokens=top)

    def _noted(self, tokens: Int[Array, " r"], logits: Float[Array, "r vocab"]) -> Chosen:
        tokens = tokens.astype(jnp.int32)
        scores = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        chosen = Chosen(tokens=tokens, scores=scores)
        if self.logprobs is None:
            return chosen
        return with_logprobs(chosen, jax.nn.log_softmax(logits, axis=-1), self.logprobs)


def check_sampling(temperature: float, top_k: Any, top_p: float, answers: int) -> None:
    """Raises ValueError for numbers out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is 0 (greedy) or above, got {temperature}")
    if top_k != int(top_k) or top_k < 0:
        raise ValueError(f"top_k is a number of tokens, or 0 for all of them, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is above 0 and at most 1 (all tokens), got {top_p}")
    if answers < 1:
        raise ValueError(f"num_return_sequences is at least 1, got {answers}")
    if answers > 1 and temperature == 0:
        raise ValueError(
            f"num_return_sequences is {answers}, but greedy answers to a prompt would be the same; "
            "give a temperature"
        )


def check_seeds(seeds: Iterable[Any]) -> None:
    """Raises ValueError for what is no seed."""
    for seed in seeds:
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise ValueError(f"seeds lie between 0 and 2**32 - 1, got {seed!r}")


def sampling(
    batch: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | np.ndarray = 0,
    rules: Rules | None = None,
    answers: int = 1,
    logprobs: int | None = None,
) -> Sampling:
    """Sampling for a batch, with so many `answers` to each prompt; temperature 0 is greedy.

    With one `seed`, answer i of all uses `seed + i`; give a sequence to choose each one's.

    Raises ValueError as `check_sampling` and `check_seeds` do.
    """
    check_sampling(temperature, top_k, top_p, answers)
    given, rows = np.asarray(seed, object), batch * answers
    seeds = (given + np.arange(rows) if given.ndim == 0 else given).tolist()
    if len(seeds) != rows:
        raise ValueError(f"one seed per answer is wanted ({rows}), got {len(seeds)}")
    check_seeds(seeds)
    return Sampling(
        rows=answers,
        is_greedy=temperature == 0,
        is_filtered=temperature > 0 and (top_k > 0 or top_p < 1),
        # float32 has no smaller number to divide by, int32 no larger one
        temperature=jnp.asarray(max(temperature or 1.0, 1e-37), jnp.float32),
        top_k=jnp.asarray(min(int(top_k), 2**31 - 1), jnp.int32),
        top_p=jnp.asarray(top_p, jnp.float32),
        seeds=jnp.asarray(np.asarray(seeds, np.uint32)),
        rules=rules or Rules.of(),
        logprobs=logprobs,
    )
