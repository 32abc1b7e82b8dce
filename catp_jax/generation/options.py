"""How to generate, as a user says it: one record of plain numbers that checks itself."""

import dataclasses
import numbers
from collections.abc import Sequence

import jax.numpy as jnp

from catp_jax.generation.beam import Beams, EarlyStopping, beams
from catp_jax.generation.decoding import Decoding, Stop
from catp_jax.generation.sampling import Sampling, sampling

WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "num_beams", "num_return_sequences")


@dataclasses.dataclass(frozen=True)
class Options:
    """Temperature 0 is greedy; otherwise answer i draws with `seed + i`, or its entry of `seed`.

    From 2 beams on there is beam search instead, see `beam.Beams`; `length_penalty` and
    `early_stopping` are for that alone. Each prompt gets `num_return_sequences` answers, which
    share its cache; a beam search gives its best ones, the best one first.

    Raises ValueError for a number out of range and for options that exclude each other.
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "heuristic"
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        for name in WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ValueError(f"{name} is a whole number, got {value!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is at least 1, got {self.max_new_tokens}")
        # the rest is checked as it is made
        self._search()
        self._choice(1, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is at most max_new_tokens ({self.max_new_tokens}), got "
                f"{self.min_new_tokens}"
            )
        if self.num_beams > 1 and (self.temperature > 0 or self.top_k > 0 or self.top_p < 1):
            raise ValueError(
                "beam search draws nothing: give num_beams or a temperature (with top_k, top_p), "
                "not both"
            )
        if self.num_beams == 1 and (self.length_penalty, self.early_stopping) != (1, "heuristic"):
            raise ValueError("length_penalty and early_stopping want num_beams of 2 or more")

    def decoding(self, prompts: int) -> Decoding:
        """What chooses the tokens of so many prompts. Raises ValueError if seeds are not theirs."""
        return self._search() if self.num_beams > 1 else self._choice(prompts, self.seed)

    def _search(self) -> Beams:
        return beams(
            self.num_beams,
            length_penalty=self.length_penalty,
            min_new_tokens=self.min_new_tokens,
            early_stopping=self.early_stopping,
            answers=1 if self.num_beams == 1 else self.num_return_sequences,
        )

    def _choice(self, prompts: int, seed: int | Sequence[int]) -> Sampling:
        return sampling(
            prompts,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed,
            min_new_tokens=self.min_new_tokens,
            answers=1 if self.num_beams > 1 else self.num_return_sequences,
        )

    def stop(self, ends: Sequence[int], pad: int) -> Stop:
        """When answers end, for a model with these tokens."""
        return Stop(
            max_new_tokens=self.max_new_tokens,
            ends=jnp.asarray(ends, jnp.int32),
            pad=jnp.asarray(pad, jnp.int32),
        )
