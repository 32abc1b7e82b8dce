"""Does it matter on the scenes which visual tokens are kept?

    python -m benchmarks.testbed FOLDER [FOLDER …] --journals runs/testbed

For each model, a checkpoint that was trained on scenes, at several budgets: its methods, `random`
(the mean of five seeds) and `uniform`, and the bounds `oracle` and `anti`, by family of questions;
then the checks that keep a bed honest. An oracle far from the unpruned model, an anti far from what
is answered blind, blind answers better than guessing, or half the pixels doing as well as all of
them would say that the bed measures something else. With --journals an interrupted run goes on. The
last line is one JSON object.
"""

import argparse
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import names_of, print_record
from benchmarks.tables import plus_minus, points
from catp_jax import api
from catp_jax.model import Model
from catp_jax.pruning import BOUNDS, methods_for
from catp_jax.study.half_pixels import halved
from catp_jax.study.journal import Journal
from catp_jax.study.records import Answer, Conditions, Setting
from catp_jax.study.results import (
    RANDOM,
    difference,
    families,
    mean_and_interval,
    mean_over,
    needed_kept,
)
from catp_jax.study.sweep import sweep
from catp_jax.study.tasks import Example, Task
from catp_jax.training.scene_questions import COUNTS, scenes_task

SHARES = ("50%", "25%", "12.5%", "6%", "3%", "1.5%")
CHECKED = "6%"  # where the bounds are held against what they should be near
SEEDS = 5
DRAWS = tuple(f"{RANDOM}:seed={10_000 * seed}" for seed in range(SEEDS))

Answers = Sequence[Answer]
By = dict[tuple[str, str], Any]
"""By method and budget."""


def answers_of(
    model: Model,
    task: Task,
    examples: Sequence[Example],
    settings: list[Setting],
    path: Path | None,
) -> dict[Setting, tuple[Answer, ...]]:
    """The answers under each setting, and of the unpruned model."""
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt)
    journal = None if path is None else Journal(path)
    results = sweep(model, examples, settings, conditions, score=task.score, journal=journal)
    return {result.setting: result.answers for result in results}


def blind(examples: Sequence[Example]) -> list[Example]:
    """The same questions about grey images."""
    return [
        dataclasses.replace(one, image=np.full_like(np.asarray(one.image), 128)) for one in examples
    ]


def guessed(task: Task) -> dict[str, float]:
    """By family, how often the commonest answer is right among the train scenes' questions that
    begin with the same two words.
    """

    def begins(example: Example) -> str:
        return " ".join(example.question.split()[:2])

    said: dict[str, Counter[str]] = defaultdict(Counter)
    for example in scenes_task(split="train", scenes=400).examples:
        said[example.family + begins(example)][example.answer] += 1
    best = {key: counts.most_common(1)[0][0] for key, counts in said.items()}
    right = defaultdict(list)
    for example in task.examples:
        right[example.family].append(best.get(example.family + begins(example)) == example.answer)
    return {family: float(np.mean(some)) for family, some in right.items()}


def accuracy(answers: Answers) -> tuple[float, float, float]:
    """With its interval."""
    return mean_and_interval([one.score for one in answers], [one.image for one in answers])


def figures(answers: Answers, **others: Answers) -> dict[str, tuple[float, float, float]]:
    """Accuracy, and the paired differences to other answers."""
    apart = {f"to {name}": difference(answers, some) for name, some in others.items()}
    return {"accuracy": accuracy(answers), **apart}


def of(answers: Answers, numbers: list[int]) -> list[Answer]:
    """Some of the answers."""
    return [answers[number] for number in numbers]


def off_by(answers: Answers, right: dict[str, str]) -> tuple[float | None, float]:
    """By how much counts are too high, in the mean over answers that are a count (None if none is),
    and the share of the answers that are not.
    """
    off = [
        COUNTS.index(said) - COUNTS.index(right[one.id])
        for one in answers
        if (said := one.text.strip()) in COUNTS
    ]
    return (float(np.mean(off)) if off else None), 1 - len(off) / len(answers)


def said_yes(answers: Answers, right: dict[str, str]) -> tuple[float, float]:
    """The shares of the answers that are yes, and neither yes nor no."""
    said = Counter(one.text.strip() for one in answers)
    return said["yes"] / len(answers), 1 - (said["yes"] + said["no"]) / len(answers)


LEANINGS = {
    "count": ("by how much counts are too high, and answers that are none", off_by, "+.2f"),
    "existence": ("answers that are yes, and that are neither yes nor no", said_yes, ".0%"),
}
"""To which side the answers of a family lean: what is said of it, what measures it, its form."""


def table(title: str, by: By, cell: Callable[[Any], str]) -> Table:
    """Methods by budget."""
    out = Table(title=title)
    out.add_column("kept", no_wrap=True)
    shares = [*dict.fromkeys(share for _, share in by)]
    for share in shares:
        out.add_column(share, justify="right", no_wrap=True)
    for method in dict.fromkeys(method for method, _ in by):
        out.add_row(method, *(cell(by[method, share]) for share in shares))
    return out


def leanings(
    family: str,
    by: dict[tuple[str, str], Answers],
    draws: dict[str, list[Answers]],
    unpruned: Answers,
    right: dict[str, str],
    console: Console,
) -> dict[str, Any]:
    """Prints and returns to which side answers lean. What `random` draws is measured draw by draw,
    since a mean over draws has no text.
    """
    what, measure, form = LEANINGS[family]

    def of_all(some: list[Answers]) -> tuple[float | None, float]:
        each = [measure(answers, right) for answers in some]
        sides = [side for side, _ in each if side is not None]
        return (float(np.mean(sides)) if sides else None), float(np.mean([n for _, n in each]))

    def cell(found: tuple[float | None, float]) -> str:
        side, other = found
        return f"{'–' if side is None else format(side, form)}\n{other:.0%}"

    found: By = {key: of_all([some]) for key, some in by.items() if key[0] != RANDOM}
    found |= {(RANDOM, share): of_all(some) for share, some in draws.items()}
    console.print(table(what, found, cell))
    whole = of_all([unpruned])
    console.print(f"unpruned {cell(whole).replace(chr(10), ', ')}\n")
    return {
        "what": what,
        "unpruned": whole,
        **{f"{method}, {share}": x for (method, share), x in found.items()},
    }


CHECKS: dict[str, Callable[[dict[str, Any]], tuple[float, float, float]]] = {
    "oracle −\nunpruned": lambda found: found["kept"][f"oracle, {CHECKED}"]["to unpruned"],
    "anti −\nblind": lambda found: found["kept"][f"anti, {CHECKED}"]["to blind"],
    "half the pixels −\nunpruned": lambda found: found["half the pixels"]["to unpruned"],
}
"""What should be near zero, near zero, and below it."""


def checks(families: dict[str, dict[str, Any]]) -> Table:
    """What a bed must show, by family: paired differences in points, with their intervals."""
    out = Table(title=f"Checks: differences in points, oracle and anti at {CHECKED}")
    for column in ("", *CHECKS, "blind −\nguessed"):
        out.add_column(column, justify="right" if column else "left", no_wrap=True)
    for family, found in families.items():
        told = [points(pick(found)) for pick in CHECKS.values()]
        apart = 100 * (found["blind"]["accuracy"][0] - found["guessed"])
        out.add_row(family, *told, f"{apart:+.0f}")
    return out


def study(
    folder: Path,
    name: str,
    task: Task,
    shares: Sequence[str],
    journals: Path | None,
    console: Console,
) -> Any:
    """Prints a model's tables and returns its figures."""
    model = api.load(folder, generation_config=False)

    def answers(examples: Sequence[Example], settings: list[Setting], of: str = "") -> Any:
        path = None if journals is None else journals / f"{name}{of}.jsonl"
        return answers_of(model, task, examples, settings, path)

    methods = [method for method in methods_for(model.sites) if method != RANDOM]
    pruned = [Setting(m, share) for m in (*methods, *DRAWS, *BOUNDS) for share in shares]
    given = answers(task.examples, pruned)
    unpruned = next(iter(given.values()))
    (coarse,) = answers(halved(task.examples), [], "-halved").values()
    (grey,) = answers(blind(task.examples), [], "-blind").values()
    draws = {share: [given[Setting(draw, share)] for draw in DRAWS] for share in shares}
    by = {(m, share): given[Setting(m, share)] for m in (*methods, *BOUNDS) for share in shares}
    by |= {(RANDOM, share): mean_over(some) for share, some in draws.items()}

    right, prior = {one.id: one.answer for one in task.examples}, guessed(task)
    found: dict[str, Any] = {}
    for family, numbers in families(unpruned).items():
        whole, half, dark = (of(some, numbers) for some in (unpruned, coarse, grey))
        own = {key: of(some, numbers) for key, some in by.items()}
        kept = {
            key: figures(some, unpruned=whole, random=own[RANDOM, key[1]], blind=dark)
            for key, some in own.items()
        }
        accuracies = {key: one["accuracy"] for key, one in kept.items()}
        console.print(table(f"{name}, {family}: accuracy (%)", accuracies, plus_minus))
        seen = {
            "unpruned": figures(whole),
            "half the pixels": figures(half, unpruned=whole),
            "blind": figures(dark, unpruned=whole),
        }
        told = [f"{how} {plus_minus(one['accuracy'])}" for how, one in seen.items()]
        console.print(f"{', '.join(told)}, guessed {100 * prior[family]:.0f}\n")
        found[family] = {
            "questions": len(numbers),
            **seen,
            "guessed": prior[family],
            "kept": {f"{method}, {share}": one for (method, share), one in kept.items()},
        }
        if family in LEANINGS:
            each = {share: [of(one, numbers) for one in some] for share, some in draws.items()}
            found[family]["leaning"] = leanings(family, own, each, whole, right, console)
    console.print(checks(found))
    needed = {f"{method}, {share}": needed_kept(some) for (method, share), some in by.items()}
    return {"checksum": model.describe()["checksum"], "families": found, "needed, kept": needed}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    among = f"{CHECKED.replace('%', '%%')} among them"
    parser.add_argument("--shares", nargs="+", default=SHARES, help=among)
    parser.add_argument("--journals", type=Path, help="folder where the answers are kept")
    options = parser.parse_args(arguments)
    if CHECKED not in options.shares:
        parser.error(f"--shares must have {CHECKED}, at which the bounds are checked")
    names, console = names_of(options.model), Console()
    task = scenes_task(split=options.split, scenes=options.scenes)
    models = {
        name: study(folder, name, task, options.shares, options.journals, console)
        for name, folder in names.items()
    }
    print_record("testbed", task, models=models)


if __name__ == "__main__":
    main()
