"""The statistics behind a study's figures, against slow oracles and cases worked by hand."""

import itertools

import numpy as np
import pytest

from catp_jax.study.results import interval, kl_divergence, median_and_spread


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
