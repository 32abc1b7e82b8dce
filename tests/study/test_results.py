"""The statistics behind a study's figures, against slow oracles and cases worked by hand."""

import itertools

import numpy as np
import pytest

from catp_jax.study.records import Answer, Cost, Setting, SettingCost
from catp_jax.study.results import (
    estimates,
    interval,
    intervals,
    is_random,
    kl_divergence,
    mean_over,
    median_and_spread,
    pooled,
    result_of,
    without_seed,
)


def exact_interval(groups):
    """The 2.5 and 97.5 % points over every way to draw as many images as there are."""
    means = []
    for drawn in itertools.product(groups, repeat=len(groups)):
        scores = [score for group in drawn for score in group]
        means.append(sum(scores) / len(scores))
    return np.percentile(means, [2.5, 97.5])


@pytest.mark.parametrize(
    "groups",
    [
        [[1.0], [0.0], [1.0], [1.0], [0.0], [1.0]],
        [[1.0, 1.0, 0.9], [0.0], [0.3, 0.6], [1.0], [0.0, 1.0], [0.6]],
    ],
)
def test_interval_agrees_with_every_draw_counted_out(groups):
    scores = [score for group in groups for score in group]
    images = [10 * number for number, group in enumerate(groups) for _ in group]
    low, high = interval(scores, images, draws=20_000)
    wanted = exact_interval(groups)
    np.testing.assert_allclose([low, high], wanted, atol=0.02)


def test_interval_of_many_single_questions_is_the_textbooks():
    scores = np.random.default_rng(0).random(1000) < 0.8
    low, high = interval(scores.astype(float).tolist(), list(range(1000)))
    half = 1.96 * np.sqrt(scores.mean() * (1 - scores.mean()) / 1000)
    np.testing.assert_allclose([low, high], [scores.mean() - half, scores.mean() + half], atol=3e-3)


def test_questions_about_one_image_stand_or_fall_together():
    scores = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0] * 10
    alone = interval(scores, list(range(80)))
    together = interval(scores, [number // 4 for number in range(80)])
    assert together[1] - together[0] > 1.7 * (alone[1] - alone[0])


def test_interval_is_the_seeds_and_does_not_depend_on_the_images_names():
    scores, images = [1.0, 0.0, 1.0, 1.0, 0.0], [0, 0, 1, 2, 3]
    assert interval(scores, images, seed=3) == interval(scores, images, seed=3)
    assert interval(scores, images, seed=3) == interval(scores, [5, 5, 70, 800, 9000], seed=3)
    assert interval([1.0] * 4, [0, 1, 2, 3]) == (1.0, 1.0)


def test_divergence_is_that_of_the_definition():
    logits = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    other = np.array([[3.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    p, q = (np.exp(x[0]) / np.exp(x[0]).sum() for x in (logits, other))
    expected = [sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), 0.0]
    np.testing.assert_allclose(kl_divergence(logits, other), expected, rtol=1e-12)


def test_divergence_of_far_apart_logits_is_finite():
    far = kl_divergence(np.array([[1000.0, 0.0]]), np.array([[0.0, 1000.0]]))
    assert far == pytest.approx([1000.0])


def test_spread_is_half_the_interquartile_range():
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 1.0)


def answers(scores, shares, images, text="x"):
    return tuple(
        Answer(f"{n}", text, score, score / 2, image, 8, (0,), needed=share)
        for n, (score, share, image) in enumerate(zip(scores, shares, images, strict=True))
    )


def result(method, some, keep=2):
    cost = SettingCost(Setting(method, keep), (), Cost(1, 1.0))
    return result_of(cost, some, some, [], 3, {}, {}).with_answers(some, cost.cost)


def test_the_mean_of_several_draws_is_that_of_every_question():
    one = answers([1.0, 1.0], [0.5, 0.5], [0, 1])
    other = answers([0.0, 0.0], [None, 0.0], [0, 1], "y")
    mean = mean_over([one, other])
    assert [answer.score for answer in mean] == [0.5, 0.5]
    assert [answer.kl for answer in mean] == [0.25, 0.25]
    assert [answer.needed for answer in mean] == [0.5, 0.25]
    assert [answer.image for answer in mean] == [0, 1]


@pytest.mark.parametrize(
    ("method", "without"),
    [
        ("random", "random"),
        ("random:seed=7", "random"),
        ("l2,random:seed=7", "l2,random"),
        ("x:seed=1:layer=2", "x:layer=2"),
        ("catp:layers=1", "catp:layers=1"),
    ],
)
def test_seeds_are_left_out_of_names(method, without):
    assert without_seed(method) == without


def test_seeds_are_one_result_whose_interval_is_of_the_images():
    dice = np.random.default_rng(0)
    images = [n // 2 for n in range(10)]
    draws = [dice.integers(0, 2, 10).astype(float) for _ in range(3)]
    names = ("random", "random:seed=1", "random:seed=2")
    results = [
        result(name, answers(scores, [None] * 10, images))
        for name, scores in zip(names, draws, strict=True)
    ]
    alone = result("random", answers(draws[0], [None] * 10, images), keep=4)
    mean, other = pooled([*results, alone])
    assert mean.setting == Setting("random, 3 seeds", 2)
    assert other is alone
    every = np.mean(draws, axis=0)
    assert mean.accuracy == pytest.approx(every.mean())
    assert (mean.low, mean.high) == pytest.approx(interval(every, images, seed=3))
    assert mean.kl == pytest.approx(every.mean() / 2)
    assert is_random(mean.setting.method)
    assert is_random("random:seed=3")
    assert not is_random("random,l2")


def test_columns_that_are_not_numbers_everywhere_are_means_of_what_is():
    """Against a slow bootstrap that draws the same images."""
    dice = np.random.default_rng(1)
    images = np.repeat(np.arange(12), 3)
    columns = dice.random((36, 2))
    columns[dice.random((36, 2)) < 0.4] = np.nan
    low, high = intervals(columns, images.tolist(), seed=5, draws=300)
    generator = np.random.default_rng(5)
    means = []
    for _ in range(300):
        drawn = generator.integers(12, size=12)
        rows = np.concatenate([columns[images == image] for image in drawn])
        means.append(np.nanmean(rows, axis=0))
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5], axis=0), rtol=1e-9)


def test_figures_of_a_result_are_paired_with_unpruned_and_with_random_at_its_budget():
    images = [n // 2 for n in range(12)]
    dice = np.random.default_rng(2)
    scores = {name: dice.integers(0, 2, 12).astype(float) for name in "abc"}
    unpruned = result("unpruned", answers(scores["a"], [None] * 12, images), keep=None)
    random = result("random", answers(scores["b"], [0.5] * 12, images))
    method = result("l2", answers(scores["c"], [1.0] * 12, images))
    other = result("l2", answers(scores["c"], [1.0] * 12, images), keep=4)
    whole, chance, own, alone = estimates([unpruned, random, method, other])
    assert set(whole) == {"accuracy", "KL, nats"}
    assert set(chance) == {"accuracy", "KL, nats", "needed, kept", "against unpruned"}
    assert set(own) == {*chance, "against random"}
    assert set(alone) == set(chance)
    gains = scores["c"] - scores["b"]
    found = own["against random"]
    assert found.mean == pytest.approx(gains.mean())
    assert (found.low, found.high) == pytest.approx(interval(gains, images, seed=3))
    assert (own["accuracy"].low, own["accuracy"].high) == pytest.approx((method.low, method.high))
    assert own["needed, kept"].mean == 1.0
