"""Question files as their authors publish them: a share of them drawn, and what does not fit left
out and counted.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from catp_jax.messages import short
from catp_jax.study.tasks import Example, Measures, Score, Task, first_few, image_fault

PROMPT = "Question: {question} Short answer:"

Entry = TypeVar("Entry")


class Unfit(Exception):
    """A question that cannot be used: what kind of fault it has, and which it is."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(kind, what)
        self.kind, self.what = kind, what


class Images:
    """A folder of images, each of which is looked at once.

    Raises ValueError if it is none.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"image folder {str(folder)!r} is not a folder")
        self.folder = folder
        self._found: dict[str, tuple[int, Path, str]] = {}

    def find(self, *names: str) -> tuple[int, Path]:
        """An image that may have any of these names: its number, in the order in which they were
        asked for, and its file. Raises Unfit.
        """
        if names[0] not in self._found:
            self._found[names[0]] = (len(self._found), *self._at(names))
        number, path, fault = self._found[names[0]]
        if fault:
            raise Unfit("without an image that can be read", fault)
        return number, path

    def _at(self, names: Sequence[str]) -> tuple[Path, str]:
        """A file, and what is wrong with it."""
        paths = [self.folder / name for name in names]
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path is None:
            return paths[0], f"image {str(paths[0])!r} is not there"
        return path, image_fault(path)


def published_task(
    name: str,
    entries: Sequence[Entry],
    example: Callable[[Entry], Example],
    score: Score,
    *,
    files: dict[str, Path],
    images: Images,
    fraction: float = 1.0,
    seed: int = 42,
    measures: Measures | None = None,
) -> Task:
    """A random `fraction` of a file's entries as a task, the same ones for the same seed, in the
    file's order. `example` makes a question of an entry or raises Unfit.

    Raises ValueError if nothing is left, and for a fraction that is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is above 0 and at most 1, got {fraction}")
    order = np.random.default_rng(seed).permutation(len(entries))
    chosen = sorted(order[: max(1, round(fraction * len(entries)))].tolist())
    examples, faults = [], defaultdict(list)
    for index in chosen:
        try:
            examples.append(example(entries[index]))
        except Unfit as unfit:
            faults[unfit.kind].append(unfit.what)
    problems = [
        f"{len(which)} of {len(chosen)} questions left out, {kind}: {first_few(which)}"
        for kind, which in faults.items()
    ]
    if not examples:
        first, *others = map(str, files.values())
        beside = f" with {', '.join(others)}" if others else ""
        raise ValueError(
            f"no question of {first} can be used{beside} and the images in {images.folder}: "
            + "; ".join(problems)
        )
    return Task(
        name=name,
        examples=tuple(examples),
        score=score,
        prompt=PROMPT,
        source={
            **{key: path.name for key, path in files.items()},
            "fraction": fraction,
            "seed": seed,
            "drawn": len(chosen),
        },
        left_out={kind: len(which) for kind, which in faults.items()},
        problems=tuple(problems),
        measures=measures,
    )


def refuse_twice(ids: Iterable[Any], path: Path) -> None:
    """Raises ValueError if a question's id stands twice."""
    twice = [str(number) for number, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has question ids twice: {first_few(twice)}")


def wrong_form(where: str, entry: Any) -> Unfit:
    """An entry that is no question."""
    return Unfit("of the wrong form", f"{where} is {short(json.dumps(entry))}")


def is_number(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: Any) -> bool:
    """Whether it is a text that is not empty."""
    return isinstance(value, str) and bool(value.strip())
