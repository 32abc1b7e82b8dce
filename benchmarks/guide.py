"""Does a small guide say which visual tokens a larger model needs, and when that one may rest?

    python -m benchmarks.guide --journals runs/guide

Regime: questions about test scenes of many objects; the mini Llama Vision that was trained on such
and the shipped guide of a third of its size, of the same family and the same 260 visual tokens;
greedy answers. SGL at several budgets against the model's own attention (`trimmed_llama`, `fastv`)
and `random`, the mean of five seeds, at the same counts. All of them prune behind the first
cross-attention layer, which sees every token in the prefill. Then the guide alone, and the pair
with early exit: above a threshold the guide's answer counts. The thresholds were fixed before
anything was measured. With --journals the answers of the other methods are kept in that folder. The
last line is one JSON object.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import print_record
from benchmarks.tables import plus_minus
from benchmarks.testbed import DRAWS, Answers, accuracy, answers_of, of
from catp_jax import api
from catp_jax.guided import Guided, exit_curve, guided
from catp_jax.model import Model
from catp_jax.study.records import UNPRUNED, Conditions, Setting
from catp_jax.study.results import RANDOM, difference, families, mean_over, needed_kept
from catp_jax.study.tasks import Example, Task
from catp_jax.training.scene_questions import scenes_task

ASSETS = Path(__file__).resolve().parents[1] / "catp_jax" / "assets"
MINI, GUIDE = ASSETS / "scenes-llama-vision", ASSETS / "scenes-llama-vision-guide"
SHARES = ("25%", "12.5%", "6%")
OWN = ("trimmed_llama", "fastv")  # what the model itself attends to
THRESHOLDS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
BATCH = 40  # questions asked at once
ALONE, SGL = "guide alone", "sgl"


def asked(
    model: Model, guide: Model, task: Task, share: str
) -> list[tuple[Sequence[Example], Guided]]:
    """What the pair answers, batch by batch; the guide and the large model answer everything."""
    batches = []
    for start in range(0, len(task.examples), BATCH):
        some = task.examples[start : start + BATCH]
        prompts = [task.prompt.format(question=one.question) for one in some]
        options = {"max_new_tokens": Conditions().options.max_new_tokens}
        images = [one.image for one in some]
        out = guided(model, guide, images, prompts, keep=share, threshold=1, **options)
        batches.append((some, out))
    return batches


def needed_of(model: Model, examples: Sequence[Example]) -> list[np.ndarray]:
    """How much of each visual token an answer depends on, by question."""
    packed = model.prepare([one.image for one in examples], [one.question for one in examples])
    images, boxes = zip(*((one.image, one.needed) for one in examples), strict=True)
    return [*model.reader.needed(model.network, packed, images, boxes)]


def pair_of(
    batches: Sequence[tuple[Sequence[Example], Guided]],
    model: Model,
    task: Task,
    unpruned: Answers,
) -> tuple[Answers, Answers, list[float]]:
    """The large model's answers on what the guide chose, the guide's own, and how sure of each it
    is. Beside the text they are as the unpruned model's.
    """
    large, small, scores = [], [], []
    rest = iter(unpruned)
    for examples, out in batches:
        assert out.large is not None
        assert out.large.kept is not None
        assert out.scores is not None
        kept = [np.asarray(one.number) for one in out.large.kept]
        needed = needed_of(model, examples)
        for row, (example, base) in enumerate(zip(examples, rest, strict=False)):
            text, own, whole = out.text[row], out.guide.text[row], needed[row].sum()
            share = float(needed[row][kept[row]].sum() / whole) if whole else None
            numbers, right = tuple(kept[row].tolist()), task.score(text, example)
            large.append(
                dataclasses.replace(base, text=text, score=right, kept=numbers, needed=share)
            )
            small.append(dataclasses.replace(base, text=own, score=task.score(own, example)))
        scores += out.scores
    return large, small, scores


def figures(answers: Answers, **others: Answers) -> dict[str, Any]:
    """Accuracy and paired differences, of all questions and by family; the share of what is needed
    that was kept.
    """
    found: dict[str, Any] = {}
    for family, numbers in {"": [*range(len(answers))], **families(answers)}.items():
        behind, own = f", {family}" if family else "", of(answers, numbers)
        found[f"accuracy{behind}"] = accuracy(own)
        for name, some in others.items():
            found[f"against {name}{behind}"] = difference(own, of(some, numbers))
    return found | {"needed, kept": needed_kept(answers)}


def exits(large: Answers, small: Answers, scores: Sequence[float]) -> list[dict[str, Any]]:
    """By threshold the share that the guide answers, and what the pair is worth: `at random` is the
    accuracy if it answered as many, but any.
    """
    guide_right, large_right = ([one.score for one in some] for some in (small, large))
    curve, rows = exit_curve(scores, guide_right, large_right), []
    for threshold in THRESHOLDS:
        point = [one for one in curve if one.threshold <= threshold][-1]
        pair = [
            own if score > threshold else other
            for own, other, score in zip(small, large, scores, strict=True)
        ]
        by_chance = point.share * np.mean(guide_right) + (1 - point.share) * np.mean(large_right)
        rows.append(
            {
                "threshold": threshold,
                "share": point.share,
                "at random": float(by_chance),
                **figures(pair, **{SGL: large}),
            }
        )
    return rows


def shown(rows: dict[str, dict[str, Any]]) -> Table:
    """Accuracy by family, and the share of needed tokens kept."""
    names = [name for name in rows[UNPRUNED] if name.startswith("accuracy")]
    table = Table(title="right answers, %")
    for column in ("", "all", *(name.removeprefix("accuracy, ") for name in names[1:]), "needed"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for setting, found in rows.items():
        kept = "" if found["needed, kept"] is None else f"{100 * found['needed, kept']:.0f}"
        table.add_row(setting, *(plus_minus(found[name]) for name in names), kept)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MINI, help="default: the shipped mini")
    parser.add_argument("--guide", type=Path, default=GUIDE, help="default: the shipped guide")
    parser.add_argument("--scenes", type=int, default=80, help="with a question of each family")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--journals", type=Path, help="folder where the answers are kept")
    options = parser.parse_args(arguments)
    console = Console()
    task = scenes_task(split=options.split, scenes=options.scenes)
    model, guide = (
        api.load(folder, generation_config=False) for folder in (options.model, options.guide)
    )
    path = None if options.journals is None else options.journals / "guide.jsonl"
    settings = [Setting(method, share) for method in (*OWN, *DRAWS) for share in SHARES]
    given = answers_of(model, task, task.examples, settings, path)
    unpruned = given[Setting(UNPRUNED, None)]
    rows = {UNPRUNED: figures(unpruned)}
    exited: dict[str, Any] = {}
    for share in SHARES:
        large, small, scores = pair_of(asked(model, guide, task, share), model, task, unpruned)
        rows.setdefault(ALONE, figures(small, **{UNPRUNED: unpruned}) | {"needed, kept": None})
        others = {method: given[Setting(method, share)] for method in OWN}
        others[RANDOM] = mean_over([given[Setting(draw, share)] for draw in DRAWS])
        rows[f"{SGL}, {share}"] = figures(large, **{UNPRUNED: unpruned}, **others)
        for method, own in others.items():
            against = {UNPRUNED: unpruned, RANDOM: others[RANDOM]}
            rows[f"{method}, {share}"] = figures(own, **against)
        exited[share] = exits(large, small, scores)
    console.print(shown(rows))
    for share, found in exited.items():
        console.print(
            f"{share}: above the threshold the guide answers; its share, the pair's accuracy, and "
            "that of as many chosen at random"
        )
        for one in found:
            told = f"{100 * one['share']:.0f} %, {plus_minus(one['accuracy'])}"
            console.print(f"  {one['threshold']}: {told}, {100 * one['at random']:.0f}")
    models = {
        name: {"name": folder.resolve().name, **who.describe()}
        for name, folder, who in (
            ("large", options.model, model),
            ("guide", options.guide, guide),
        )
    }
    print_record("guide", task, models=models, rows=rows, exits=exited)


if __name__ == "__main__":
    main()
