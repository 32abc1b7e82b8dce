"""Questions about images with half the pixels a side, and those that need all of them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from catp_jax.study.half_pixels import HALVED, halved
from catp_jax.study.journal import Journal
from catp_jax.study.records import Answers, Conditions, Setting
from catp_jax.study.results import estimates
from catp_jax.study.sweep import sweep
from catp_jax.study.tables import family_table
from tests.study.answerer import Tiny, examples

SETTINGS = [Setting(HALVED, None), Setting("l2", 4)]


def with_pixels(number):
    """Questions about images whose pixels are at hand."""
    return [
        dataclasses.replace(
            one,
            image=np.random.default_rng(one.image_id).integers(0, 255, (8, 6, 3), np.uint8),
            answer=("yes", "no", "red", "2")[n % 4],
        )
        for n, one in enumerate(examples(number))
    ]


def test_half_the_pixels_are_means_of_four_brought_back_to_size(tmp_path):
    pixels = np.kron(np.arange(0, 240, 10).reshape(4, 6), np.ones((2, 2))).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "image.png")
    one, other = examples(2)
    first, second = halved(
        [dataclasses.replace(example, image=tmp_path / "image.png") for example in (one, other)]
    )
    assert first.image is second.image  # one image's questions share it
    assert (first.question, first.image.shape) == (one.question, (8, 12, 3))
    # in blocks of two pixels nothing is lost but at their edges; in the corners there are none
    corners = [0, -1]
    np.testing.assert_array_equal(first.image[corners][:, corners, 0], pixels[corners][:, corners])
    fine = np.tile(np.array([[0, 200], [200, 0]], np.uint8), (4, 4))[..., None].repeat(3, axis=2)
    (flat,) = halved([dataclasses.replace(one, image=fine)])
    assert (flat.image == 100).all()


def test_an_image_of_one_pixel_stays():
    dot = np.full((1, 1, 3), 7, np.uint8)
    (same,) = halved([dataclasses.replace(examples(1)[0], image=dot)])
    np.testing.assert_array_equal(same.image, dot)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "x.jsonl"
    questions = with_pixels(12)
    model = Tiny()
    found = list(sweep(model, questions, SETTINGS, Conditions(batch=5), journal=Journal(path)))
    return path, questions, found


def test_the_setting_answers_about_the_coarser_images_unpruned(swept):
    _, questions, (whole, coarse, _) = swept
    assert coarse.visual_tokens == whole.visual_tokens
    assert coarse.cost == whole.cost
    (alone,) = sweep(Tiny(), halved(questions), [])
    assert [one.text for one in coarse.answers] == [one.text for one in alone.answers]
    assert [one.text for one in coarse.answers] != [one.text for one in whole.answers]


def test_it_resumes(swept, tmp_path):
    path, questions, found = swept
    lines = path.read_text().splitlines(keepends=True)
    first = [number for number, line in enumerate(lines) if '"row": "answers"' in line][4]
    (tmp_path / "y.jsonl").write_text("".join(lines[:first]))
    journal = Journal(tmp_path / "y.jsonl")
    again = list(sweep(Tiny(), questions, SETTINGS, Conditions(batch=5), journal=journal))
    assert [r.answers for r in again] == [r.answers for r in found]
    assert len(journal.all(Answers)) == 9


def test_accuracy_on_what_needs_the_pixels_is_that_of_the_questions_it_gets_wrong(swept):
    _, _, results = swept
    whole, coarse, pruned = results
    wrong = [n for n, one in enumerate(coarse.answers) if one.score == 0]
    assert 0 < len(wrong) < 12
    figures = estimates(results)
    name = "accuracy, needs the pixels"
    for result, own in ((whole, figures[0]), (pruned, figures[2])):
        expected = np.mean([result.answers[n].score for n in wrong])
        assert own[name].mean == pytest.approx(expected)
        assert own[name].low <= expected <= own[name].high
    assert name not in figures[1]  # nothing, by its choice
    table = family_table(results, figures)
    assert table.head == ("method", "kept", f"needs the pixels ({len(wrong)})")
    assert [line[0] for line in table.lines] == ["unpruned", "l2"]
