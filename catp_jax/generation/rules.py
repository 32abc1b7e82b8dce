"""What may be written: rules that change the logits before a token is chosen, in transformers'
order.

    repetition penalty → no repeated n-grams → bad words → not too early an end → forced end →
    suppressed tokens → suppressed first tokens

Each of transformers' logits processors is a step of `Rules.__call__`; sampling and beam search
apply the same ones. A rule that is off is not in the program; the numbers of one that is on are
array leaves, so that other values compile nothing. Only the size of an n-gram is part of the
program, and how much room there is for words and tokens.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from catp_jax.generation.buckets import TOKEN_COUNTS, round_up
from catp_jax.generation.decoding import Stop
from catp_jax.struct import pytree, static

NONE = -1  # in place of a token where there is none


@pytree
class Rules:
    """Rules for all answers of a batch.

    `before` are the tokens in front of each answer, as far as rules look at them: a prompt's, image
    placeholders included, for an encoder-decoder what its decoder began with. They end where the
    answer begins. Padding never counts; in transformers it does for n-grams.
    """

    ngram_size: int = static(default=0)
    min_new_tokens: Int[Array, ""]
    penalty: Float[Array, ""] | None = None
    bad_words: Int[Array, "w length"] | None = None
    forced_ends: Int[Array, " e"] | None = None
    suppressed: Int[Array, " s"] | None = None
    suppressed_first: Int[Array, " first"] | None = None
    before: Int[Array, "b p"] | None = None

    @classmethod
    def of(
        cls,
        *,
        min_new_tokens: int = 0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        bad_words_ids: Sequence[Sequence[int]] = (),
        forced_eos_token_id: Sequence[int] = (),
        suppress_tokens: Sequence[int] = (),
        begin_suppress_tokens: Sequence[int] = (),
        before: Sequence[Sequence[int]] | None = None,
    ) -> "Rules":
        """Rules from numbers, named as in transformers, in which `before` is the prompts' tokens.

        Raises ValueError as `check_rules` does.
        """
        check_rules(
            min_new_tokens=min_new_tokens,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            bad_words_ids=bad_words_ids,
            forced_eos_token_id=forced_eos_token_id,
            suppress_tokens=suppress_tokens,
            begin_suppress_tokens=begin_suppress_tokens,
        )
        return cls(
            ngram_size=no_repeat_ngram_size,
            min_new_tokens=jnp.asarray(min_new_tokens, jnp.int32),
            penalty=None
            if repetition_penalty == 1
            else jnp.asarray(repetition_penalty, jnp.float32),
            bad_words=_words(bad_words_ids) if len(bad_words_ids) else None,
            forced_ends=_tokens(forced_eos_token_id),
            suppressed=_tokens(suppress_tokens),
            suppressed_first=_tokens(begin_suppress_tokens),
            before=None if before is None else _ending_together(before),
        )

    def __call__(
        self,
        logits: Float[Array, "r vocab"],
        written: Int[Array, "r new"],
        number: Int[Array, ""],
        stop: Stop,
    ) -> Float[Array, "r vocab"]:
        """Logits, or log-probabilities, in float32, -inf for what must not be written next.

        `number` tokens of each answer are `written`. Rows are those of a prompt in succession.
        """
        logits = logits.astype(jnp.float32)
        if self.penalty is not None:
            seen = _marked(logits, self._seen(written, number))
            penalised = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = jnp.where(seen, penalised, logits)
        if self.ngram_size:
            logits = _forbidden(logits, self._ends_of_ngrams(written, number))
        if self.bad_words is not None:
            logits = _forbidden(logits, self._ends_of_words(written, number, stop))
        ends = stop.is_end(jnp.arange(logits.shape[-1], dtype=jnp.int32))
        logits = jnp.where((ends & (number < self.min_new_tokens))[None], -jnp.inf, logits)
        if self.forced_ends is not None:
            forced = jnp.where(_marked(logits, self.forced_ends[None]), 0.0, -jnp.inf)
            logits = jnp.where(number == stop.max_new_tokens - 1, forced, logits)
        if self.suppressed is not None:
            logits = _forbidden(logits, self.suppressed[None])
        if self.suppressed_first is not None:
            at_first = jnp.where(number == 0, self.suppressed_first, NONE)
            logits = _forbidden(logits, at_first[None])
        return logits

    def _seen(self, written: Int[Array, "r new"], number: Int[Array, ""]) -> Int[Array, "r seen"]:
        """What stands in front of the next token, NONE around it. It is as long as it can get."""
        place = jnp.arange(written.shape[1], dtype=jnp.int32)
        written = jnp.where((place < number)[None], written, NONE)
        if self.before is None:
            return written
        rows = written.shape[0] // self.before.shape[0]
        return jnp.concatenate([jnp.repeat(self.before, rows, axis=0), written], axis=1)

    def _last(
        self, seen: Int[Array, "r seen"], written: Int[Array, "r new"], number: Array, length: int
    ) -> Int[Array, "r last"]:
        """The last `length` tokens in front of the next one."""
        front = jnp.full((seen.shape[0], length), NONE)  # else a short text is cut off
        next_place = seen.shape[1] - written.shape[1] + number
        return jax.lax.dynamic_slice_in_dim(
            jnp.concatenate([front, seen], axis=1), next_place, length, axis=1
        )

    def _ends_of_ngrams(
        self, written: Int[Array, "r new"], number: Int[Array, ""]
    ) -> Int[Array, "r places"]:
        """For each n-gram that stands there and begins as the next one must: its last token."""
        begun, seen = self.ngram_size - 1, self._seen(written, number)
        if seen.shape[1] <= begun:
            return jnp.full((seen.shape[0], 1), NONE)
        last = self._last(seen, written, number, begun)
        ends = seen[:, begun:]
        is_same = ends != NONE
        for place in range(begun):
            window = seen[:, place : place + ends.shape[1]]
            is_same &= (window == last[:, place, None]) & (window != NONE)
        return jnp.where(is_same, ends, NONE)

    def _ends_of_words(
        self, written: Int[Array, "r new"], number: Int[Array, ""], stop: Stop
    ) -> Int[Array, "r w"]:
        """For each bad word that stands there up to its last token: that token. An end token
        alone is no word.
        """
        words = jnp.asarray(self.bad_words)
        begun, ends = words[:, :-1], words[:, -1]
        last = self._last(self._seen(written, number), written, number, begun.shape[1])
        is_begun = ((begun[None] == last[:, None]) | (begun == NONE)[None]).all(axis=-1)
        is_alone = (begun == NONE).all(axis=-1)
        return jnp.where(is_begun & ~(is_alone & stop.is_end(ends))[None], ends[None], NONE)


def _marked(logits: Float[Array, "r vocab"], tokens: Int[Array, "rows k"]) -> Array:
    """Where `tokens` are among the columns of logits, NONE apart; one row of tokens serves all."""
    vocab = logits.shape[-1]
    tokens = jnp.where(tokens == NONE, vocab, tokens)
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    marks = jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].set(True, mode="drop")
    return jnp.broadcast_to(marks, logits.shape)


def _forbidden(logits: Float[Array, "r vocab"], tokens: Int[Array, "rows k"]) -> Array:
    return jnp.where(_marked(logits, tokens), -jnp.inf, logits)


def _ending_together(rows: Sequence[Sequence[int]]) -> Int[Array, "rows length"]:
    """Lists of tokens as one array of few shapes, NONE in front."""
    length = round_up(max(len(row) for row in rows), TOKEN_COUNTS)
    table = np.full((len(rows), length), NONE, np.int32)
    for number, row in enumerate(rows):
        table[number, length - len(row) :] = row
    return jnp.asarray(table)


def _words(words: Sequence[Sequence[int]]) -> Int[Array, "w length"]:
    """Words as an array of few shapes; empty ones in the end are none."""
    return _ending_together([*words, *[()] * (_room(len(words)) - len(words))])


def _tokens(tokens: Sequence[int]) -> Int[Array, " s"] | None:
    """Tokens as an array of few sizes; None if there are none."""
    if not len(tokens):
        return None
    return jnp.asarray([*tokens, *[NONE] * (_room(len(tokens)) - len(tokens))], jnp.int32)


def check_rules(
    *,
    min_new_tokens: int,
    repetition_penalty: float,
    no_repeat_ngram_size: int,
    bad_words_ids: Any,
    forced_eos_token_id: Any,
    suppress_tokens: Any,
    begin_suppress_tokens: Any,
) -> None:
    """Raises ValueError for numbers out of range, and for what is no list of tokens."""
    if min_new_tokens < 0:
        raise ValueError(f"min_new_tokens is at least 0, got {min_new_tokens}")
    if not 0 < repetition_penalty < float("inf"):
        raise ValueError(
            f"repetition_penalty is above 0, and 1 changes nothing; got {repetition_penalty}"
        )
    if no_repeat_ngram_size < 0:
        raise ValueError(
            f"no_repeat_ngram_size is a number of tokens, or 0 to allow repetition; got "
            f"{no_repeat_ngram_size}"
        )
    if not _is_list(bad_words_ids):
        raise ValueError(f"bad_words_ids is a list of lists of tokens, got {bad_words_ids!r}")
    for word in bad_words_ids:
        _check_tokens("each of bad_words_ids", word)
        if not len(word):
            raise ValueError("each of bad_words_ids has at least one token, got an empty one")
    _check_tokens("forced_eos_token_id", forced_eos_token_id)
    _check_tokens("suppress_tokens", suppress_tokens)
    _check_tokens("begin_suppress_tokens", begin_suppress_tokens)


def _check_tokens(name: str, tokens: Any) -> None:
    if not _is_list(tokens):
        raise ValueError(f"{name} is a list of token numbers, got {tokens!r}")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral) or token < 0:
            raise ValueError(f"{name} has token numbers, from 0 up; got {token!r}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _room(number: int) -> int:
    """A power of two."""
    return 2 ** (number - 1).bit_length()
