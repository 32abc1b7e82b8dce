"""What a way of decoding offers to the one loop: greedy, sampling and beam search are cases of it.

start(batch, stop)             a state without tokens
advance(logits, state, stop)   one token more for every row, and which row each went on from
answers(state)                 what was written, once the loop has ended
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from catp_jax.struct import pytree, replace, static


@pytree
class Stop:
    """When answers end: at one of `ends`, with a stop string, or after `max_new_tokens`. `pad`
    follows the end.

    `strings` is a machine that reads tokens, see `stop_strings`: `strings[state, token]` is the
    next state, and the last state says that a string has been written.
    """

    max_new_tokens: int = static()
    ends: Int[Array, " e"]
    pad: Int[Array, ""]
    strings: Int[Array, "states vocab"] | None = None

    def is_end(self, tokens: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether a token ends its answer."""
        return (tokens[..., None] == self.ends.reshape((1,) * tokens.ndim + (-1,))).any(axis=-1)


@pytree
class Chosen:
    """A token for each row, and its score. Where they were asked for: its log-probability, and the
    likeliest tokens with theirs.
    """

    tokens: Int[Array, "*rows"]
    scores: Float[Array, "*rows"]
    logprobs: Float[Array, "*rows"] | None = None
    top_tokens: Int[Array, "*rows n"] | None = None
    top_logprobs: Float[Array, "*rows n"] | None = None


@pytree
class Written:
    """What each answer has so far, `lengths` tokens of it, padding behind; of each token what
    `Chosen` has. `reading` is the state of `Stop.strings`.
    """

    tokens: Int[Array, "*rows new"]
    lengths: Int[Array, "*rows"]
    reading: Int[Array, "*rows"] | None = None
    logprobs: Float[Array, "*rows new"] | None = None
    top_tokens: Int[Array, "*rows new n"] | None = None
    top_logprobs: Float[Array, "*rows new n"] | None = None

    @classmethod
    def start(cls, rows: tuple[int, ...], stop: Stop, logprobs: int | None) -> "Written":
        """No token yet; with log-probabilities, and of so many of the likeliest tokens, or None."""
        shape = (*rows, stop.max_new_tokens)
        top = (*shape, logprobs) if logprobs else None
        return cls(
            tokens=jnp.full(shape, stop.pad, jnp.int32),
            lengths=jnp.zeros(rows, jnp.int32),
            reading=None if stop.strings is None else jnp.zeros(rows, jnp.int32),
            logprobs=None if logprobs is None else jnp.zeros(shape, jnp.float32),
            top_tokens=None if top is None else jnp.zeros(top, jnp.int32),
            top_logprobs=None if top is None else jnp.zeros(top, jnp.float32),
        )

    def extended(self, chosen: Chosen, number: Int[Array, ""], stop: Stop) -> "Written":
        """With token `number` of each row."""

        def put(array: Array | None, value: Array | None) -> Array | None:
            if array is None or value is None:
                return None
            axis = self.lengths.ndim
            return jax.lax.dynamic_update_index_in_dim(array, value, number, axis)

        reading = self.reading
        if stop.strings is not None:
            reading = stop.strings[reading, chosen.tokens].astype(jnp.int32)
        return Written(
            tokens=put(self.tokens, chosen.tokens),  # type: ignore[arg-type]
            lengths=self.lengths + 1,
            reading=reading,
            logprobs=put(self.logprobs, chosen.logprobs),
            top_tokens=put(self.top_tokens, chosen.top_tokens),
            top_logprobs=put(self.top_logprobs, chosen.top_logprobs),
        )

    def has_ended(self, chosen: Chosen, stop: Stop) -> Bool[Array, "*rows"]:
        """Whether an answer ends with its last token, which is the `chosen` one."""
        ended = stop.is_end(chosen.tokens)
        if stop.strings is None:
            return ended
        return ended | (self.reading == stop.strings.shape[0] - 1)


@runtime_checkable
class Decoding(Protocol):
    """A way of decoding, a frozen pytree; states are pytrees whose every leaf is an array."""

    @property
    def rows(self) -> int:
        """Answers that a prompt has in the making at a time; they share the prompt's cache."""
        ...

    def start(self, batch: int, stop: Stop) -> Any:
        """The state before the first token. Its `number` counts new tokens, `is_open` says which
        answers or prompts still go on, `is_finite` which never had logits that nothing can be
        chosen from: a NaN or an infinite one, or none that the rules allow. Only the chosen tokens'
        scores are looked at, which show all of that.
        """
        ...

    def advance(self, logits: Any, state: Any, stop: Stop) -> tuple[Any, Any, Any]:
        """From logits [r, vocab]: each row's token [r]; the row [r] that it goes on from (None:
        itself); the new state.
        """
        ...

    def answers(self, state: Any) -> Written:
        """All answers, those of a prompt in succession."""
        ...


def with_logprobs(chosen: Chosen, logprobs: Float[Array, "*rows vocab"], number: int) -> Chosen:
    """Tokens with their log-probabilities, and the `number` likeliest with theirs."""
    of_chosen = jnp.take_along_axis(logprobs, chosen.tokens[..., None], axis=-1)[..., 0]
    if not number:
        return replace(chosen, logprobs=of_chosen)
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, number)
    return replace(
        chosen,
        logprobs=of_chosen,
        top_tokens=top_tokens.astype(jnp.int32),
        top_logprobs=top_logprobs,
    )
