"""What looks at nothing, or is told what is needed: uniform, oracle, anti."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site
from catp_jax.pruning import Anti, Oracle, Random, Uniform
from catp_jax.struct import replace
from tests.pruning.views import entry_view, kept, random_view, run


def valid_of(view, sample: int) -> list[int]:
    return np.flatnonzero(np.asarray(view.valid[sample])).tolist()


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8, 13])
def test_uniform_is_even_over_what_each_sample_has(keep: int):
    view = random_view(0)
    chosen = run(Uniform(keep=keep, site=Site.CROSS), view)[0].tokens
    for sample in range(5):
        there = valid_of(view, sample)
        got = kept(chosen, sample)
        assert len(got) == min(keep, len(there))
        if not got:
            continue
        places = [there.index(token) for token in got]
        gaps = np.diff([-1, *places])
        assert gaps.max() - gaps.min() <= 1  # as even as whole numbers can be
        assert places[-1] == len(there) - 1


def test_uniform_with_a_limit_is_even_too():
    view = random_view(1)
    limit = jnp.array([6, 2, 1, 3, 1])
    chosen = run(Uniform(keep=6, site=Site.CROSS, limit=limit), view)[0].tokens
    assert kept(chosen, 0) == [2, 4, 6, 8, 10, 12]
    assert [len(kept(chosen, sample)) for sample in (1, 3, 4)] == [2, 3, 1]


def test_uniform_by_hand():
    view = entry_view(0)  # seven queries
    assert kept(run(Uniform(keep=3, site=Site.ENTRY), view)[0].tokens, 0) == [2, 4, 6]


def needed(view, some: dict[int, list[int]]):
    out = np.zeros(view.numbers.shape, np.float32)
    for sample, numbers in some.items():
        out[sample, numbers] = 1
    return jnp.asarray(out)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_oracle_keeps_what_is_needed_and_anti_all_else(seed: int):
    view = random_view(seed)
    some = {0: [4, 7], 1: [1, 2, 3], 3: [0, 9]}
    for keep in (1, 2, 4, 8):
        first = run(Oracle(keep=keep, site=Site.CROSS, needed=needed(view, some)), view)[0].tokens
        last = run(Anti(keep=keep, site=Site.CROSS, needed=needed(view, some)), view)[0].tokens
        for sample, wanted in some.items():
            there = valid_of(view, sample)
            wanted = [token for token in wanted if token in there]
            others = [token for token in there if token not in wanted]
            assert len({*kept(first, sample)} & {*wanted}) == min(keep, len(wanted))
            assert len({*kept(last, sample)} & {*others}) == min(keep, len(others))


def test_a_smaller_budget_of_the_oracle_keeps_a_part_of_a_larger_ones():
    view = random_view(2)
    marks = needed(view, {0: [2, 5]})
    sets = [
        {*kept(run(Oracle(keep=k, site=Site.CROSS, needed=marks, seed=3), view)[0].tokens, 0)}
        for k in range(1, 14)
    ]
    assert all(small <= large for small, large in itertools.pairwise(sets))


def test_where_nothing_is_needed_both_are_random():
    view = random_view(0)
    nothing = needed(view, {})
    random, *bounds = (
        run(pruner, view)[0].tokens
        for pruner in (
            Random(keep=4, site=Site.CROSS, seed=9),
            Oracle(keep=4, site=Site.CROSS, seed=9, needed=nothing),
            Anti(keep=4, site=Site.CROSS, seed=9, needed=nothing),
        )
    )
    for bound in bounds:
        np.testing.assert_array_equal(bound.indices, random.indices)


def test_tokens_are_found_by_their_number_after_another_method():
    view = random_view(0)
    marks = needed(view, {0: [11]})
    moved = replace(view, numbers=view.numbers[:, ::-1])
    assert kept(run(Oracle(keep=1, site=Site.CROSS, needed=marks), moved)[0].tokens, 0) == [1]


@pytest.mark.parametrize("method", [Oracle, Anti])
def test_who_is_not_told_says_so(method):
    with pytest.raises(ValueError, match=f"{method.__name__} must be told which visual tokens"):
        run(method(keep=2, site=Site.CROSS), random_view(0))
