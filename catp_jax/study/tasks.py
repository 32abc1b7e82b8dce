"""Tasks: images, questions and the answers they are scored against.

easy-VQA (Victor Zhou, https://pypi.org/project/easy-vqa, MIT) is one coloured shape on a plain
background, 64×64 pixels, and 107 forms of questions with 13 answers. The package carries the data.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one image. `image_id` is the same for all questions of an image."""

    image: Path
    question: str
    answer: str
    id: str
    image_id: int


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


def score(prediction: str, answer: str) -> float:
    """1.0 if both are the same but for case and the space around them, else 0.0."""
    return float(prediction.strip().lower() == answer.strip().lower())
