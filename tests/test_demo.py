"""The demo's questions; that it runs, and what it draws, is checked from the wheel by .ci/run."""

from pathlib import Path

import pytest

from catp_jax.demo import EACH, spread_out
from catp_jax.study.tasks import Example, easy_vqa


@pytest.fixture(scope="module")
def examples():
    return list(easy_vqa("test"))


@pytest.mark.parametrize("number", [1, 7, 256, 4000, 9673])
def test_questions_are_as_many_as_asked_for_and_no_two_the_same(examples, number):
    chosen = spread_out(examples, number)
    assert len(chosen) == number
    assert len({example.id for example in chosen}) == number


def test_questions_are_about_images_of_the_whole_set(examples):
    images = [example.image_id for example in spread_out(examples, 256)]
    assert len(set(images)) == 256 / EACH
    assert max(images) > 0.9 * len({example.image_id for example in examples})


@pytest.mark.parametrize("number", [0, -1, 9674])
def test_a_number_out_of_range_is_refused(examples, number):
    with pytest.raises(ValueError, match="1 to 9673 questions"):
        spread_out(examples, number)


def test_few_examples_are_all_used():
    few = [Example(Path("x.png"), "?", "yes", str(n), n % 2) for n in range(5)]
    assert sorted(example.id for example in spread_out(few, 5)) == list("01234")
