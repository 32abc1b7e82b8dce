"""Choosing tokens, against transformers' logits processors and by frequency."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from catp_jax.generation.sampling import Sampling, sampling

DRAWS = 4000
pick = jax.jit(lambda choice, logits, step: choice.choose(logits, step).tokens)
unchecked = inspect.unwrap(sampling)  # as a user calls it, without our checks of types


def draw(choice: Sampling, logits: np.ndarray, step: int = 0) -> np.ndarray:
    """One token for each row; a single row of logits serves all."""
    rows = np.broadcast_to(logits, (len(choice.seeds), logits.shape[-1]))
    return np.asarray(pick(choice, jnp.asarray(rows, jnp.float32), jnp.asarray(step, jnp.int32)))


def transformers_shares(logits: np.ndarray, temperature: float, top_k: int, top_p: float):
    """Probabilities as transformers' `generate` draws from."""
    scores = torch.from_numpy(logits[None].astype(np.float32))
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(-1)[0].numpy()


def test_greedy_is_the_first_largest():
    logits = np.random.default_rng(0).normal(size=(9, 50))
    logits[3, [4, 7]] = 9
    tokens = draw(sampling(9), logits)
    assert tokens.tolist() == logits.argmax(axis=1).tolist()
    assert tokens[3] == 4
    assert tokens.dtype == np.int32


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}])
def test_one_token_left_is_greedy(options: dict):
    logits = np.random.default_rng(1).normal(size=(200, 30))
    tokens = draw(sampling(200, temperature=3.0, **options), logits)
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-45])
def test_hardly_any_temperature_is_greedy(temperature: float):
    logits = np.random.default_rng(2).normal(size=(50, 30)) * 10
    tokens = draw(sampling(50, temperature=temperature), logits)
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 12, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.05])
def test_tokens_come_from_transformers_set_with_its_shares(
    temperature: float, top_k: int, top_p: float
):
    logits = np.random.default_rng(3).normal(size=12) * 1.5
    choice = sampling(DRAWS, temperature=temperature, top_k=top_k, top_p=top_p, seed=7)
    counts = np.bincount(draw(choice, logits), minlength=12)
    shares = transformers_shares(logits, temperature, top_k, top_p)
    assert not counts[shares == 0].any()
    spread = np.sqrt(DRAWS * shares * (1 - shares))
    assert (np.abs(counts - DRAWS * shares) <= 5 * spread + 1e-9).all()


def test_top_k_takes_exactly_k_of_equals_by_lower_index():
    # transformers would keep all three that share the last place
    logits = np.asarray([1.0, 0.0, 2.0, 1.0, 1.0])
    choice = sampling(DRAWS, temperature=1.0, top_k=2)
    assert set(draw(choice, logits).tolist()) == {2, 0}
    assert np.count_nonzero(transformers_shares(logits, 1.0, 2, 1.0)) == 4


def test_top_p_takes_the_fewest_of_equals_that_reach_it_by_lower_index():
    logits = np.zeros(8)
    choice = sampling(DRAWS, temperature=1.0, top_p=0.5)
    assert set(draw(choice, logits).tolist()) == {0, 1, 2, 3}
    assert np.count_nonzero(transformers_shares(logits, 1.0, 0, 0.5)) == 4


def test_a_row_draws_alone_what_it_draws_in_a_batch():
    logits = np.random.default_rng(4).normal(size=(6, 40))
    options = {"temperature": 1.5, "top_k": 30, "top_p": 0.95}
    for step in (0, 5):
        together = draw(sampling(6, seed=100, **options), logits, step)
        for row in range(6):
            alone = draw(sampling(1, seed=100 + row, **options), logits[row], step)
            assert alone.tolist() == [together[row]]
        order = [5, 2, 0, 1, 4, 3]
        shuffled = sampling(6, seed=[100 + row for row in order], **options)
        assert draw(shuffled, logits[order], step).tolist() == together[order].tolist()


def test_the_same_seed_repeats_and_another_seed_or_step_does_not():
    logits = np.zeros(1000)
    first = draw(sampling(20, temperature=1.0, seed=1), logits)
    assert first.tolist() == draw(sampling(20, temperature=1.0, seed=1), logits).tolist()
    assert first.tolist() != draw(sampling(20, temperature=1.0, seed=50), logits).tolist()
    assert first.tolist() != draw(sampling(20, temperature=1.0, seed=1), logits, 1).tolist()
    assert len(set(first.tolist())) > 15


def test_bfloat16_logits_are_sampled_in_float32():
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(50, 30)), jnp.bfloat16)
    choice = sampling(50, temperature=1.0, top_p=0.9)
    step = jnp.asarray(0, jnp.int32)
    same = pick(choice, logits.astype(jnp.float32), step)
    np.testing.assert_array_equal(pick(choice, logits, step), same)


def test_other_numbers_reuse_the_program():
    fresh = jax.jit(lambda choice, logits, step: choice.choose(logits, step).tokens)
    logits = jnp.zeros((3, 10))
    for temperature, top_k, top_p, seed in [(0.5, 0, 0.9, 0), (2.0, 7, 0.1, 9), (1.0, 3, 1.0, 4)]:
        choice = sampling(3, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        fresh(choice, logits, jnp.asarray(seed, jnp.int32))
    assert fresh._cache_size() == 1
    fresh(sampling(3), logits, jnp.asarray(0, jnp.int32))
    assert fresh._cache_size() == 2


def test_without_top_k_and_top_p_nothing_is_sorted():
    logits, step = jnp.zeros((3, 10)), jnp.asarray(0, jnp.int32)
    program = jax.jit(lambda choice: choice.choose(logits, step).tokens)
    assert "sort" not in program.lower(sampling(3, temperature=0.5)).as_text()
    assert "sort" in program.lower(sampling(3, temperature=0.5, top_k=4)).as_text()


def test_seeds_may_come_as_numpy_numbers():
    assert unchecked(3, temperature=1.0, seed=np.int64(5)).seeds.tolist() == [5, 6, 7]
    assert unchecked(2, temperature=1.0, seed=np.asarray([9, 4])).seeds.tolist() == [9, 4]
    assert sampling(1, temperature=1.0, seed=2**32 - 1).seeds.tolist() == [2**32 - 1]


def test_more_than_the_vocabulary_is_all_of_it():
    choice = sampling(DRAWS, temperature=1.0, top_k=10**12)
    assert len(set(draw(choice, np.zeros(8)).tolist())) == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"seed": -1}, "seeds lie between"),
        ({"seed": 2**32}, "seeds lie between"),
        ({"seed": 2**32 - 1}, "seeds lie between"),  # row 1 would have 2**32
        ({"seed": [1]}, r"one seed per answer is wanted \(2\), got 1"),
        ({"seed": [1, 2, 3]}, "got 3"),
        ({"seed": []}, "got 0"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        unchecked(2, **options)
