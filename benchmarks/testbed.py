"""Does it matter on the scenes which visual tokens are kept?

    python -m benchmarks.testbed FOLDER [FOLDER …] --journals runs/testbed

For each model, a checkpoint that was trained on scenes, at several budgets: its methods, `random`
(the mean of five seeds) and `uniform`, and the bounds `oracle` and `anti`, by family of questions;
then the checks that keep a bed honest. An oracle far from the unpruned model, an anti far from what
is answered without looking, or half the pixels doing as well as all of them, would say that the bed
measures something else. With --journals an interrupted run goes on. The last line is one JSON
object.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import print_record
from catp_jax import api
from catp_jax.model import Model
from catp_jax.pruning import BOUNDS, methods_for
from catp_jax.study.half_pixels import halved
from catp_jax.study.journal import Journal
from catp_jax.study.records import Answer, Conditions, Setting
from catp_jax.study.results import RANDOM, difference, families, interval, mean_over, needed_kept
from catp_jax.study.sweep import sweep
from catp_jax.study.tasks import Example, Task
from catp_jax.training.scene_questions import COUNTS, scenes_task

SHARES = ("50%", "25%", "12.5%", "6%", "3%", "1.5%")
SEEDS = 5


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


def without_looking(task: Task) -> dict[str, float]:
    """By family, the accuracy of the commonest answer among the train scenes' questions of a kind
    of words: all that can be known unseen.
    """

    def words(example: Example) -> str:
        return " ".join(example.question.split()[:2])

    said: dict[str, Counter[str]] = defaultdict(Counter)
    for example in scenes_task(split="train", scenes=400).examples:
        said[example.family + words(example)][example.answer] += 1
    best = {key: counts.most_common(1)[0][0] for key, counts in said.items()}
    right = defaultdict(list)
    for example in task.examples:
        right[example.family].append(best.get(example.family + words(example)) == example.answer)
    return {family: float(np.mean(some)) for family, some in right.items()}


def figures(answers: tuple[Answer, ...], numbers: list[int]) -> tuple[float, float, float]:
    """Accuracy of some of the questions, with its interval."""
    some = [answers[number] for number in numbers]
    scores = [one.score for one in some]
    return (float(np.mean(scores)), *interval(scores, [one.image for one in some]))


def miscounted(answers: tuple[Answer, ...], right: dict[str, str], numbers: list[int]) -> float:
    """By how much counts are too high, in the mean over the answers that are a number."""
    said = [(answers[number].text.strip(), right[answers[number].id]) for number in numbers]
    off = [COUNTS.index(one) - COUNTS.index(true) for one, true in said if one in COUNTS]
    return float(np.mean(off)) if off else float("nan")


def said_yes(answers: tuple[Answer, ...], numbers: list[int]) -> float:
    """How often the answer was yes."""
    return float(np.mean([answers[number].text.strip() == "yes" for number in numbers]))


def accuracy(answers: tuple[Answer, ...], numbers: list[int]) -> str:
    """Accuracy in %, and half its interval."""
    mean, low, high = figures(answers, numbers)
    return f"{100 * mean:.0f} ± {50 * (high - low):.0f}"


def table(
    title: str,
    by: dict[tuple[str, str], tuple[Answer, ...]],
    cell: Callable[[tuple[Answer, ...]], str],
) -> Table:
    """Methods by budget."""
    out = Table(title=title)
    out.add_column("kept", no_wrap=True)
    for share in SHARES:
        out.add_column(share, justify="right", no_wrap=True)
    for method in dict.fromkeys(method for method, _ in by):
        out.add_row(method, *(cell(by[method, share]) for share in SHARES))
    return out


def study(folder: Path, task: Task, journals: Path | None, console: Console) -> dict[str, Any]:
    """Prints a model's tables and returns its figures."""
    model, name = api.load(folder, generation_config=False), folder.resolve().name
    path = None if journals is None else journals / f"{name}.jsonl"
    methods = [method for method in methods_for(model.sites) if method != RANDOM]
    draws = [f"{RANDOM}:seed={10_000 * seed}" for seed in range(SEEDS)]
    settings = [
        Setting(method, share) for method in (*methods, *draws, *BOUNDS) for share in SHARES
    ]
    answers = answers_of(model, task, task.examples, settings, path)
    unpruned = next(iter(answers.values()))
    path = None if journals is None else journals / f"{name}-halved.jsonl"
    (coarse,) = answers_of(model, task, halved(task.examples), [], path).values()

    by = {
        (method, share): answers[Setting(method, share)]
        for method in (*methods, *BOUNDS)
        for share in SHARES
    }
    for share in SHARES:
        by[RANDOM, share] = mean_over([answers[Setting(draw, share)] for draw in draws])
    prior = without_looking(task)
    found: dict[str, Any] = {}
    for family, numbers in families(unpruned).items():
        console.print(
            table(f"{name}, {family}: accuracy (%)", by, partial(accuracy, numbers=numbers))
        )
        whole, half = figures(unpruned, numbers)[0], figures(coarse, numbers)[0]
        console.print(
            f"unpruned {100 * whole:.1f}, half the pixels {100 * half:.1f}, unseen "
            f"{100 * prior[family]:.1f}\n"
        )
        found[family] = {
            "questions": len(numbers),
            "unpruned": figures(unpruned, numbers),
            "half the pixels": half,
            "unseen": prior[family],
            "accuracy": {
                f"{method}, {share}": figures(some, numbers) for (method, share), some in by.items()
            },
        }
    # Do wrong counts, and answers about existence, lean to a side? Means over seeds have no text,
    # so of random the first seed stands for all.
    texts = {key: some for key, some in by.items() if key[0] != RANDOM}
    texts |= {(RANDOM, share): answers[Setting(draws[0], share)] for share in SHARES}
    right = {example.id: example.answer for example in task.examples}
    by_family = families(unpruned)
    leaning = {
        ("count", "by how much counts are too high", "+.2f"): lambda some: miscounted(
            some, right, by_family["count"]
        ),
        ("existence", "how often the answer is yes", ".2f"): lambda some: said_yes(
            some, by_family["existence"]
        ),
    }
    for (family, what, form), measure in leaning.items():

        def cell(some: tuple[Answer, ...], measure: Any = measure, form: str = form) -> str:
            return format(measure(some), form)

        console.print(table(f"{name}: {what}", texts, cell))
        console.print(f"unpruned {cell(unpruned)}\n")
        found[family][what] = {"unpruned": measure(unpruned)} | {
            f"{method}, {share}": measure(some) for (method, share), some in texts.items()
        }
    found["all"] = {
        "against random": {
            f"{method}, {share}": difference(some, by[RANDOM, share])
            for (method, share), some in by.items()
            if method != RANDOM
        },
        "needed, kept": {
            f"{method}, {share}": needed_kept(some) for (method, share), some in by.items()
        },
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--journals", type=Path, help="folder where the answers are kept")
    arguments = parser.parse_args()
    console = Console()
    task = scenes_task(split=arguments.split, scenes=arguments.scenes)
    models = {
        folder.resolve().name: study(folder, task, arguments.journals, console)
        for folder in arguments.model
    }
    print_record("testbed", task, models=models)


if __name__ == "__main__":
    main()
