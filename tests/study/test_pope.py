"""POPE's files in small, whole and not, and its figures counted by hand."""

import json
import random

import pytest
from PIL import Image

from catp_jax.study.pope import measures, pope_task, said, score
from catp_jax.study.tasks import Example


def line(number, image, label, thing="dog"):
    return {
        "question_id": number,
        "image": f"COCO_val2014_{image:012d}.jpg",
        "text": f"Is there a {thing} in the image?",
        "label": label,
    }


class Files:
    """Questions 1 … 12, six about each of two images, no and yes in turn; can be spoilt."""

    def __init__(self, folder):
        self.path, self.images = folder / "coco_pope_random.json", folder / "val2014"
        self.images.mkdir()
        self.lines = [line(n, 100 + n // 7, "yes" if n % 2 else "no") for n in range(1, 13)]
        for image in (100, 101):
            Image.new("RGB", (4, 4)).save(self.image(image))

    def image(self, number):
        return self.images / f"COCO_val2014_{number:012d}.jpg"

    def task(self, **options):
        texts = [one if isinstance(one, str) else json.dumps(one) for one in self.lines]
        self.path.write_text("\n".join(texts) + "\n")
        return pope_task(self.path, options.pop("images", self.images), **options)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_a_line_is_a_question_of_the_family_of_its_label(files):
    task = files.task()
    assert [e.id for e in task.examples] == [str(n) for n in range(1, 13)]
    assert [e.image_id for e in task.examples] == [0] * 6 + [1] * 6
    first, second = task.examples[:2]
    assert (first.image, first.question) == (files.image(100), "Is there a dog in the image?")
    assert (first.answer, first.family, second.answer) == ("yes", "yes", "no")
    assert (task.name, task.problems) == ("pope", ())
    assert task.source == {
        "questions": "coco_pope_random.json",
        "fraction": 1.0,
        "seed": 42,
        "drawn": 12,
    }


def test_images_may_stand_in_the_folder_of_their_split(files, tmp_path):
    assert files.task(images=tmp_path).examples[0].image == files.image(100)


def test_a_fraction_is_the_same_for_a_seed(files):
    ids = [e.id for e in files.task(fraction=0.5, seed=1).examples]
    assert ids == [e.id for e in files.task(fraction=0.5, seed=1).examples]
    assert len(ids) == 6
    assert ids == sorted(ids, key=int)


@pytest.mark.parametrize(
    ("answer", "means"),
    [
        ("yes", "yes"),
        ("Yes, there is.", "yes"),
        ("no", "no"),
        ("No, there is not a dog", "no"),
        ("There is not", "no"),
        ("Yes. There is no dog", "yes"),  # the first sentence alone
        ("no,", "no"),
        ("There is no dog. Yes", "no"),
        ("", "yes"),
        ("nothing", "yes"),  # not a word of theirs
        ("NO", "yes"),
        ("no\n", "yes"),  # words are what single spaces part
    ],
)
def test_an_answer_means_what_the_authors_script_says(answer, means):
    assert said(answer) == means
    for label in ("yes", "no"):
        example = Example("x.jpg", "?", label, "1", 0)
        assert score(answer, example) == (1.0 if means == label else 0.0)


def test_figures_are_those_of_the_confusion_matrix():
    dice = random.Random(1)
    labels = [dice.choice(["yes", "no"]) for _ in range(200)]
    answers = [dice.choice(["Yes", "no", "no way", "yes it is"]) for _ in range(200)]
    examples = [Example("x.jpg", "?", label, str(n), 0) for n, label in enumerate(labels)]
    found = measures(examples, [score(a, e) for a, e in zip(answers, examples, strict=True)])

    called = ["no" if a.startswith("no") else "yes" for a in answers]
    true_yes = [c for c, label in zip(called, labels, strict=True) if label == "yes"].count("yes")
    false_yes = called.count("yes") - true_yes
    missed = labels.count("yes") - true_yes
    precision, recall = true_yes / (true_yes + false_yes), true_yes / (true_yes + missed)
    assert found == pytest.approx(
        {
            "precision": precision,
            "recall": recall,
            "F1": 2 * precision * recall / (precision + recall),
            "yes ratio": called.count("yes") / 200,
        }
    )


def test_figures_without_a_yes_are_zero():
    examples = [Example("x.jpg", "?", "no", str(n), 0) for n in range(3)]
    assert measures(examples, [1.0, 1.0, 1.0]) == {
        "precision": 0.0,
        "recall": 0.0,
        "F1": 0.0,
        "yes ratio": 0.0,
    }


def test_what_does_not_fit_is_left_out_with_its_line(files):
    files.lines[0] = "{oh"
    files.lines[1] = "[1]"
    files.lines[2]["label"] = "maybe"
    del files.lines[3]["image"]
    files.lines[4]["text"] = " "
    files.lines[5]["question_id"] = None
    files.lines[6]["image"] = "x" * 5000 + ".jpg"
    files.image(101).write_text("no image")
    files.lines.append(line(13, 100, "yes"))
    task = files.task()
    assert [e.id for e in task.examples] == ["13"]
    assert task.left_out == {"of the wrong form": 6, "without an image that can be read": 6}
    said = "\n".join(task.problems)
    assert "6 of 13 questions left out, of the wrong form: line 1 is" in said
    assert "it is not JSON" in said
    assert 'line 3 is {"question_id": 3' in said
    assert "COCO_val2014_000000000101.jpg' is in no image format" in said


def test_blank_lines_do_not_count_but_are_numbered(files):
    files.lines[0] = ""
    files.lines[1] = "[1]"
    assert "line 2 is" in files.task().problems[0]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: f.lines.clear(), "has no questions"),
        (lambda f: f.lines.append(line(3, 100, "yes")), "question ids twice: 3"),
        (
            lambda f: f.image(100).unlink() or f.image(101).unlink(),
            "no question of .* is not there",
        ),
        (lambda f: setattr(f, "lines", ['{"questions": []}']), "1 of 1 questions left out, of the"),
    ],
)
def test_files_that_cannot_be_used_are_refused(files, spoil, said):
    spoil(files)
    with pytest.raises(ValueError, match=said):
        files.task()


def test_no_folder_no_file_no_fraction(files, tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        files.task(images=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a file"):
        pope_task(tmp_path / "nothing.json", files.images)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        files.task(fraction=0.0)
