"""How to generate, as a user says it: one record of plain numbers that checks itself."""

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from catp_jax.generation.beam import EarlyStopping, beams, check_beams
from catp_jax.generation.decoding import Decoding, Stop
from catp_jax.generation.rules import Rules, check_rules
from catp_jax.generation.sampling import check_sampling, check_seeds, sampling

STOP_BYTES = 1000  # of all stop strings: each takes a row as long as the vocabulary
FRACTIONS = ("temperature", "top_p", "length_penalty", "repetition_penalty")
WHOLE = (
    *("max_new_tokens", "min_new_tokens", "top_k", "num_beams", "num_return_sequences"),
    "no_repeat_ngram_size",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Temperature 0 is greedy; otherwise answer i draws with `seed + i`, or its entry of `seed`.

    From 2 beams on there is beam search instead, see `beam.Beams`; `length_penalty` and
    `early_stopping` are for that alone. Each prompt gets `num_return_sequences` answers, which
    share its cache; a beam search gives its best ones, the best one first.

    What may be written is said as in transformers, see `rules.Rules`; `bad_words` are texts, of
    which neither the spelling after a space nor the one within a word is written. An answer also
    ends with one of `stop_strings`, which stays in it. `logprobs` asks for the log-probability of
    each token, and of so many of the likeliest ones.

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
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: Sequence[str] = ()
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    forced_eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):
                object.__setattr__(self, name, _frozen(value))
        for name in WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ValueError(f"{name} is a whole number, got {value!r}")
        for name in FRACTIONS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name} is a number, got {value!r}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is at least 1, got {self.max_new_tokens}")
        if self.logprobs is not None and (
            isinstance(self.logprobs, bool)
            or not isinstance(self.logprobs, numbers.Integral)
            or self.logprobs < 0
        ):
            raise ValueError(f"logprobs is a number of tokens, from 0, got {self.logprobs!r}")
        check_rules(**self._rules)
        check_beams(self.num_beams, self._ranked, self.length_penalty, self.early_stopping)
        check_sampling(self.temperature, self.top_k, self.top_p, self._drawn)
        seeds: Any = self.seed if isinstance(self.seed, Sequence) else [self.seed]
        check_seeds(seeds)
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
            raise ValueError("length_penalty and early_stopping require num_beams of 2 or more")
        if not self.temperature and (self.top_k > 0 or self.top_p < 1):
            raise ValueError("top_k and top_p are for drawing; give a temperature above 0")
        if not isinstance(self.stop_strings, Sequence) or not all(
            isinstance(text, str) and text for text in self.strings
        ):
            raise ValueError(
                f"stop_strings are texts, and none is empty; got {self.stop_strings!r}"
            )
        size = sum(len(text.encode(errors="replace")) for text in self.strings)
        if size > STOP_BYTES:
            raise ValueError(f"stop_strings have {STOP_BYTES} bytes at most, got {size}")
        if (
            not isinstance(self.bad_words, Sequence)
            or isinstance(self.bad_words, str)
            or not all(isinstance(word, str) and word.strip() for word in self.bad_words)
        ):
            raise ValueError(f"bad_words is a list of words, got {self.bad_words!r}")

    def over(self, **given: Any) -> "Options":
        """These options as defaults for those that are given. Defaults that do not go with what is
        given are left out. Raises ValueError for what is no option.
        """
        plain = Options()
        if unknown := [name for name in given if name not in vars(plain)]:
            raise ValueError(
                f"{', '.join(unknown)}: no option of generation; there are {', '.join(vars(plain))}"
            )
        defaults = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

        def number(name: str, otherwise: float) -> Any:
            value = given.get(name, otherwise)
            return value if isinstance(value, numbers.Real) else otherwise

        is_greedy = number("temperature", 1) == 0
        if number("num_beams", 1) > 1 or is_greedy:
            excluded = ["temperature", "top_k", "top_p"]
        elif number("temperature", 0) > 0 or number("top_k", 0) > 0 or number("top_p", 1) < 1:
            excluded = ["num_beams", "length_penalty", "early_stopping"]
        else:
            excluded = []
        if number("num_beams", 2) == 1:
            excluded += ["num_beams", "length_penalty", "early_stopping"]
        rest = {name: value for name, value in defaults.items() if name not in excluded}
        left = {**rest, **given}
        if not (left.get("temperature") or left.get("num_beams", 1) != 1):
            rest.pop("num_return_sequences", None)  # greedy answers would be the same
        if "min_new_tokens" in rest:
            most = number("max_new_tokens", self.max_new_tokens)
            rest["min_new_tokens"] = min(rest["min_new_tokens"], most)
        return Options(**{**rest, **given})

    @property
    def strings(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else (*self.stop_strings,)

    def check_vocabulary(self, size: int) -> None:
        """Raises ValueError for a token that a model with so many does not have."""
        named = {
            "suppress_tokens": self.suppress_tokens,
            "begin_suppress_tokens": self.begin_suppress_tokens,
            "forced_eos_token_id": self._forced,
            "bad_words_ids": [token for word in self.bad_words_ids for token in word],
        }
        for name, tokens in named.items():
            if (highest := max(tokens, default=0)) >= size:
                raise ValueError(f"{name} has token {highest}; this model has {size} tokens")
        if self.logprobs is not None and self.logprobs > size:
            raise ValueError(f"logprobs is {self.logprobs}; this model has {size} tokens")

    @property
    def _forced(self) -> Sequence[int]:
        forced = self.forced_eos_token_id
        return () if forced is None else np.atleast_1d(forced).tolist()

    @property
    def reads_prompts(self) -> bool:
        """Whether what may be written depends on the prompts' tokens."""
        has_words = any(len(word) > 1 for word in self.bad_words_ids)
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0 or has_words

    @property
    def _rules(self) -> dict[str, Any]:
        """What may be written."""
        return {
            "min_new_tokens": self.min_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "bad_words_ids": self.bad_words_ids,
            "forced_eos_token_id": self._forced,
            "suppress_tokens": self.suppress_tokens,
            "begin_suppress_tokens": self.begin_suppress_tokens,
        }

    @property
    def _ranked(self) -> int:
        """Answers of a beam search to a prompt."""
        return 1 if self.num_beams == 1 else self.num_return_sequences

    @property
    def _drawn(self) -> int:
        """Answers to a prompt that are not a beam search's."""
        return 1 if self.num_beams > 1 else self.num_return_sequences

    def decoding(self, prompts: int, before: Sequence[Sequence[int]] | None = None) -> Decoding:
        """What chooses the tokens of so many prompts, with their tokens (see `Rules`). Raises
        ValueError if seeds are not theirs.
        """
        rules = Rules.of(**self._rules, before=before)
        if self.num_beams > 1:
            return beams(
                self.num_beams,
                length_penalty=self.length_penalty,
                rules=rules,
                early_stopping=self.early_stopping,
                answers=self._ranked,
                logprobs=self.logprobs,
            )
        return sampling(
            prompts,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            rules=rules,
            answers=self._drawn,
            logprobs=self.logprobs,
        )

    def stop(self, ends: Sequence[int], pad: int, strings: Any = None) -> Stop:
        """When answers end, for a model with these tokens; `strings` is the machine that finds the
        stop strings.
        """
        return Stop(
            max_new_tokens=self.max_new_tokens,
            ends=jnp.asarray(ends, jnp.int32),
            pad=jnp.asarray(pad, jnp.int32),
            strings=None if strings is None else jnp.asarray(strings),
        )


def _frozen(value: Any) -> Any:
    """Lists as tuples: what is equal is one record, however it was said."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
