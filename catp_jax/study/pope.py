"""POPE from its authors' files: is there such an object in the image? Yes or no.

Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv 2305.10355;
https://github.com/AoiDragon/POPE, output/coco/coco_pope_random.json, _popular and _adversarial, by
how the absent objects were chosen. A file is JSON lines about images of COCO's val2014:

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in
     the image?", "label": "yes"}

An answer is scored as their evaluate.py does: by its first sentence, which says no if one of its
words is No, no or not, and otherwise yes. The families are the labels, so that a family's accuracy
is the recall of yes or of no.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from catp_jax import strict_json
from catp_jax.readers.rows import lines_of
from catp_jax.study.published import (
    Images,
    is_number,
    is_text,
    published_task,
    refuse_twice,
    wrong_form,
)
from catp_jax.study.tasks import Example, Task

YES, NO = "yes", "no"


def pope_task(questions: Path, images: Path, fraction: float = 1.0, seed: int = 42) -> Task:
    """A random `fraction` of a file's questions, the same ones for the same seed.

    What doesn't fit (an image that is missing or damaged, a line of the wrong form) is left out and
    counted in `left_out`.

    Raises ValueError if the file has no questions, ids stand twice, or nothing is left.
    """
    folder = Images(images)
    lines = [(number, _row(line)) for number, line in lines_of(questions)]
    if not lines:
        raise ValueError(f"{questions} has no questions")
    refuse_twice((row["question_id"] for _, row in lines if _is_question(row)), questions)
    return published_task(
        "pope",
        lines,
        partial(_example, images=folder),
        score,
        files={"questions": questions},
        images=folder,
        fraction=fraction,
        seed=seed,
        measures=measures,
    )


def _row(line: bytes) -> Any:
    """The object in a line; if it is none, why."""
    try:
        return strict_json.parse(line)
    except ValueError as error:
        return str(error)


def _is_question(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and (is_number(row.get("question_id")) or is_text(row.get("question_id")))
        and is_text(row.get("image"))
        and is_text(row.get("text"))
        and row.get("label") in (YES, NO)
    )


def _example(numbered: tuple[int, Any], images: Images) -> Example:
    """The question in a line; raises Unfit."""
    line, row = numbered
    if not _is_question(row):
        raise wrong_form(f"line {line}", row)
    image, path = images.find(row["image"], f"val2014/{row['image']}")
    return Example(
        image=path,
        question=row["text"],
        answer=row["label"],
        id=str(row["question_id"]),
        image_id=image,
        family=row["label"],
    )


def said(answer: str) -> str:
    """What an answer comes to: yes or no."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return NO if {"No", "no", "not"} & {*words} else YES


def score(prediction: str, example: Example) -> float:
    """1.0 if the answer comes to what is right, else 0.0."""
    return float(said(prediction) == example.answer)


def measures(examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
    """Precision, recall and F1 of saying yes, and how often it was said; 0 where there is nothing
    to divide by.
    """
    is_there = [example.answer == YES for example in examples]
    said_yes = [there == bool(right) for there, right in zip(is_there, scores, strict=True)]
    both = sum(there and yes for there, yes in zip(is_there, said_yes, strict=True))
    return {
        "precision": both / max(sum(said_yes), 1),
        "recall": both / max(sum(is_there), 1),
        "F1": 2 * both / max(sum(said_yes) + sum(is_there), 1),
        "yes ratio": sum(said_yes) / max(len(said_yes), 1),
    }
