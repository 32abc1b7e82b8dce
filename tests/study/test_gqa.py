"""GQA's files in small, whole and not."""

import json

import pytest
from PIL import Image

from catp_jax.study.gqa import gqa_task

TYPES = ("verify", "query", "choose", "logical", "compare")


class Files:
    """Questions "00" … "09", two about each of five images, each type twice."""

    def __init__(self, folder):
        self.path, self.images = folder / "testdev_balanced_questions.json", folder / "images"
        self.images.mkdir()
        self.questions = {
            f"{n:02d}": {
                "imageId": f"n{n // 2}",
                "question": "Is it overcast?",
                "answer": "no" if n % 2 else "yes",
                "fullAnswer": "No, it is not.",
                "isBalanced": True,
                "types": {"structural": TYPES[n % 5], "semantic": "attr", "detailed": "x"},
            }
            for n in range(10)
        }
        for image in range(5):
            Image.new("RGB", (4, 4)).save(self.image(image))

    def image(self, number):
        return self.images / f"n{number}.jpg"

    def task(self, **options):
        self.path.write_text(json.dumps(self.questions))
        return gqa_task(self.path, options.pop("images", self.images), **options)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_an_entry_is_a_question_of_the_family_of_its_structure(files):
    task = files.task()
    assert [e.id for e in task.examples] == [f"{n:02d}" for n in range(10)]
    assert [e.family for e in task.examples] == [*TYPES, *TYPES]
    assert [e.image_id for e in task.examples] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    first = task.examples[0]
    assert (first.image, first.question, first.answer) == (
        files.image(0),
        "Is it overcast?",
        "yes",
    )
    assert (task.name, task.problems, task.measures) == ("gqa", (), None)
    assert task.source["questions"] == "testdev_balanced_questions.json"


def test_images_may_stand_a_folder_below(files, tmp_path):
    assert files.task(images=tmp_path).examples[0].image == files.image(0)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("yes", 1), ("Yes", 1), (" yes.", 1), ("yes...", 1), ("yes it is", 0), ("no", 0), ("", 0)],
)
def test_an_answer_counts_if_it_is_the_right_one(files, answer, right):
    task = files.task()
    assert task.score(answer, task.examples[0]) == right


def test_a_fraction_is_the_same_for_a_seed(files):
    ids = [e.id for e in files.task(fraction=0.4, seed=3).examples]
    assert ids == [e.id for e in files.task(fraction=0.4, seed=3).examples]
    assert len(ids) == 4
    assert ids == sorted(ids)


def test_what_does_not_fit_is_left_out_by_its_id(files):
    asked = files.questions
    asked["00"] = [1]
    del asked["01"]["imageId"]
    asked["02"]["question"] = ""
    del asked["03"]["answer"]
    asked["04"]["isBalanced"] = False
    files.image(3).unlink()  # of 06 and 07
    del asked["08"]["types"]
    asked["09"]["types"] = {"structural": 1}
    task = files.task()
    assert [(e.id, e.family) for e in task.examples] == [("05", "verify"), ("08", ""), ("09", "")]
    assert task.left_out == {
        "of the wrong form": 3,
        "without an answer": 1,
        "not of the balanced set, which alone is scored": 1,
        "without an image that can be read": 2,
    }
    said = "\n".join(task.problems)
    assert (
        "3 of 10 questions left out, of the wrong form: question 00 is [1]; question 01 is" in said
    )
    assert "n3.jpg' is not there" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "has no questions"),
        ('{"questions": [], "data_type": "mscoco"}', "no GQA question file.*'questions'"),
        ('{"1": {"imageId": "n1"}, "1": {}}', "the key '1' is there twice"),
        ("[]", "not a JSON object but list"),
        ('{"1": {"imageId": "n1", "question": "?"}}', "no question of .* without an answer"),
        ("{oh", "it is not JSON"),
    ],
)
def test_files_of_the_wrong_kind_are_refused(files, content, said):
    files.path.write_text(content)
    with pytest.raises(ValueError, match=said):
        gqa_task(files.path, files.images)


def test_no_folder_and_no_file(files, tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        files.task(images=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a file"):
        gqa_task(tmp_path / "nothing.json", files.images)
