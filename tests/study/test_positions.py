"""How often positions were kept, counted by hand."""

import numpy as np
import pytest
from PIL import Image

from catp_jax.study.positions import draw_positions, how_often, laid_out, positions_of
from catp_jax.study.records import Answer, Conditions, Setting
from catp_jax.study.sweep import sweep
from tests.study.answerer import Tiny, examples

SETTINGS = [Setting("random", 2), Setting("random:seed=5", 2), Setting("l2", 2)]


def answer(kept, available=8, grid=None):
    return Answer("id", "x", 1.0, 0.0, 0, available, kept, grid=grid)


def test_counts_are_multiples_of_their_mean():
    found = how_often([answer((0, 1)), answer((0, 3)), answer((0,))], 4)
    np.testing.assert_allclose(found, [3 / 1.25, 1 / 1.25, 0, 1 / 1.25])
    np.testing.assert_array_equal(how_often([answer(())], 4), np.zeros(4))


def test_tiles_lie_beside_each_other_without_what_comes_before_their_patches():
    rows = []
    for tile in range(6):  # two rows of three tiles, each a class token and two rows of patches
        rows += [-tile, *(100 * tile + np.arange(4))]
    patches, others = laid_out(np.array(rows, float), (2, 3, 2, 2))
    np.testing.assert_array_equal(
        patches,
        [
            [0, 1, 100, 101, 200, 201],
            [2, 3, 102, 103, 202, 203],
            [300, 301, 400, 401, 500, 501],
            [302, 303, 402, 403, 502, 503],
        ],
    )
    np.testing.assert_array_equal(others[:, 0], [0, -1, -2, -3, -4, -5])


@pytest.fixture(scope="module")
def results():
    return list(sweep(Tiny(), examples(20), SETTINGS, Conditions(batch=20)))


def test_each_setting_has_its_positions_and_seeds_count_together(results):
    random, longest = positions_of(results)
    assert [(one.method, one.keep) for one in (random, longest)] == [
        ("random, 2 seeds", 2),
        ("l2", 2),
    ]
    assert (random.questions, random.of) == (20, 20)
    for one, some in ((random, results[1:3]), (longest, results[3:])):
        counts = [
            sum(n in answer.kept for result in some for answer in result.answers) for n in range(8)
        ]
        np.testing.assert_allclose(one.patches, np.reshape(counts, (2, 4)) / np.mean(counts))
        assert one.others.size == 0


def test_only_images_that_are_cut_alike_are_counted_together(results):
    wide = [answer((0, 4), grid=(1, 2, 2, 2)), answer((1, 5), grid=(1, 2, 2, 2))]
    tall = answer((0, 1), grid=(2, 1, 2, 2))
    result = results[3].with_answers((*wide, tall), results[3].cost)
    (found,) = positions_of([result])
    assert (found.questions, found.of, found.patches.shape) == (2, 3, (2, 4))
    np.testing.assert_array_equal(found.patches, [[2, 2, 2, 2], [0, 0, 0, 0]])


def test_means_have_no_positions():
    (whole, pooled) = sweep(Tiny(), examples(4), [Setting("pool", 2)])
    assert [answer.is_merged for answer in pooled.answers] == [True] * 4
    assert positions_of([whole, pooled]) == []


def test_tokens_without_a_place_are_bars(results, tmp_path):
    answers = tuple(answer((n, 7)) for n in range(7))
    (found,) = positions_of([results[3].with_answers(answers, results[3].cost)])
    assert found.patches is None
    np.testing.assert_allclose(found.others, [1 / 1.75] * 7 + [4])
    for name, some in (("bars", [found]), ("maps", positions_of(results))):
        draw_positions(some, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 20
