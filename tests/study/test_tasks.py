"""easy-VQA as a task."""

import collections
import sys

import pytest
from PIL import Image

from catp_jax.study.tasks import easy_vqa, score


def test_test_split_is_whole():
    examples = list(easy_vqa("test"))
    assert len(examples) == 9673
    assert len({e.id for e in examples}) == 9673
    assert len({e.image_id for e in examples}) == 1000
    answers = collections.Counter(e.answer for e in examples)
    assert len(answers) == 13
    assert answers["circle"] == 416


def test_an_example_is_a_question_about_a_readable_image():
    example = next(easy_vqa("train"))
    assert (example.question, example.answer) == ("what is the blue shape?", "rectangle")
    with Image.open(example.image) as image:
        assert image.size == (64, 64)


def test_limit_takes_the_first():
    assert list(easy_vqa("test", limit=5)) == list(easy_vqa("test"))[:5]
    assert list(easy_vqa("test", limit=0)) == []


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'validation'"):
        list(easy_vqa("validation"))


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        list(easy_vqa())


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [(" Yes\n", "yes", 1.0), ("red", "red", 1.0), ("reddish", "red", 0.0), ("", "no", 0.0)],
)
def test_score_is_exact_but_for_case_and_space(prediction, answer, expected):
    assert score(prediction, answer) == expected
