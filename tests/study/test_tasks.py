"""Tasks: easy-VQA, one's own JSON lines, and what they share."""

import base64
import collections
import dataclasses
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from catp_jax.study.tasks import (
    Example,
    check_prompt,
    digest,
    easy_vqa,
    easy_vqa_task,
    exact_match,
    fill,
    jsonl_task,
    spread,
)


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
    assert example.accepted == ("rectangle",)
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


def test_easy_vqa_as_a_task():
    task = easy_vqa_task()
    assert (task.name, task.prompt, task.source) == ("easy-vqa", "{question}", {"split": "test"})
    assert task.examples == tuple(easy_vqa("test"))
    assert task.score(" Circle", dataclasses.replace(task.examples[0], answer="circle")) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" Yes\n", ["yes"], 1.0),
        ("red", ["red"], 1.0),
        ("reddish", ["red"], 0.0),
        ("", ["no"], 0.0),
        ("gray", ["grey", "Gray"], 1.0),
    ],
)
def test_score_is_exact_but_for_case_and_space(prediction, answers, expected):
    example = Example(Path("x.png"), "?", answers[0], "0", 0, tuple(answers))
    assert exact_match(prediction, example) == expected


def test_some_examples_are_taken_at_even_distances():
    examples = [Example(Path("x.png"), "?", "yes", str(n), n) for n in range(10)]
    assert [e.id for e in spread(examples, 4)] == ["0", "2", "5", "7"]
    assert spread(examples, None) == spread(examples, 99) == tuple(examples)
    with pytest.raises(ValueError, match="at least 1 question"):
        spread(examples, 0)


def test_the_prompt_wants_a_place_for_the_question():
    assert fill("Q: {question} {A}:", "why {not}?") == "Q: why {not}? {A}:"
    with pytest.raises(ValueError, match="'What is it'"):
        check_prompt("What is it")


def test_the_digest_tells_questions_answers_images_and_order_apart():
    one = Example(Path("a.png"), "what?", "yes", "1", 1)
    two = dataclasses.replace(one, id="2")
    changed = [
        dataclasses.replace(one, question="who?"),
        dataclasses.replace(one, answer="no"),
        dataclasses.replace(one, answers=("yes", "yeah")),
        dataclasses.replace(one, image=Path("b.png")),
    ]
    digests = {digest(some) for some in ([one, two], [two, one], *([e, two] for e in changed))}
    assert len(digests) == 6
    assert digest([one]) == digest([dataclasses.replace(one, image=Path("elsewhere/a.png"))])


# one's own questions


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "broken.png").write_text("no image")
    cut_off(tmp_path / "half.jpg")
    return tmp_path


def cut_off(path):
    """A JPEG whose first half alone is there."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def written(folder, *lines):
    path = folder / "mine.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts))
    return path


@pytest.mark.parametrize("images", [["a.png"], "a.png"])
def test_images_may_be_said_as_in_a_batch_of_requests(folder, images):
    line = {"images": images, "question": "what?", "answer": "cat"}
    (example,) = jsonl_task(written(folder, line)).examples
    assert example.image == folder / "a.png"


def test_an_image_may_be_whatever_a_batch_of_requests_takes(folder):
    content = base64.b64encode((folder / "a.png").read_bytes()).decode()
    images = [(folder / "a.png").as_uri(), f"data:image/png;base64,{content}", content]
    asked = {"question": "what?", "answer": "cat"}
    task = jsonl_task(written(folder, *({**asked, "image": image} for image in images)))
    assert [example.image for example in task.examples] == images
    assert len({digest([example]) for example in task.examples}) == 3


def test_an_image_that_is_a_program_is_not_run(folder, monkeypatch):
    Image.new("RGB", (4, 4)).save(folder / "a.eps")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("it was run"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    with pytest.raises(ValueError, match="in no image format"):
        jsonl_task(written(folder, {**GOOD, "image": "a.eps"}))


def test_questions_are_read_from_json_lines(folder):
    path = written(
        folder,
        {"image": "a.png", "question": "what?", "answer": "cat"},
        "",
        {"image": "b.png", "question": "who?", "answers": ["grey", "gray"], "id": 7},
        {"image": "a.png", "question": "two\u2028lines?", "answer": "yes", "id": "x"},
    )
    task = jsonl_task(path)
    assert task.source == {"file": "mine.jsonl"}
    assert [e.id for e in task.examples] == ["line-1", "7", "x"]
    assert [e.image_id for e in task.examples] == [0, 1, 0]
    assert task.examples[0].image == folder / "a.png"
    assert task.examples[1].accepted == ("grey", "gray")
    assert task.score("gray", task.examples[1]) == 1.0
    assert task.problems == ()


GOOD = {"image": "a.png", "question": "what?", "answer": "cat"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oh", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "not a JSON object but list"),
        ('{"image": "a.png", "image": "b.png"}', "is there twice"),
        ({"question": "what?", "answer": "cat"}, "about one image, got 0"),
        ({**GOOD, "image": " "}, "the path of an image is empty"),
        ({**GOOD, "image": "https://example.org/a.png"}, "nothing is downloaded unasked"),
        ({**GOOD, "question": " "}, "'question' is a text"),
        ({**GOOD, "question": 3}, "'question' is a text"),
        ({"image": "a.png", "question": "what?"}, "either 'answer' or 'answers'"),
        ({**GOOD, "answers": ["cat"]}, "either 'answer' or 'answers'"),
        ({**GOOD, "answer": 2}, "answers are texts"),
        ({**GOOD, "answer": ""}, "answers are texts"),
        ({"image": "a.png", "question": "what?", "answers": []}, "answers are texts"),
        ({**GOOD, "id": 1.5}, "an id is a text or a whole number"),
        ({**GOOD, "image": "c.png"}, "c.png' is not a file"),
        ({**GOOD, "Question": "who?"}, "unknown: 'Question'"),
        ({**GOOD, "choices": [], "x": 1}, "unknown: 'choices', 'x'"),
        ({**GOOD, "images": ["a.png"]}, "give one of them"),
        ({"images": ["a.png", "b.png"], "question": "?", "answer": "a"}, "about one image, got 2"),
        ({"images": [], "question": "?", "answer": "a"}, "about one image, got 0"),
        ({"images": [3], "question": "?", "answer": "a"}, "an image is a path"),
        ({**GOOD, "image": "broken.png"}, "broken.png' is in no image format"),
        ({**GOOD, "image": "half.jpg"}, "half.jpg' is damaged or cut off"),
    ],
)
def test_a_line_that_is_no_question_is_refused_with_its_number(folder, line, said):
    with pytest.raises(ValueError, match=r"mine.jsonl cannot be used") as refusal:
        jsonl_task(written(folder, GOOD, "", line))
    assert said in str(refusal.value).partition("line 3: ")[2]


def test_ids_that_stand_twice_are_refused_with_both_lines(folder):
    lines = [GOOD | {"id": "x"}, GOOD, GOOD | {"id": "x"}, GOOD | {"id": "line-2"}]
    with pytest.raises(ValueError, match="'x' stands in line 1") as refusal:
        jsonl_task(written(folder, *lines))
    assert "line 4: id 'line-2' stands in line 2" in str(refusal.value)


def test_many_faults_are_counted(folder):
    with pytest.raises(ValueError, match=r"line 5: it is not JSON.*; … and 4 more"):
        jsonl_task(written(folder, *["{"] * 9))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is not a file"), (b"", "no questions"), (b"\xff\xfe\x00", "byte 0 is not UTF-8")],
)
def test_files_that_hold_no_questions_are_refused(folder, content, said):
    path = folder / "mine.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        jsonl_task(path)
