"""Tasks: images, questions and the answers they are scored against.

`easy-vqa` (Victor Zhou, https://pypi.org/project/easy-vqa, MIT) is one coloured shape on a plain
background, 64×64 pixels, and 107 forms of questions with 13 answers; its package carries the data.
`vqav2`, `pope` and `gqa` read their authors' files (see there). `jsonl` is one's own:

    {"image": "cat.png", "question": "what is it?", "answer": "cat", "id": "optional"}
    {"image": "cat.png", "question": "which colour?", "answers": ["grey", "gray"]}

Images and ids are said as in a file of requests (`readers.rows`); an answer counts if it is any of
the `answers`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from catp_jax.messages import listed
from catp_jax.readers.images import check_image
from catp_jax.readers.reading import Box
from catp_jax.readers.rows import lines_of, parse
from catp_jax.study.vqa_score import vqa_accuracy

KEYS = ("image", "images", "question", "answer", "answers", "id")  # of one's own questions


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one image.

    `answer` is the (most common) right answer, `answers` all that count where there are several,
    one per person in VQAv2. `image_id` is the same for all questions of an image.

    Where the task knows it: `family` is the kind of question, and `needed` the parts of the image
    that its answer depends on.
    """

    image: Path | str | UInt8[np.ndarray, "height width 3"]
    question: str
    answer: str
    id: str
    image_id: int
    answers: tuple[str, ...] = ()
    family: str = ""
    needed: tuple[Box, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """Everything that it is scored against."""
        return self.answers or (self.answer,)


Score = Callable[[str, Example], float]

Measures = Callable[[Sequence[Example], Sequence[float]], dict[str, float]]
"""Of all questions and their scores: figures other than the mean that a task is reported by."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Questions and how answers to them are scored.

    `prompt` turns a question into what the model is asked. `source` says where the questions come
    from, for the record; `left_out` how many cannot be used, by the reason, and `problems` which.
    `measures` are what the task is reported by besides the mean score, if anything.
    """

    name: str
    examples: tuple[Example, ...]
    score: Score
    prompt: str
    source: dict[str, Any]
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: tuple[str, ...] = ()
    measures: Measures | None = None


def easy_vqa_task(split: str = "test") -> Task:
    """easy-VQA's questions, scored by exact match."""
    return Task(
        name="easy-vqa",
        examples=tuple(easy_vqa(split)),
        score=exact_match,
        prompt=QUESTION,
        source={"split": split},
    )


def jsonl_task(path: Path) -> Task:
    """The questions of a JSON-lines file, scored by exact match with any of their answers.

    Raises ValueError, with line numbers, if a line is no question or two have the same id.
    """
    return Task(
        name="jsonl",
        examples=tuple(read_json_lines(path)),
        score=exact_match,
        prompt=QUESTION,
        source={"file": path.name},
    )


def easy_vqa(split: str = "test", limit: int | None = None) -> Iterator[Example]:
    """The first `limit` questions of easy-VQA's split, in the package's order.

    Raises ValueError if the split is unknown, and ModuleNotFoundError, saying what to install, if
    the package is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f"easy-VQA has the splits 'train' and 'test', not {split!r}")
    try:
        import easy_vqa as package
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the easy-VQA data is not installed: pip install 'catp-jax[demo]' or easy-vqa"
        ) from error
    if split == "train":
        rows, paths = package.get_train_questions(), package.get_train_image_paths()
    else:
        rows, paths = package.get_test_questions(), package.get_test_image_paths()
    for number, (question, answer, image) in enumerate(zip(*rows, strict=True)):
        if number == limit:
            return
        yield Example(
            image=Path(paths[image]),
            question=question,
            answer=answer,
            id=f"easy-vqa-{split}-{number}",
            image_id=image,
        )


def read_json_lines(path: Path) -> list[Example]:
    """The questions of a JSON-lines file; see this module for its form."""
    examples, lines, faults, images, image_faults = [], {}, [], {}, {}
    for number, line in lines_of(path):
        try:
            example = _example(line, number, path.parent, images, image_faults)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        if example.id in lines:
            faults.append(f"line {number}: id {example.id!r} stands in line {lines[example.id]}")
        lines.setdefault(example.id, number)
        examples.append(example)
    if faults:
        raise ValueError(f"{path} cannot be used, mend these lines: {first_few(faults)}")
    if not examples:
        raise ValueError(f"{path} has no questions; give one JSON object a line")
    return examples


def _example(
    line: bytes,
    number: int,
    folder: Path,
    images: dict[Path | str, int],
    image_faults: dict[Path | str, str],
) -> Example:
    row = parse(line, KEYS, folder)
    if len(row["images"]) != 1:
        raise ValueError(f"a question is about one image, got {len(row['images'])}")
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise ValueError(f"'question' is a text that is not empty, got {row.get('question')!r}")
    if ("answer" in row) == ("answers" in row):
        raise ValueError("give either 'answer' or 'answers'")
    answers = row["answers"] if "answers" in row else [row["answer"]]
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(answer, str) and answer.strip() for answer in answers)
    ):
        raise ValueError(f"answers are texts that are not empty, got {answers!r}")
    (image,) = row["images"]
    if image not in image_faults:
        image_faults[image] = image_fault(image)
    if fault := image_faults[image]:
        raise ValueError(fault)
    return Example(
        image=image,
        question=row["question"],
        answer=answers[0],
        id=f"line-{number}" if row["id"] is None else str(row["id"]),
        image_id=images.setdefault(image, len(images)),
        answers=tuple(answers) if "answers" in row else (),
    )


def image_fault(image: Path | str) -> str:
    """Why something cannot be used as an image; empty if it can."""
    try:
        check_image(image)
    except ValueError as error:
        return str(error)
    return ""


def first_few(faults: Sequence[str]) -> str:
    """The first faults, and how many more there are."""
    return listed(faults, 5, "; ")


QUESTION = "{question}"
"""The prompt that is the question itself."""


def fill(prompt: str, question: str) -> str:
    """The template `prompt` with the question in its place."""
    return prompt.replace(QUESTION, question)


def check_prompt(prompt: Any) -> None:
    """Raises ValueError if a template is no text, or has no place for the question."""
    if not isinstance(prompt, str) or QUESTION not in prompt:
        raise ValueError(f"a prompt must have {QUESTION} where the question goes, got {prompt!r}")


def spread(examples: Sequence[Example], limit: int | None) -> tuple[Example, ...]:
    """`limit` examples at even distances; all, if there are no more.

    Raises ValueError if the limit is not at least 1.
    """
    if limit is None or limit >= len(examples):
        return tuple(examples)
    if limit < 1:
        raise ValueError(f"a limit must be at least 1 question, got {limit}")
    return tuple(examples[number * len(examples) // limit] for number in range(limit))


def first_of_each_image(examples: Sequence[Example]) -> list[int]:
    """The number of the first question about each image."""
    first: dict[int, int] = {}
    for number, example in enumerate(examples):
        first.setdefault(example.image_id, number)
    return list(first.values())


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of questions, answers and images (files by their names), in order."""
    out = hashlib.sha256()
    for example in examples:
        name = example.image
        if isinstance(name, Path):
            name = name.name
        elif isinstance(name, np.ndarray):
            name = hashlib.sha256(name.tobytes()).hexdigest()
        row = [example.id, name, example.question, example.answer, *example.answers]
        out.update(json.dumps(row).encode())
    return out.hexdigest()[:16]


def exact_match(prediction: str, example: Example) -> float:
    """1.0 if it is an accepted answer but for case and the space around it, else 0.0."""
    text = prediction.strip().lower()
    return float(any(text == answer.strip().lower() for answer in example.accepted))


def official_vqa(prediction: str, example: Example) -> float:
    """VQAv2's score against all people's answers."""
    return vqa_accuracy(prediction, example.accepted)
