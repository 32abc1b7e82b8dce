"""Choosing the next token: greedy, temperature, top-k, top-p.

All numbers are array leaves, so that changing one compiles nothing; only whether the choice is
greedy, and whether tokens are left out at all (which takes a sort), is part of the program.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from catp_jax.generation.decoding import Stop
from catp_jax.struct import pytree, static


@pytree
class Written:
    """Answers in the making: `number` tokens of each are there, `is_open` where none is the end."""

    number: Int[Array, ""]
    tokens: Int[Array, "r new"]
    is_open: Bool[Array, " r"]


@pytree
class Sampling:
    """How to choose. Each answer has a seed of its own, so its tokens don't depend on its
    neighbours. `top_k` 0 and `top_p` 1 leave all tokens in play. No answer ends before it has
    `min_new_tokens`, the end token apart. A prompt gets `rows` answers.
    """

    rows: int = static(default=1)
    is_greedy: bool = static()
    is_filtered: bool = static()
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    seeds: UInt32[Array, " r"]
    min_new_tokens: Int[Array, ""]

    def start(self, batch: int, stop: Stop) -> Written:
        """No token yet."""
        answers = batch * self.rows
        return Written(
            number=jnp.asarray(0, jnp.int32),
            tokens=jnp.full((answers, stop.max_new_tokens), stop.pad, jnp.int32),
            is_open=jnp.ones(answers, bool),
        )

    def advance(
        self, logits: Float[Array, "r vocab"], state: Written, stop: Stop
    ) -> tuple[Int[Array, " r"], None, Written]:
        """One token more for each answer, padding for one that has ended."""
        token = self.pick(logits, state.number, stop.ends)
        token = jnp.where(state.is_open, token, stop.pad)
        tokens = jax.lax.dynamic_update_slice_in_dim(
            state.tokens, token[:, None], state.number, axis=1
        )
        is_open = state.is_open & ~stop.is_end(token)
        return token, None, Written(number=state.number + 1, tokens=tokens, is_open=is_open)

    def answers(self, state: Written) -> Int[Array, "r new"]:
        """All of them."""
        return state.tokens

    def pick(
        self, logits: Float[Array, "r vocab"], step: Int[Array, ""], ends: Int[Array, " e"]
    ) -> Int[Array, " r"]:
        """One token for each row; `step` numbers the new tokens of a generation, from 0."""
        is_end = jnp.zeros(logits.shape[-1], bool).at[ends].set(True)
        logits = jnp.where((is_end & (step < self.min_new_tokens))[None], -jnp.inf, logits)
        if self.is_greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits.astype(jnp.float32)
        logits = (logits - logits.max(axis=-1, keepdims=True)) / self.temperature
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(self.seeds)
        if not self.is_filtered:
            return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        order = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
        ordered = jnp.take_along_axis(logits, order, axis=-1)

        # top-k first, then top-p of what is left, as in transformers
        place = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
        ordered = jnp.where((self.top_k > 0) & (place >= self.top_k), -jnp.inf, ordered)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        ordered = jnp.where((before >= self.top_p) & (place > 0), -jnp.inf, ordered)
        chosen = jax.vmap(jax.random.categorical)(keys, ordered)
        return jnp.take_along_axis(order, chosen[:, None], axis=-1)[:, 0]


def sampling(
    batch: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] | np.ndarray = 0,
    min_new_tokens: int = 0,
    answers: int = 1,
) -> Sampling:
    """Sampling for a batch, with so many `answers` to each prompt; temperature 0 is greedy.

    With one `seed`, answer i of all uses `seed + i`; give a sequence to choose each one's.

    Raises ValueError for numbers out of range.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is 0 (greedy) or above, got {temperature}")
    if top_k != int(top_k) or top_k < 0:
        raise ValueError(f"top_k is a number of tokens, or 0 for all of them, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is above 0 and at most 1 (all tokens), got {top_p}")
    if min_new_tokens < 0:
        raise ValueError(f"min_new_tokens is at least 0, got {min_new_tokens}")
    if answers < 1:
        raise ValueError(f"a prompt gets at least 1 answer, got {answers}")
    if answers > 1 and temperature == 0:
        raise ValueError(
            f"{answers} greedy answers to a prompt would be the same; give a temperature"
        )
    given, rows = np.asarray(seed, object), batch * answers
    seeds = (given + np.arange(rows) if given.ndim == 0 else given).tolist()
    if len(seeds) != rows:
        raise ValueError(f"one seed per answer is wanted ({rows}), got {len(seeds)}")
    if any(number != int(number) or not 0 <= number < 2**32 for number in seeds):
        raise ValueError(f"seeds lie between 0 and 2**32 - 1, got {seeds}")
    return Sampling(
        rows=answers,
        is_greedy=temperature == 0,
        is_filtered=temperature > 0 and (top_k > 0 or top_p < 1),
        # float32 has no smaller number to divide by, int32 no larger one
        temperature=jnp.asarray(max(temperature or 1.0, 1e-37), jnp.float32),
        top_k=jnp.asarray(min(int(top_k), 2**31 - 1), jnp.int32),
        top_p=jnp.asarray(top_p, jnp.float32),
        seeds=jnp.asarray(np.asarray(seeds, np.uint32)),
        min_new_tokens=jnp.asarray(min_new_tokens, jnp.int32),
    )
