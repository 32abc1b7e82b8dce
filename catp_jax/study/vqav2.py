"""VQAv2 from its official files: questions, ten people's answers to each, and COCO's images.

https://visualqa.org/download.html: v2_OpenEnded_mscoco_val2014_questions.json, the annotations
v2_mscoco_val2014_annotations.json, and a folder of images named COCO_val2014_000000000042.jpg (the
split is the files' `data_subtype`) or 000000000042.jpg, as COCO's later releases name them.
"""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from catp_jax import strict_json
from catp_jax.study.published import (
    Images,
    Unfit,
    is_number,
    is_text,
    published_task,
    refuse_twice,
    wrong_form,
)
from catp_jax.study.tasks import Example, Task, official_vqa
from catp_jax.study.vqa_score import PEOPLE


def vqav2_task(
    questions: Path, annotations: Path, images: Path, fraction: float = 1.0, seed: int = 42
) -> Task:
    """A random `fraction` of VQAv2's questions, the same ones for the same seed.

    What doesn't fit (an image or an annotation that is missing or damaged, an entry of the wrong
    form) is left out and counted in `left_out`.

    Raises ValueError if the files are not of the official form or of different splits, if ids
    stand twice, or if nothing is left.
    """
    folder = Images(images)
    question_file = _entries(strict_json.read(questions), "questions", questions)
    annotation_file = _entries(strict_json.read(annotations), "annotations", annotations)
    splits = [str(file.get("data_subtype", "")) for file in (question_file, annotation_file)]
    if all(splits) and splits[0] != splits[1]:
        raise ValueError(
            f"the files are of different splits: {questions} of {splits[0]}, {annotations} of "
            f"{splits[1]}; give two of the same"
        )
    split = splits[1] or splits[0]
    asked, annotated = question_file["questions"], annotation_file["annotations"]
    for entries, path in ((asked, questions), (annotated, annotations)):
        refuse_twice((entry["question_id"] for entry in entries if _has_id(entry)), path)
    by_id = {entry["question_id"]: entry for entry in annotated if _has_id(entry)}
    return published_task(
        "vqav2",
        list(enumerate(asked)),
        partial(_example, annotations=by_id, images=folder, split=split),
        official_vqa,
        files={"questions": questions, "annotations": annotations},
        images=folder,
        fraction=fraction,
        seed=seed,
    )


def _entries(file: Any, key: str, path: Path) -> dict[str, Any]:
    """The file's object, checked to be of the kind that holds `key`."""
    what = key.removesuffix("s")
    if not isinstance(file, dict) or not isinstance(file.get(key), list):
        other = {"questions": "annotations", "annotations": "questions"}[key]
        is_other = isinstance(file, dict) and other in file
        hint = f"; it looks like the {other.removesuffix('s')} file" if is_other else ""
        raise ValueError(f"{path} is no VQAv2 {what} file: it has no list {key!r}{hint}")
    if not file[key]:
        raise ValueError(f"{path} has no {key}")
    kind, form = file.get("data_type", "mscoco"), file.get("task_type", "Open-Ended")
    if kind != "mscoco" or form != "Open-Ended":
        raise ValueError(
            f"{path} is of data type {kind!r} and task type {form!r}; they must be 'mscoco' and "
            f"'Open-Ended'"
        )
    return file


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and is_number(entry.get("question_id"))


def _example(
    numbered: tuple[int, Any], annotations: dict[int, Any], images: Images, split: str
) -> Example:
    """One question with its answers and image; raises Unfit."""
    index, entry = numbered
    if (
        not _has_id(entry)
        or not is_number(entry.get("image_id"))
        or not is_text(entry.get("question"))
    ):
        raise wrong_form(f"entry {index}", entry)
    number, image = entry["question_id"], entry["image_id"]
    annotation = annotations.get(number)
    if annotation is None:
        raise Unfit("without an annotation", f"question {number}")
    answers = annotation.get("answers")
    if not isinstance(answers, list) or not all(
        isinstance(given, dict) and isinstance(given.get("answer"), str) for given in answers
    ):
        raise Unfit("with an annotation of the wrong form", f"question {number}")
    if len(answers) != PEOPLE:
        raise Unfit(f"without {PEOPLE} answers", f"question {number} has {len(answers)}")
    if annotation.get("image_id", image) != image:
        raise Unfit(
            "annotated for another image",
            f"question {number} is about {image}, its annotation about {annotation['image_id']}",
        )
    names = (f"COCO_{split}_{image:012d}.jpg", f"{image:012d}.jpg")[0 if split else 1 :]
    _, path = images.find(*names, *(f"{split}/{name}" for name in names))
    texts = tuple(given["answer"] for given in answers)
    return Example(
        image=path,
        question=entry["question"],
        answer=str(annotation.get("multiple_choice_answer") or Counter(texts).most_common(1)[0][0]),
        id=str(number),
        image_id=image,
        answers=texts,
    )
