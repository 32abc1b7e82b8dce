"""What a user asks of a generation: numbers out of range and what excludes each other."""

import inspect
from typing import Any

import numpy as np
import pytest

from catp_jax.generation.beam import Beams
from catp_jax.generation.options import Options
from catp_jax.generation.sampling import Sampling
from catp_jax.pruning import named as by_name

# as a user calls them, without our checks of types
unchecked: Any = inspect.unwrap(Options)
limits, named = inspect.unwrap(by_name.limits), inspect.unwrap(by_name.named)


def test_defaults_are_greedy():
    how = Options().decoding(3)
    assert isinstance(how, Sampling)
    assert (how.is_greedy, how.rows, how.seeds.tolist()) == (True, 1, [0, 1, 2])


def test_beams_and_samples_have_rows_of_their_own():
    search = Options(num_beams=4, num_return_sequences=2, length_penalty=0.0).decoding(3)
    assert isinstance(search, Beams)
    assert (search.rows, search.num_answers) == (4, 2)
    samples = Options(num_return_sequences=2, temperature=1.0, seed=5).decoding(3)
    assert (samples.rows, samples.seeds.tolist()) == (2, [5, 6, 7, 8, 9, 10])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is a whole number, got 2.5"),
        ({"num_beams": 2.0}, "num_beams is a whole number"),
        ({"num_beams": 0, "temperature": 1.0}, "num_beams is at least 1"),
        ({"num_return_sequences": True}, "num_return_sequences is a whole number"),
        ({"num_return_sequences": 0}, "num_return_sequences is at least 1"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2, but greedy answers"),
        ({"num_return_sequences": 3, "num_beams": 2}, "2 beams find 1 to 2 answers"),
        ({"min_new_tokens": 9, "max_new_tokens": 2}, r"at most max_new_tokens \(2\), got 9"),
        ({"temperature": -1.0}, "temperature is 0"),
        ({"top_k": -1}, "top_k is a number of tokens"),
        ({"num_beams": 2, "top_p": 0.5}, "beam search draws nothing"),
        ({"length_penalty": 0.5}, "require num_beams of 2 or more"),
        ({"early_stopping": "first"}, "require num_beams of 2 or more"),
    ],
)
def test_options_that_cannot_be_are_refused_as_they_are_made(given: dict, says: str):
    with pytest.raises(ValueError, match=says):
        unchecked(**given)


@pytest.mark.parametrize(
    ("keep", "says"),
    [(0.5, "a percentage such as 50%; got 0.5"), ([0.5], "got 0.5"), (-1, "got -1"), ([], "got 1")],
)
def test_budgets_that_cannot_be_are_refused(keep: Any, says: str):
    with pytest.raises(ValueError, match=says):
        named("fastv", keep)


def test_counts_may_be_numpys():
    assert limits(named("fastv", np.int64(8)), 32) == [8]
    assert limits(named(["l2", "fastv"], ["50%", 3]), 9) == [5, 3]
    assert limits(named("fastv", 8), 0) == [0]


def test_a_text_names_several_methods_and_budgets_separated_by_commas():
    assert named("l2, fastv:layer=3", "50%,3") == (("l2", "50%"), ("fastv:layer=3", "3"))
    assert named("trimmed_llama:k_ratio=0.5", "auto") == (("trimmed_llama:k_ratio=0.5", "auto"),)
    with pytest.raises(ValueError, match="got 2 methods and 1 budgets"):
        named("l2,fastv", "50%")
    with pytest.raises(ValueError, match="got 1 methods and 2 budgets"):
        named("l2", "50%,8")
    with pytest.raises(ValueError, match="unknown pruning method ''"):
        named("l2,", "50%,8")
    with pytest.raises(ValueError, match="got ''"):
        named("l2,fastv", "50%,")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": -1}, "seeds lie between"),
        ({"seed": "x"}, "seeds lie between"),
        ({"seed": None}, "seeds lie between"),
        ({"seed": [0, 2**32]}, "seeds lie between"),
        ({"stop_strings": None}, "stop_strings are texts, and none is empty; got None"),
        ({"stop_strings": 3}, "stop_strings are texts, and none is empty; got 3"),
        ({"stop_strings": ["a", 3]}, "stop_strings are texts"),
        ({"suppress_tokens": 5}, "suppress_tokens is a list of token numbers, got 5"),
        ({"begin_suppress_tokens": "a"}, "begin_suppress_tokens is a list of token numbers"),
        ({"forced_eos_token_id": "a"}, "forced_eos_token_id has token numbers, from 0 up"),
        ({"bad_words": 3}, "bad_words is a list of words, got 3"),
        ({"bad_words_ids": 5}, "bad_words_ids is a list of lists of tokens, got 5"),
        ({"num_beams": 2, "early_stopping": []}, "early_stopping is"),
        ({"bad_words_ids": [5]}, "each of bad_words_ids is a list of token numbers, got 5"),
        ({"temperature": "0.5"}, "temperature is a number"),
        ({"temperature": True}, "temperature is a number, got True"),
        ({"temperature": 0.5, "top_p": None}, "top_p is a number"),
        ({"repetition_penalty": False}, "repetition_penalty is a number"),
        ({"num_beams": 2, "length_penalty": True}, "length_penalty is a number"),
        ({"stop_strings": "x" * 1001}, "1000 bytes at most"),
        ({"top_k": 5}, "give a temperature"),
        ({"top_p": 0.5}, "give a temperature"),
    ],
)
def test_what_is_no_option_is_a_value_error_before_any_model_is_loaded(options, said):
    with pytest.raises(ValueError, match=said):
        inspect.unwrap(Options)(**options)


def test_a_record_of_options_is_plain_and_makes_no_array(monkeypatch):
    monkeypatch.setattr("jax.numpy.asarray", lambda *_, **__: pytest.fail("an array was made"))
    words = {"bad_words_ids": [[1, 2]], "suppress_tokens": [3], "forced_eos_token_id": 4}
    assert Options(temperature=0.5, **words).over(num_beams=3).num_beams == 3


@pytest.mark.parametrize(
    ("defaults", "given"),
    [
        ({"temperature": 0.6, "num_return_sequences": 2}, {"temperature": 0.0}),
        ({"num_beams": 4, "num_return_sequences": 4}, {"num_beams": 1}),
    ],
)
def test_greedy_has_one_answer_whatever_the_defaults(defaults, given):
    assert Options(**defaults).over(**given) == Options()
