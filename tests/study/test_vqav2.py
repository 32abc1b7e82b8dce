"""VQAv2's official files, in small, whole and not."""

import json

import pytest
from PIL import Image

from catp_jax.study.vqav2 import vqav2_task

ANSWERS = ["two"] * 4 + ["2"] * 3 + ["three"] * 3


def question(number, image, text="How many?"):
    return {"question_id": number, "image_id": image, "question": text}


def annotation(number, image, answers=ANSWERS):
    return {
        "question_id": number,
        "image_id": image,
        "multiple_choice_answer": answers[0],
        "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers, start=1)],
    }


class Files:
    """Questions 10 … 19, two about each of five images, and ways to spoil them."""

    def __init__(self, folder):
        self.folder, self.images = folder, folder / "val2014"
        self.images.mkdir()
        pairs = [(10 + n, 100 + n // 2) for n in range(10)]
        self.questions = {
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": "val2014",
            "questions": [question(*pair) for pair in pairs],
        }
        self.annotations = {
            "data_type": "mscoco",
            "data_subtype": "val2014",
            "annotations": [annotation(*pair) for pair in pairs],
        }
        for image in range(100, 105):
            Image.new("RGB", (4, 4)).save(self.image(image))

    def image(self, number):
        return self.images / f"COCO_val2014_{number:012d}.jpg"

    def task(self, **options):
        paths = [self.folder / "questions.json", self.folder / "annotations.json"]
        for path, content in zip(paths, (self.questions, self.annotations), strict=True):
            path.write_text(json.dumps(content))
        return vqav2_task(*paths, options.pop("images", self.images), **options)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_questions_come_with_ten_answers_and_an_image(files):
    task = files.task()
    assert [e.id for e in task.examples] == [str(n) for n in range(10, 20)]
    first = task.examples[0]
    assert (first.image, first.image_id) == (files.image(100), 100)
    assert (first.question, first.answer, first.answers) == ("How many?", "two", tuple(ANSWERS))
    assert task.prompt == "Question: {question} Short answer:"
    assert task.problems == ()
    assert task.score("two", first) == 1.0
    assert task.score("3", first) == pytest.approx(0.9)


def test_a_fraction_is_drawn_by_the_seed_and_keeps_the_order(files):
    ids = [int(e.id) for e in files.task(fraction=0.4, seed=1).examples]
    assert len(ids) == 4
    assert ids == sorted(ids)
    assert ids == [int(e.id) for e in files.task(fraction=0.4, seed=1).examples]
    others = [[int(e.id) for e in files.task(fraction=0.4, seed=s).examples] for s in range(2, 6)]
    assert any(other != ids for other in others)
    assert files.task(fraction=0.4, seed=1).source["fraction"] == 0.4


def test_the_draw_does_not_depend_on_what_is_missing(files):
    whole = {e.id for e in files.task(fraction=0.5).examples}
    gone = files.task(fraction=0.5).examples[0]
    gone.image.unlink()
    assert {e.id for e in files.task(fraction=0.5).examples} < whole


def test_plain_image_names_and_the_folder_above_do(files):
    files.image(100).rename(files.images / "000000000100.jpg")
    task = files.task()
    assert task.examples[0].image.name == "000000000100.jpg"
    assert len(files.task(images=files.folder).examples) == 10


def test_missing_and_broken_images_are_counted_and_left_out(files):
    files.image(100).unlink()
    files.image(101).write_text("no image")
    Image.effect_noise((64, 64), 50).convert("RGB").save(files.image(102))
    files.image(102).write_bytes(files.image(102).read_bytes()[:-200])
    task = files.task()
    assert [e.id for e in task.examples] == [str(n) for n in range(16, 20)]
    kind = "without an image that can be read"
    assert (task.source["drawn"], task.left_out) == (10, {kind: 6})
    (problem,) = task.problems
    assert problem.startswith("6 of 10 questions left out, without an image that can be read")
    assert "COCO_val2014_000000000100.jpg' is not there" in problem
    assert "COCO_val2014_000000000101.jpg' is in no image format" in problem


def test_an_image_that_is_a_program_is_not_run(files, monkeypatch):
    Image.new("RGB", (4, 4)).save(files.image(100), format="EPS")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("it was run"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    assert files.task().left_out == {"without an image that can be read": 2}


def test_every_kind_of_fault_is_named_with_the_question(files):
    entries = files.annotations["annotations"]
    del files.questions["questions"][0]["question"]
    del entries[1]
    entries[1]["answers"] = "two"  # of question 12
    entries[2]["answers"].pop()  # of question 13
    entries[3]["image_id"] = 999  # of question 14
    task = files.task()
    assert [e.id for e in task.examples] == ["15", "16", "17", "18", "19"]
    said = "\n".join(task.problems)
    assert "of the wrong form: entry 0" in said
    assert "without an annotation: question 11" in said
    assert "with an annotation of the wrong form: question 12" in said
    assert "without 10 answers: question 13 has 9" in said
    assert "question 14 is about 102, its annotation about 999" in said
    assert all(problem.startswith("1 of 10 questions left out") for problem in task.problems)


def test_many_faults_are_shown_in_part(files):
    files.annotations["annotations"] = files.annotations["annotations"][:1]
    (problem,) = files.task().problems
    assert "question 15; … and 4 more" in problem


def test_nothing_left_is_an_error_that_says_why(files):
    for path in files.images.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"no question .* 10 of 10 questions left out"):
        files.task()


def test_swapped_files_are_recognised(files):
    files.questions, files.annotations = files.annotations, files.questions
    with pytest.raises(ValueError, match="looks like the annotation file"):
        files.task()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: f.questions.update(questions=[]), "has no questions"),
        (lambda f: f.questions.update(questions={}), "no list 'questions'"),
        (lambda f: f.annotations.update(data_subtype="train2014"), "different splits"),
        (lambda f: f.questions.update(task_type="Multiple-Choice"), "'Multiple-Choice'"),
        (lambda f: f.annotations.update(data_type="abstract_v002"), "'abstract_v002'"),
        (lambda f: f.questions["questions"].append(question(10, 100)), "question ids twice: 10"),
        (
            lambda f: f.annotations["annotations"].append(annotation(11, 100)),
            "annotations.json has question ids twice: 11",
        ),
        (lambda f: setattr(f, "questions", [1]), "not a JSON object but list"),
    ],
)
def test_files_of_the_wrong_kind_are_refused(files, spoil, said):
    spoil(files)
    with pytest.raises(ValueError, match=said):
        files.task()


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_a_fraction_out_of_range_is_refused(files, fraction):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        files.task(fraction=fraction)


def test_what_is_no_json_or_no_folder_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        files.task(images=tmp_path / "nowhere")
    files.task()
    (tmp_path / "questions.json").write_text("{oh")
    with pytest.raises(ValueError, match=r"cannot be used .it is not JSON"):
        vqav2_task(tmp_path / "questions.json", tmp_path / "annotations.json", files.images)
    with pytest.raises(ValueError, match="is not a file"):
        vqav2_task(tmp_path / "nothing.json", tmp_path / "annotations.json", files.images)
