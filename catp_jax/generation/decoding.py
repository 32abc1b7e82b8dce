"""What a way of decoding offers to the one loop: greedy, sampling and beam search are cases of it.

start(batch, stop)             a state without tokens
advance(logits, state, stop)   one token more for every row, and which row each went on from
answers(state)                 the tokens, once the loop has ended
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Int

from catp_jax.struct import pytree, static


@pytree
class Stop:
    """When answers end: at one of `ends`, or after `max_new_tokens`. `pad` follows the end."""

    max_new_tokens: int = static()
    ends: Int[Array, " e"]
    pad: Int[Array, ""]

    def is_end(self, tokens: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether a token ends its answer."""
        return (tokens[..., None] == self.ends.reshape((1,) * tokens.ndim + (-1,))).any(axis=-1)


@runtime_checkable
class Decoding(Protocol):
    """A way of decoding, a frozen pytree; states are pytrees whose every leaf is an array."""

    @property
    def rows(self) -> int:
        """Answers that a prompt has in the making at a time; they share the prompt's cache."""
        ...

    def start(self, batch: int, stop: Stop) -> Any:
        """The state before the first token. Its `number` counts new tokens, `is_open` says which
        answers or prompts still go on.
        """
        ...

    def advance(self, logits: Any, state: Any, stop: Stop) -> tuple[Any, Any, Any]:
        """From logits [r, vocab]: each row's token [r]; the row [r] that it goes on from (None:
        itself); the new state.
        """
        ...

    def answers(self, state: Any) -> Any:
        """All answers' tokens [answers, new], those of a prompt in succession."""
        ...
