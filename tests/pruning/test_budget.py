"""Counts and percentages, good and bad."""

import inspect
import math
from fractions import Fraction

import pytest

from catp_jax.pruning import budget


@pytest.mark.parametrize(
    ("keep", "available", "count"),
    [
        (1, 1, 1),
        (64, 64, 64),
        ("64", 260, 64),
        (" 64 ", 260, 64),
        ("+3", 10, 3),
        ("50%", 260, 130),
        ("50 %", 260, 130),
        ("100%", 7, 7),
        ("0.5%", 1000, 5),
        ("12.5%", 80, 10),
        ("1%", 260, 3),  # 2.6 rounded up
        ("0.0001%", 260, 1),
        ("0.00000000001%", 260, 1),  # above zero, so one
        ("33.3%", 1000, 333),
    ],
)
def test_counts_and_percentages(keep, available: int, count: int):
    assert budget.count(keep, available) == count


def test_percentages_round_up_exactly():
    for available in (1, 3, 7, 65, 260, 1601, 6404, 32020):
        for percent in ("1", "5", "10", "15", "29", "33.3", "57", "58", "99.9", "100"):
            exact = math.ceil(Fraction(percent) * available / 100)
            assert budget.count(f"{percent}%", available) == exact


def test_nothing_of_nothing_is_nothing():
    assert budget.count("50%", 0) == 0


@pytest.mark.parametrize(
    "keep",
    [
        0, -1, "0", "-1", "0%", "0.0%", "-5%", "101%", "150%", "abc", "abc%", "", " ", "%", "1.5",
        1.5, 0.5, "1e2", "5%%", "50%x", "5 0", "nan", "nan%", "inf", None, True, [], 64.0,
    ],
)  # fmt: skip
def test_what_is_no_budget_is_refused_with_what_is(keep):
    parse = inspect.unwrap(budget.parse)  # as a user calls it, without our checks of types
    with pytest.raises(
        ValueError, match="count of at least 1 or a percentage such as 50%"
    ) as error:
        parse(keep)
    assert repr(keep) in str(error.value)


@pytest.mark.parametrize("keep", [261, "261", 10**9])
def test_more_than_there_is_keeps_what_there_is(keep):
    assert budget.count(keep, 260) == 260


@pytest.mark.parametrize("keeps", [[261], ["261"], ["100%", 10**9], ["50%", 131], [8, "9"]])
def test_more_than_any_prompt_can_have_is_refused_with_what_that_is(keeps):
    most = {8: 8, "50%": 130}.get(keeps[0], 260)
    with pytest.raises(ValueError, match=f"only {most} visual tokens; give 1 to {most}"):
        budget.check(keeps, 260)


def test_where_a_prompt_may_have_any_number_only_a_budget_before_is_a_bound():
    budget.check([10**9, "50%", 5 * 10**8], None)
    budget.check(["50%", 10**9], None)
    with pytest.raises(ValueError, match="only 64 visual tokens"):
        budget.check(["50%", 64, 65], None)


@pytest.mark.parametrize("available", [1, 5, 8, 80, 6404])
def test_capacities_are_few_and_end_at_all(available: int):
    sizes = budget.capacities(available)
    assert len(sizes) <= 8
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] >= 1
    assert sizes[-1] == available
    # what rounding up wastes is at most an eighth of the axis
    gaps = [high - low for low, high in zip((0, *sizes), sizes, strict=False)]
    assert max(gaps) <= math.ceil(available / 8)
