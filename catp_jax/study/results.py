"""The figures of a study, and the statistics behind them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

UNPRUNED = "unpruned"
DRAWS = 2000  # of the bootstrap


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method and how many visual tokens it keeps, a count or a percentage such as "25%".

    `Setting("unpruned", None)` prunes nothing.
    """

    method: str
    keep: int | str | None

    def __str__(self) -> str:
        return self.method if self.keep is None else f"{self.method}, keep {self.keep}"


@dataclasses.dataclass(frozen=True)
class Result:
    """How a setting did.

    `visual_tokens`: mean number kept. `accuracy`: mean score, `low` and `high` its bootstrap 95 %
    interval (see `interval`). `agreement`: share of the questions with the same answer as unpruned.
    `kl`: mean KL divergence of the first answer token's distribution from the unpruned one, in
    nats.

    `cache_bytes` (of all beams) and `prefill_flops` are of one question, a share of its batch.
    Times are medians, their spread half the interquartile range: `milliseconds` of a question,
    its image, prefill and answer, as a share of its batch; `prefill_ms` and `token_ms` of a whole
    batch's prefill and of one greedy step after it. None: not measured.

    `answers` and `kept` (numbers of the visual tokens; None: everything) are one per question;
    `maps` shows where the kept tokens of some questions look, by the question's number.
    """

    setting: Setting
    questions: int
    images: int
    visual_tokens: float
    accuracy: float
    low: float
    high: float
    agreement: float
    kl: float
    cache_bytes: int
    prefill_flops: float | None
    prefill_ms: float | None
    prefill_spread: float | None
    token_ms: float | None
    token_spread: float | None
    milliseconds: float | None
    spread: float | None
    seed: int
    pruner: dict[str, Any] | None
    versions: dict[str, str]
    answers: tuple[str, ...] = ()
    kept: tuple[tuple[int, ...] | None, ...] = ()
    maps: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Everything that is a figure, for JSON: no answers, indices or maps."""
        row = dataclasses.asdict(dataclasses.replace(self, answers=(), kept=(), maps={}))
        return {key: value for key, value in row.items() if key not in ("answers", "kept", "maps")}

    @classmethod
    def of(cls, figures: dict[str, Any], **rest: Any) -> "Result":
        """The result that `figures` gives, with `rest` on top."""
        own = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {key: value for key, value in figures.items() if key in own}
        values["setting"] = Setting(**figures["setting"])
        return cls(**(values | rest))


def interval(
    scores: Sequence[float], groups: Sequence[int], *, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """A bootstrap 95 % interval of the mean score (percentiles).

    Questions about one image stand or fall together, so images are drawn, each with all its
    questions: `groups` says which image a score belongs to. With every score the same the interval
    is a point, and it is too narrow for a handful of images.
    """
    _, number = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.bincount(number)
    sums = np.bincount(number, weights=np.asarray(scores, np.float64))
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for draw in range(draws):
        drawn = generator.integers(len(counts), size=len(counts))
        means[draw] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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
