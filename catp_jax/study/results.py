"""A setting's figures, and the statistics behind them."""

from collections.abc import Sequence

import numpy as np

from catp_jax.study.records import Answer, Result, SettingCost

DRAWS = 2000  # of the bootstrap


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


def difference(
    answers: Sequence[Answer], others: Sequence[Answer], *, seed: int = 0
) -> tuple[float, float, float]:
    """How much better the first answers are than others to the same questions: the mean difference
    of their scores, and its bootstrap 95 % interval over images.
    """
    gains = [own.score - other.score for own, other in zip(answers, others, strict=True)]
    low, high = interval(gains, [answer.image for answer in answers], seed=seed)
    return float(np.mean(gains)), low, high


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
