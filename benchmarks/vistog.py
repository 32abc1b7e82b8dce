"""What is VisToG's grouping worth, trained alone, with the projector, with the language model?

Regime: questions about scenes and a mini BLIP-2, against the paper's (arXiv 2411.17773) LLaVA at
seven billion; the groups of our grouping do not pass through the image encoder. Teacher-forced: an
answer is right where greedy decoding would give exactly it.

    taskset -c 1 python -m benchmarks.vistog --work runs/vistog

The rate at which the model is trained is the best of two on validation scenes, for VisToG with the
language model and the fewest groups; test scenes are looked at once, after all training. Baselines
learn nothing (nearest_centroid, pool, the mean of five random). One more, nearest_centroid with the
language model trained to read its means, at VisToG's rate, says what of the gain is the grouping's.
With the same --work an interrupted run goes on. Prints a table; the last line is one JSON object.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import print_record
from benchmarks.tables import plus_minus
from catp_jax import api
from catp_jax.pruning import NearestCentroid, Pool, Random, VisToGGrouping
from catp_jax.study.records import UNPRUNED
from catp_jax.study.results import RANDOM, mean_and_interval
from catp_jax.training.scene_answers import answered
from catp_jax.training.scene_bank import Bank, judge
from catp_jax.training.scene_questions import FAMILIES, Asked, questions_of, scenes_task
from catp_jax.training.scenes import make_scene
from catp_jax.training.vistog_grouping import (
    PEAK,
    TRAINED,
    make_bank,
    train_grouping,
    train_reading,
)

MINI = Path(__file__).resolve().parents[1] / "catp_jax" / "assets" / "scenes-blip2-t5"
KEEPS = (16, 8)
RATES = (3e-4, 1e-3)
DRAWS, EACH = 5, 2  # seeds of random, and questions of a family about each scene
VISTOG, CENTROID, WHOLE = "vistog_grouping", "nearest_centroid", "language_model"

Gain = tuple[float, float, float]
"""A mean and its 95 % interval over images."""


class Judges:
    """Questions about some scenes, and how right they are answered."""

    def __init__(self, model: Any, tokenizer: Any, split: str, scenes: int):
        found = questions_of(split, scenes, each=EACH)
        self.asked: list[list[Asked]] = [asked for _, asked in found]
        self.bank = make_bank(model, tokenizer, [scene for scene, _ in found])
        self.images = np.repeat(np.arange(len(self.asked)), [*map(len, self.asked)])
        self.families = np.array([one.family for asked in self.asked for one in asked])

    def scores(self, model: Any, method: Any) -> np.ndarray:
        """Of each question, of what a method leaves (None: of all tokens)."""
        return np.concatenate(judge(answered(model, method), self.bank, self.asked))

    def estimate(self, scores: np.ndarray, family: str | None = None) -> Gain:
        """The mean of one family (None: of all), with its interval."""
        of = slice(None) if family is None else self.families == family
        return mean_and_interval(scores[of], self.images[of])


def trainings(
    model: Any, bank: Bank, options: argparse.Namespace, rate: float
) -> Iterator[tuple[str, int, int, Any, Any]]:
    """What is trained, for so many tokens, with a seed: the model, and the method before it."""
    asked = {"steps": options.steps, "scenes": options.batch, "model_peak": rate}
    for seed in range(options.seeds):
        for keep in options.keeps:
            for trained in TRAINED:
                work = options.work / f"{trained}-{keep}-{seed}-{rate}"
                grouping, own = train_grouping(
                    model, bank, keep, work, trained=trained, seed=seed, **asked
                )
                yield f"{VISTOG}, {trained}", keep, seed, own, made(keep, grouping)
            work = options.work / f"{CENTROID}-{keep}-{seed}-{rate}"
            method = NearestCentroid(keep=keep)
            own = train_reading(model, bank, method, work, trained=WHOLE, seed=seed, **asked)
            yield f"{CENTROID}, {WHOLE}", keep, seed, own, method


def made(keep: int, grouping: Any) -> VisToGGrouping:
    return VisToGGrouping(keep=keep, grouping=grouping)


def chosen_rate(
    model: Any, bank: Bank, judges: Judges, options: argparse.Namespace
) -> tuple[float, dict[str, float]]:
    """VisToG's best rate on validation scenes, and the share of right answers by rate."""
    keep, shares = min(options.keeps), {}
    for rate in options.rates:
        work = options.work / f"{WHOLE}-{keep}-0-{rate}"
        grouping, own = train_grouping(
            model,
            bank,
            keep,
            work,
            trained=WHOLE,
            steps=options.steps,
            scenes=options.batch,
            model_peak=rate,
        )
        shares[rate] = float(judges.scores(own, made(keep, grouping)).mean())
    return max(shares, key=lambda rate: shares[rate]), {str(r): x for r, x in shares.items()}


def figures(judges: Judges, scores: np.ndarray, others: dict[str, np.ndarray]) -> dict[str, Gain]:
    """Right answers, of all questions and by family, and the paired differences to others."""
    found = {}
    for family in (None, *(one for one in FAMILIES if one in judges.families)):
        name = "" if family is None else f", {family}"
        found[f"accuracy{name}"] = judges.estimate(scores, family)
        for other, theirs in others.items():
            found[f"against {other}{name}"] = judges.estimate(scores - theirs, family)
    return found


def show(console: Console, rows: dict[str, dict[str, Any]]) -> None:
    """Right answers by family."""
    table = Table(title="right answers, %")
    columns = [name for name in rows[UNPRUNED] if name.startswith("accuracy")]
    for column in ("", *columns):
        table.add_column(column.removeprefix("accuracy, "), justify="right" if column else "left")
    for name, row in rows.items():
        table.add_row(name, *(plus_minus(row[column]) for column in columns))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=MINI, help="default: the mini with T5")
    parser.add_argument("--work", type=Path, required=True, help="folder to resume from")
    parser.add_argument("--keeps", type=int, nargs="+", default=KEEPS)
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="scenes in a step")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="to choose from")
    parser.add_argument("--train-scenes", type=int, default=512)
    parser.add_argument("--scenes", type=int, default=200, help="test scenes; half for validation")
    options = parser.parse_args(arguments)
    loaded = api.load(options.model, generation_config=False)
    model, tokenizer = loaded.network.thaw(), loaded.reader.tokenizer
    scenes = [make_scene("train", number) for number in range(options.train_scenes)]
    bank = make_bank(model, tokenizer, scenes)
    validation = Judges(model, tokenizer, "validation", max(options.scenes // 2, 1))
    rate, shares = chosen_rate(model, bank, validation, options)
    trained = list(trainings(model, bank, options, rate))

    judges = Judges(model, tokenizer, "test", options.scenes)
    unpruned = judges.scores(model, None)
    rows: dict[str, dict[str, Any]] = {UNPRUNED: figures(judges, unpruned, {})}
    for keep in options.keeps:
        draws = [judges.scores(model, Random(keep=keep, seed=10_000 * n)) for n in range(DRAWS)]
        scores = {
            CENTROID: judges.scores(model, NearestCentroid(keep=keep)),
            "pool": judges.scores(model, Pool(keep=keep)),
            f"{RANDOM}, {DRAWS} seeds": np.mean(draws, axis=0),
        }
        by_seed: dict[str, list[np.ndarray]] = {}
        for name, own, _, network, method in trained:
            if own == keep:
                by_seed.setdefault(name, []).append(judges.scores(network, method))
        scores |= {name: np.mean(some, axis=0) for name, some in by_seed.items()}
        tuned = f"{CENTROID}, {WHOLE}"
        others = {UNPRUNED: unpruned, **{name: scores[name] for name in (CENTROID, "pool", tuned)}}
        for name, own in scores.items():
            apart = {other: some for other, some in others.items() if other != name}
            rows[f"{name}, {keep}"] = figures(judges, own, apart)
        for name, some in by_seed.items():
            rows[f"{name}, {keep}"]["by seed"] = [float(one.mean()) for one in some]
    show(Console(), rows)
    settings = {
        name: getattr(options, name)
        for name in ("keeps", "seeds", "steps", "batch", "train_scenes")
    }
    print_record(
        "vistog",
        scenes_task(split="test", scenes=options.scenes, each=EACH),
        model=options.model.resolve().name,
        checksum=loaded.checksum,
        settings={**settings, "peak": PEAK, "model_peak": rate, "validation by rate": shares},
        rows=rows,
    )


if __name__ == "__main__":
    main()
