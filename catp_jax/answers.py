"""What comes back for a batch of prompts."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from catp_jax.contract import Keep
from catp_jax.generation.decoding import Written
from catp_jax.readers.reading import Kept


class NonFinite(ValueError):
    """Logits that no token can be chosen from, at the prompts `numbers`; of one alone, if none."""

    def __init__(self, numbers: Sequence[int] = ()):
        self.numbers = numbers
        which = f"prompt {', '.join(map(str, numbers))}: " if numbers else ""
        super().__init__(
            f"{which}the model's logits are not finite, or every token is forbidden; look "
            "at the weights with `catp-jax doctor`, try dtype='float32' if they are float16, or "
            "allow more tokens"
        )


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a batch of prompts got; lists have one entry a prompt, `text` and `tokens` one an
    answer, those of a prompt in succession.

    `text` is without special tokens, `tokens` with them, the end token included. `available` counts
    visual tokens before pruning; `kept` says which were kept (None: all), `cached` which are in the
    cache of a layer that was pruned apart, by the layer's number. If `is_merged`, what is kept are
    means of several tokens, each named by one in the middle of them. `capacity` is the room that
    each prompt's visual tokens take in the other caches.
    `logprobs` are those of the tokens, and `alternatives` the likeliest tokens at each place with
    theirs, the likeliest first; None unless they were asked for, see `sampling` and `beam` for what
    they are of. `reports` has the final state of each pruner, `logits` those of the first new
    token.
    """

    text: list[str]
    tokens: list[list[int]]
    logprobs: list[list[float]] | None
    alternatives: list[list[list[tuple[int, float]]]] | None
    available: tuple[int, ...]
    kept: list[Kept] | None
    cached: dict[int, Keep]
    is_merged: bool
    capacity: int
    reports: tuple[Any, ...]
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How likely the model finds an answer: its `tokens`, the log-probability of each after those
    before it, and whether a greedy answer begins with them.
    """

    tokens: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The answer's log-probability."""
        return sum(self.logprobs)


def likelihoods_of(written: Written, given: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Of each answer that was written as it was given."""
    rows = zip(np.asarray(written.logprobs), np.asarray(written.top_tokens), given, strict=True)
    return [
        Likelihood(
            tokens=list(tokens),
            logprobs=logprobs[: len(tokens)].tolist(),
            is_greedy=likeliest[: len(tokens), 0].tolist() == list(tokens),
        )
        for logprobs, likeliest, tokens in rows
    ]


def logprobs_of(written: Written) -> list[list[float]] | None:
    """Of each answer's tokens."""
    if written.logprobs is None:
        return None
    rows = zip(np.asarray(written.logprobs), written.lengths, strict=True)
    return [row[:length].tolist() for row, length in rows]


def alternatives_of(written: Written) -> list[list[list[tuple[int, float]]]] | None:
    """Of each answer, at each place; without tokens that could not be."""
    if written.top_tokens is None:
        return None
    columns = (np.asarray(array).tolist() for array in (written.top_tokens, written.top_logprobs))
    return [
        [
            [(token, logprob) for token, logprob in zip(*place, strict=True) if logprob > -np.inf]
            for place in itertools.islice(zip(*answer, strict=True), int(length))
        ]
        for *answer, length in zip(*columns, written.lengths, strict=True)
    ]
