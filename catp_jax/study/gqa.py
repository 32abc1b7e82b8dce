"""GQA from its authors' files: questions made from the scene graphs of Visual Genome's images.

Hudson and Manning, "GQA: A New Dataset for Real-World Visual Reasoning and Compositional Question
Answering", arXiv 1902.09506; https://cs.stanford.edu/people/dorarad/gqa/download.html. A file, such
as testdev_balanced_questions.json, is one object of questions by their ids,

    {"201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no",
     "isBalanced": true, "types": {"structural": "verify", …}, …}, …}

and an image is n161313.jpg. As in their eval.py, an answer counts if it is the right one, and only
questions of the balanced set do. The answers there are lower case; one's own is made so, and loses
the full stop that models put behind it, as LLaVA's convert_gqa_for_eval.py does. The families are
the structural types: verify, query, choose, logical and compare; query is what eval.py calls open,
and the others are binary.
"""

from functools import partial
from pathlib import Path
from typing import Any

from catp_jax import strict_json
from catp_jax.study.published import Images, Unfit, is_text, published_task, wrong_form
from catp_jax.study.tasks import Example, Task


def gqa_task(questions: Path, images: Path, fraction: float = 1.0, seed: int = 42) -> Task:
    """A random `fraction` of a file's questions, the same ones for the same seed.

    What doesn't fit (an image that is missing or damaged, an entry of the wrong form, without an
    answer or not of the balanced set) is left out and counted in `left_out`.

    Raises ValueError if the file is not of the official form or has a key twice, or if nothing is
    left.
    """
    folder = Images(images)
    entries = strict_json.read(questions)
    if not entries:
        raise ValueError(f"{questions} has no questions")
    if not any(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(
            f"{questions} is no GQA question file: it must have questions by their ids, got "
            f"{', '.join(map(repr, list(entries)[:5]))}"
        )
    return published_task(
        "gqa",
        list(entries.items()),
        partial(_example, images=folder),
        score,
        files={"questions": questions},
        images=folder,
        fraction=fraction,
        seed=seed,
    )


def _example(item: tuple[str, Any], images: Images) -> Example:
    """One question; raises Unfit."""
    number, entry = item
    if (
        not isinstance(entry, dict)
        or not is_text(entry.get("imageId"))
        or not is_text(entry.get("question"))
    ):
        raise wrong_form(f"question {number}", entry)
    if entry.get("isBalanced") is False:
        raise Unfit("not of the balanced set, which alone is scored", f"question {number}")
    if not is_text(entry.get("answer")):
        raise Unfit("without an answer", f"question {number}")
    types = entry.get("types")
    family = types.get("structural") if isinstance(types, dict) else None
    name = f"{entry['imageId']}.jpg"
    image, path = images.find(name, f"images/{name}")
    return Example(
        image=path,
        question=entry["question"],
        answer=entry["answer"],
        id=number,
        image_id=image,
        family=family if isinstance(family, str) else "",
    )


def score(prediction: str, example: Example) -> float:
    """1.0 if it is the answer but for case, space around it and a full stop behind, else 0.0."""
    return float(prediction.strip().rstrip(".").lower() == example.answer.strip().lower())
