"""A setting's figures, and the statistics behind them."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from catp_jax.study.half_pixels import HALVED
from catp_jax.study.records import UNPRUNED, Answer, Result, Setting, SettingCost

DRAWS = 2000  # of the bootstrap
RANDOM = "random"
NEEDS_PIXELS = "needs the pixels"
SEED = re.compile(r":seed=\d+")
DRAWN_AT_RANDOM = re.compile(rf"{RANDOM}({SEED.pattern})?(, \d+ seeds)?")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over questions, and its bootstrap 95 % interval over images."""

    mean: float
    low: float
    high: float


def result_of(
    cost: SettingCost,
    answers: Sequence[Answer],
    unpruned: Sequence[Answer],
    times: Sequence[float],
    seed: int,
    versions: dict[str, str],
    measures: dict[str, float],
) -> Result:
    """A setting's figures from its answers and the unpruned model's to the same questions.

    `times` are those of the batches, if they were measured; `measures` what else the task is
    reported by.
    """
    images = [answer.image for answer in answers]
    low, high = interval([answer.score for answer in answers], images, seed=seed)
    same = [own.text == other.text for own, other in zip(answers, unpruned, strict=True)]
    milliseconds, spread = median_and_spread(times) if times else (None, None)
    return Result(
        setting=cost.setting,
        questions=len(answers),
        images=len({*images}),
        visual_tokens=float(np.mean([answer.visual_tokens for answer in answers])),
        accuracy=float(np.mean([answer.score for answer in answers])),
        low=low,
        high=high,
        agreement=float(np.mean(same)),
        kl=float(np.mean([answer.kl for answer in answers])),
        milliseconds=milliseconds,
        spread=spread,
        cost=cost.cost,
        pruners=cost.pruners,
        seed=seed,
        versions=versions,
        measures=measures,
    )


def mean_and_interval(
    scores: Sequence[float] | np.ndarray, groups: Sequence[int] | np.ndarray, *, seed: int = 0
) -> tuple[float, float, float]:
    """The mean score, and its `interval`."""
    return (float(np.mean(scores, dtype=np.float64)), *interval(scores, groups, seed=seed))


def interval(
    scores: Sequence[float] | np.ndarray,
    groups: Sequence[int] | np.ndarray,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """A bootstrap 95 % interval of the mean score (percentiles).

    Questions about one image stand or fall together, so images are drawn, each with all its
    questions: `groups` says which image a score belongs to. With every score the same the interval
    is a point, and it is too narrow for a handful of images.
    """
    columns = np.asarray(scores, np.float64)[:, None]
    (low,), (high,) = intervals(columns, groups, seed=seed, draws=draws)
    return float(low), float(high)


def intervals(
    columns: np.ndarray, groups: Sequence[int] | np.ndarray, *, seed: int = 0, draws: int = DRAWS
) -> tuple[np.ndarray, np.ndarray]:
    """`interval` of each column of scores [questions, columns], of the same drawn images. Scores
    that are not a number count in no mean; each column has some that are.
    """
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    images = int(number.max()) + 1
    sums, counts = (np.zeros((images, columns.shape[1])) for _ in range(2))
    there = ~np.isnan(columns)
    np.add.at(sums, number, np.where(there, columns, 0.0))
    np.add.at(counts, number, there)
    means = np.full((draws, columns.shape[1]), np.nan)
    drawn = _times_drawn(images, seed, draws)
    for start in range(0, draws, 100):
        times = drawn[start : start + 100].astype(np.float64)
        total = times @ counts
        # a draw without any of a rare kind of question says nothing of it
        np.divide(times @ sums, total, out=means[start : start + 100], where=total > 0)
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return low, high


@functools.lru_cache(maxsize=2)
def _times_drawn(images: int, seed: int, draws: int) -> np.ndarray:
    """How often each image is drawn, [draws, images]."""
    generator = np.random.default_rng(seed)
    return np.stack(
        [
            np.bincount(generator.integers(images, size=images), minlength=images)
            for _ in range(draws)
        ]
    ).astype(np.uint16)


def difference(
    answers: Sequence[Answer], others: Sequence[Answer], *, seed: int = 0
) -> tuple[float, float, float]:
    """How much better the first answers are than others to the same questions: the mean difference
    of their scores, and its bootstrap 95 % interval over images.
    """
    gains = [own.score - other.score for own, other in zip(answers, others, strict=True)]
    return mean_and_interval(gains, [answer.image for answer in answers], seed=seed)


def mean_over(draws: Sequence[Sequence[Answer]]) -> tuple[Answer, ...]:
    """Answers whose figures are means over several draws of the same questions; all else is the
    first draw's.
    """
    out = []
    for some in zip(*draws, strict=True):
        shares = [one.needed for one in some if one.needed is not None]
        out.append(
            dataclasses.replace(
                some[0],
                score=float(np.mean([one.score for one in some])),
                kl=float(np.mean([one.kl for one in some])),
                needed=float(np.mean(shares)) if shares else None,
            )
        )
    return tuple(out)


def without_seed(method: str) -> str:
    """The method that several draws are of: `random` of `random:seed=7`."""
    return SEED.sub("", method)


def together(method: str, draws: int) -> str:
    """What several draws of a method are called."""
    return f"{without_seed(method)}, {draws} seeds"


def drawn(results: Sequence[Result]) -> list[list[Result]]:
    """The results by what they are draws of: a method, but for its seed, at a budget."""
    groups: dict[tuple[str, int | str | None], list[Result]] = {}
    for result in results:
        setting = result.setting
        groups.setdefault((without_seed(setting.method), setting.keep), []).append(result)
    return list(groups.values())


def pooled(results: Sequence[Result]) -> list[Result]:
    """The results, each method that was drawn with several seeds as one: the mean over them, whose
    interval is of the images; the seeds are what they are.
    """
    return [pool(some) for some in drawn(results)]


def pool(draws: Sequence[Result]) -> Result:
    """The mean of several draws; one alone is what it is. What they cost is the same, and times are
    the first's.
    """
    if len(draws) == 1:
        return draws[0]
    first, answers = draws[0], mean_over([result.answers for result in draws])
    method = together(first.setting.method, len(draws))
    scores = [answer.score for answer in answers]
    low, high = interval(scores, [answer.image for answer in answers], seed=first.seed)
    return dataclasses.replace(
        first,
        setting=Setting(method, first.setting.keep),
        accuracy=float(np.mean(scores)),
        low=low,
        high=high,
        agreement=float(np.mean([result.agreement for result in draws])),
        kl=float(np.mean([result.kl for result in draws])),
        visual_tokens=float(np.mean([result.visual_tokens for result in draws])),
        measures={
            name: float(np.mean([result.measures[name] for result in draws]))
            for name in first.measures
        },
        answers=answers,
    )


def unpruned_of(results: Sequence[Result]) -> Result | None:
    """The unpruned model's result."""
    return next((result for result in results if result.setting.method == UNPRUNED), None)


def is_random(method: str) -> bool:
    """Whether it keeps tokens at random, with one seed or several."""
    return DRAWN_AT_RANDOM.fullmatch(method) is not None


def estimates(results: Sequence[Result]) -> list[dict[str, Estimate]]:
    """By name, all means that a report has of each result, with their intervals.

    Differences are paired: of the same questions, as drawn images have them. Of the questions that
    `NEEDS_PIXELS` are those that the unpruned model gets wrong once an image has half its pixels.
    """
    unpruned = unpruned_of(results)
    halved = next((r for r in results if r.setting.method == HALVED), None)
    random = {r.setting.keep: r for r in results if is_random(r.setting.method)}
    return [
        _estimates(result, unpruned, halved, random.get(result.setting.keep)) for result in results
    ]


def _estimates(
    result: Result, unpruned: Result | None, halved: Result | None, random: Result | None
) -> dict[str, Estimate]:
    answers, scores = result.answers, _scores(result)
    columns = {
        "accuracy": scores,
        "KL, nats": np.array([answer.kl for answer in answers]),
        "needed, kept": np.array(
            [np.nan if answer.needed is None else answer.needed for answer in answers]
        ),
    }
    groups = families(answers)
    for family, numbers in groups.items():
        columns[f"accuracy, {family}"] = _only(scores, numbers)
    if halved is not None and result is not halved:
        wrong = np.flatnonzero(_scores(halved) < 0.5)
        columns[f"accuracy, {NEEDS_PIXELS}"] = _only(scores, wrong)
    for name, other in (("unpruned", unpruned), (RANDOM, random)):
        if other is not None and result is not other and result is not unpruned:
            gains = scores - _scores(other)
            columns[f"against {name}"] = gains
            for family, numbers in groups.items():
                columns[f"against {name}, {family}"] = _only(gains, numbers)
    columns = {name: column for name, column in columns.items() if not np.isnan(column).all()}
    lows, highs = intervals(
        np.stack([*columns.values()], axis=1),
        [answer.image for answer in answers],
        seed=result.seed,
    )
    return {
        name: Estimate(float(np.nanmean(column)), float(low), float(high))
        for (name, column), low, high in zip(columns.items(), lows, highs, strict=True)
    }


def _scores(result: Result) -> np.ndarray:
    return np.array([answer.score for answer in result.answers], np.float64)


def _only(scores: np.ndarray, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """The scores of some questions; the others are not a number."""
    out = np.full(len(scores), np.nan)
    out[numbers] = scores[numbers]
    return out


def families(answers: Sequence[Answer]) -> dict[str, list[int]]:
    """The numbers of each family's questions; none if the task has no families."""
    found: dict[str, list[int]] = {}
    for number, answer in enumerate(answers):
        if answer.family:
            found.setdefault(answer.family, []).append(number)
    return found


def needed_kept(answers: Sequence[Answer]) -> float | None:
    """The mean share of what an answer depends on that was kept; None if nobody says."""
    shares = [answer.needed for answer in answers if answer.needed is not None]
    return float(np.mean(shares)) if shares else None


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference ‖ other) of the distributions that logits [n, vocab] stand for, in nats."""
    p, q = (x.astype(np.float64) for x in (reference, other))
    p, q = (x - x.max(axis=-1, keepdims=True) for x in (p, q))
    log_p, log_q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def median_and_spread(times: Sequence[float]) -> tuple[float, float]:
    """The median, and half the interquartile range."""
    low, middle, high = np.percentile(np.asarray(times), [25, 50, 75])
    return float(middle), float(high - low) / 2
