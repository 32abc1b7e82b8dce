"""VQAv2 from its official files: questions, ten people's answers to each, and COCO's images.

https://visualqa.org/download.html: v2_OpenEnded_mscoco_val2014_questions.json, the annotations
v2_mscoco_val2014_annotations.json, and a folder of images named COCO_val2014_000000000042.jpg (the
split is the files' `data_subtype`) or 000000000042.jpg, as COCO's later releases name them.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from catp_jax import strict_json
from catp_jax.study.tasks import (
    Example,
    Task,
    first_few,
    image_fault,
    official_vqa,
)
from catp_jax.study.vqa_score import PEOPLE

PROMPT = "Question: {question} Short answer:"


def vqav2_task(
    questions: Path, annotations: Path, images: Path, fraction: float = 1.0, seed: int = 42
) -> Task:
    """A random `fraction` of VQAv2's questions, the same ones for the same seed.

    What doesn't fit (an image or an annotation that is missing or damaged, an entry of the wrong
    form) is left out and counted in `left_out`.

    Raises ValueError if the files are not of the official form or of different splits, if ids
    stand twice, or if nothing is left.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is above 0 and at most 1, got {fraction}")
    if not images.is_dir():
        raise ValueError(f"image folder {str(images)!r} is not a folder")
    question_file = _entries(strict_json.read(questions), "questions", questions)
    annotation_file = _entries(strict_json.read(annotations), "annotations", annotations)
    splits = [str(file.get("data_subtype", "")) for file in (question_file, annotation_file)]
    if all(splits) and splits[0] != splits[1]:
        raise ValueError(
            f"the files are of different splits: {questions} of {splits[0]}, {annotations} of "
            f"{splits[1]}; give two of the same"
        )
    split = splits[1] or splits[0]
    _refuse_twice(question_file["questions"], questions)
    _refuse_twice(annotation_file["annotations"], annotations)

    number = len(question_file["questions"])
    chosen = np.random.default_rng(seed).permutation(number)[: max(1, round(fraction * number))]
    annotated = [entry for entry in annotation_file["annotations"] if _has_id(entry)]
    by_id = {entry["question_id"]: entry for entry in annotated}
    examples, faults, found_images = [], defaultdict(list), {}
    for index in sorted(chosen.tolist()):
        entry = question_file["questions"][index]
        try:
            examples.append(_example(entry, index, by_id, images, split, found_images))
        except Unfit as unfit:
            faults[unfit.kind].append(unfit.what)
    problems = [
        f"{len(entries)} of {len(chosen)} questions left out, {kind}: {first_few(entries)}"
        for kind, entries in faults.items()
    ]
    if not examples:
        raise ValueError(
            f"no question of {questions} can be used with {annotations} and the images in "
            f"{images}: " + "; ".join(problems)
        )
    return Task(
        name="vqav2",
        examples=tuple(examples),
        score=official_vqa,
        prompt=PROMPT,
        source={
            "questions": questions.name,
            "annotations": annotations.name,
            "fraction": fraction,
            "seed": seed,
            "drawn": len(chosen),
        },
        left_out={kind: len(which) for kind, which in faults.items()},
        problems=tuple(problems),
    )


class Unfit(Exception):
    """A question that cannot be used: what kind of fault it has, and which it is."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind, self.what = kind, what


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_number(entry.get("question_id"))


def _refuse_twice(entries: list[Any], path: Path) -> None:
    counts = Counter(entry["question_id"] for entry in entries if _has_id(entry))
    twice = [str(number) for number, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"{path} has question ids twice: {first_few(twice)}")


def _example(
    entry: Any,
    index: int,
    annotations: dict[int, Any],
    images: Path,
    split: str,
    found_images: dict[int, Path | str],
) -> Example:
    """One question with its answers and image; raises Unfit."""
    if (
        not _has_id(entry)
        or not _is_number(entry.get("image_id"))
        or not isinstance(entry.get("question"), str)
        or not entry["question"].strip()
    ):
        raise Unfit("of the wrong form", f"entry {index} is {json.dumps(entry)[:80]}")
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
    if image not in found_images:
        found_images[image] = _find(image, images, split)
    image_path = found_images[image]
    if isinstance(image_path, str):
        raise Unfit("without an image that can be read", image_path)
    texts = tuple(given["answer"] for given in answers)
    return Example(
        image=image_path,
        question=entry["question"],
        answer=str(annotation.get("multiple_choice_answer") or Counter(texts).most_common(1)[0][0]),
        id=str(number),
        image_id=image,
        answers=texts,
    )


def _find(image: int, folder: Path, split: str) -> Path | str:
    """The image's file, or what is wrong with it."""
    paths = list(_names(image, folder, split))
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return f"image {str(paths[0])!r} is not there"
    return image_fault(path) or path


def _names(image: int, folder: Path, split: str) -> Iterator[Path]:
    for place in (folder, folder / split):
        if split:
            yield place / f"COCO_{split}_{image:012d}.jpg"
        yield place / f"{image:012d}.jpg"
