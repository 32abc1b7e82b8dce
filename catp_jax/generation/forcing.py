"""Decoding that writes what it is given, to learn how likely the model finds it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from catp_jax.generation.decoding import Chosen, Stop, Written, with_logprobs
from catp_jax.generation.sampling import Drawing
from catp_jax.struct import pytree, static


@pytree
class Forcing:
    """Writes the first `lengths` of the tokens `given` for each prompt, past end tokens too. With
    every token comes its log-probability, and the likeliest token in its place.
    """

    rows: int = static(default=1)
    given: Int[Array, "b new"]
    lengths: Int[Array, " b"]

    def start(self, batch: int, stop: Stop) -> Drawing:
        """No token yet."""
        return Drawing(
            number=jnp.asarray(0, jnp.int32),
            written=Written.start((batch,), stop, 1),
            is_open=jnp.ones(batch, bool),
            is_finite=jnp.ones(batch, bool),
        )

    def advance(
        self, logits: Float[Array, "b vocab"], state: Drawing, stop: Stop
    ) -> tuple[Int[Array, " b"], None, Drawing]:
        """The next token of each answer, padding behind its last one."""
        tokens = jax.lax.dynamic_index_in_dim(self.given, state.number, axis=1, keepdims=False)
        logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        scores = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        chosen = with_logprobs(Chosen(tokens=tokens, scores=scores), logprobs, 1)
        state = Drawing(
            number=state.number + 1,
            written=state.written.extended(chosen, state.number, stop),
            is_open=state.number + 1 < self.lengths,
            is_finite=state.is_finite & (jnp.isfinite(scores) | ~state.is_open),
        )
        return tokens, None, state

    def answers(self, state: Drawing) -> Written:
        """All of them; `lengths` counts padding too."""
        return state.written
