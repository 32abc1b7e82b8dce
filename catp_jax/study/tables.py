"""Tables of a study's results: for a report, a terminal, and as CSV."""

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import rich.table
from rich.box import SIMPLE_HEAD
from rich.filesize import decimal

from catp_jax.study.half_pixels import HALVED
from catp_jax.study.records import Result
from catp_jax.study.results import (
    NEEDS_PIXELS,
    Estimate,
    families,
    pooled,
    unpruned_of,
)
from catp_jax.terminal import as_text

WIDE = 130  # letters that the whole table takes
NOTHING = "–"  # a cell of what was not measured

NOTES = (
    "In brackets: a bootstrap 95 % interval of the mean, over images, each with all its questions. "
    "Of a method that was drawn with several seeds, all figures are means over the seeds; the "
    "interval is that of the images.",
    "precision, recall and F1 are of saying yes, and the yes ratio is how often it was said.",
    "agreement: share of the questions answered as the unpruned model answers them.",
    "KL: of the first answer token's distribution from the unpruned model's, mean over the "
    "questions, in nats.",
    "needed, kept: the mean share of what an answer depends on that was kept, where the task says "
    "so.",
    f"{NEEDS_PIXELS}: accuracy on the questions that the unpruned model gets wrong about images "
    "with half the pixels a side. They were chosen by its own mistakes: compare methods on them, "
    "and not this column with others.",
    "against: the mean difference of the scores of the same questions, in percentage points; above "
    "0 the method of the line is better.",
    "cache: all that decoding keeps of one question, a share of its batch; with beam search the "
    "beams share what the prompt left, and each keeps its own new tokens.",
    "prefill FLOPs: of the matrix products of a prefill, encoding of the images included, counted "
    "in the program before it is compiled; one question's share of its batch.",
    "moved: what the prefill of a whole batch, and one greedy step after it, read from the memory "
    "of the GPU that they were compiled for, and write to it; FLOPs there are the batch's too.",
    "times, where asked for: medians ± half the interquartile range; prefill and token (a greedy "
    "step, whatever the beams) of a whole batch; question with its image, the method's own work "
    "and everything around it, as a share of its batch. speed: how many times as fast as the "
    "unpruned program, which computes nothing for a method to look at.",
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A heading for each column, and lines of as many cells; the first of them are names."""

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    names: int = 1


def columns(
    results: Sequence[Result],
    is_narrow: bool = False,
    figures: Sequence[Mapping[str, Estimate]] = (),
) -> list[tuple[str, list[str]]]:
    """Title and cells of each column that has something to show; the main ones if narrow. With the
    `figures` of the results more means have their intervals.
    """
    unpruned = unpruned_of(results)
    kl = {id(r): own["KL, nats"] for r, own in zip(results, figures, strict=False)}
    gpu = next((r.cost.gpu.name.upper() for r in results if r.cost.gpu is not None), "")
    every: list[tuple[str, bool, Callable[[Result], str]]] = [
        # title, whether it is a main one, cell
        ("method", True, method),
        ("kept", True, lambda r: f"{r.visual_tokens:.5g}" if is_narrow else kept(r)),
        ("accuracy, [95 %]", True, lambda r: percent(Estimate(r.accuracy, r.low, r.high))),
        *((name, False, partial(_measure, name)) for name in measured(results)),
        ("agreement", True, lambda r: f"{r.agreement:.1%}"),
        ("KL, nats", False, lambda r: _nats(r.kl, kl.get(id(r)))),
        (
            "cache" if is_narrow else "cache, bytes",
            True,
            lambda r: decimal(r.cost.cache_bytes) if is_narrow else f"{r.cost.cache_bytes:,}",
        ),
        ("prefill, MFLOPs", False, lambda r: f"{r.cost.prefill_flops / 1e6:,.2f}"),
        (
            f"prefill moved, {gpu}",
            False,
            lambda r: NOTHING if r.cost.gpu is None else decimal(r.cost.gpu.prefill_bytes),
        ),
        (
            f"token moved, {gpu}",
            False,
            lambda r: NOTHING if r.cost.gpu is None else decimal(r.cost.gpu.token_bytes),
        ),
        (
            f"prefill MFLOPs, {gpu}",
            False,
            lambda r: NOTHING if r.cost.gpu is None else f"{r.cost.gpu.prefill_flops / 1e6:,.2f}",
        ),
        ("prefill, ms", False, lambda r: _time(r.cost.prefill_ms, r.cost.prefill_spread)),
        ("token, ms", False, lambda r: _time(r.cost.token_ms, r.cost.token_spread)),
        (
            "question, ms",
            True,
            lambda r: _number(r.milliseconds) if is_narrow else _time(r.milliseconds, r.spread),
        ),
        ("speed", False, lambda r: _speed(r, unpruned)),
    ]
    filled = [
        (title, [cell(result) for result in results])
        for title, is_main, cell in every
        if is_main or not is_narrow
    ]
    return [(title, cells) for title, cells in filled if {*cells} != {NOTHING}]


def measured(results: Sequence[Result]) -> list[str]:
    """The names of what else the task is reported by."""
    return list(dict.fromkeys(name for result in results for name in result.measures))


def _measure(name: str, result: Result) -> str:
    return f"{result.measures[name]:.1%}" if name in result.measures else NOTHING


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4g}"


def _time(median: float | None, spread: float | None) -> str:
    if median is None or spread is None:
        return NOTHING
    digits = 1 if median >= 10 else 2
    return f"{median:.{digits}f} ± {spread:.{digits}f}"


def _speed(result: Result, unpruned: Result | None) -> str:
    if unpruned is None or unpruned.milliseconds is None or result.milliseconds is None:
        return NOTHING
    return f"{unpruned.milliseconds / result.milliseconds:.2f}×"


def method(result: Result) -> str:
    """The method, or how images were made smaller."""
    return str(result.setting) if result.setting.seen else result.setting.method


def kept(result: Result) -> str:
    """The mean number of visual tokens, and the percentage where one was asked for."""
    is_share = isinstance(result.setting.keep, str) and not result.setting.seen
    share = f" ({result.setting.keep})" if is_share else ""
    return f"{result.visual_tokens:.5g}{share}"


def percent(estimate: Estimate | None) -> str:
    """A share and its interval."""
    if estimate is None:
        return NOTHING
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{estimate.mean:.1%} [{low:.1f}, {high:.1f}]"


def _points(estimate: Estimate | None) -> str:
    """A difference of shares in percentage points, and its interval."""
    if estimate is None:
        return NOTHING
    mean, low, high = (100 * value for value in dataclasses.astuple(estimate))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _nats(mean: float, estimate: Estimate | None) -> str:
    return (
        f"{mean:.3f}"
        if estimate is None
        else f"{mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
    )


def main_table(results: Sequence[Result], figures: Sequence[Mapping[str, Estimate]]) -> Table:
    """Accuracy, agreement, divergence and costs."""
    shown = columns(results, figures=figures)
    cells = zip(*(cells for _, cells in shown), strict=True)
    return Table(tuple(title for title, _ in shown), tuple(cells))


def family_table(
    results: Sequence[Result], figures: Sequence[Mapping[str, Estimate]]
) -> Table | None:
    """Accuracy by family of questions, what was kept of what is needed, and accuracy where half
    the pixels do not do; None if the task says nothing of all this.
    """
    found = families(results[0].answers)
    names = {f"accuracy, {family}": f"{family} ({len(some)})" for family, some in found.items()}
    names = {"needed, kept": "needed, kept"} | names
    if hard := _needing_pixels(results):
        names[f"accuracy, {NEEDS_PIXELS}"] = f"{NEEDS_PIXELS} ({hard})"
    return _estimated(results, figures, names, percent)


def _needing_pixels(results: Sequence[Result]) -> int:
    halved = next((r for r in results if r.setting.method == HALVED), None)
    return 0 if halved is None else sum(answer.score < 0.5 for answer in halved.answers)


def difference_table(
    results: Sequence[Result], figures: Sequence[Mapping[str, Estimate]], other: str
) -> Table | None:
    """Each setting's paired difference from the unpruned model, or from random at its budget, in
    percentage points: of all questions and by family; None if there is nothing to compare.
    """
    names = {f"against {other}": "all"}
    names |= {f"against {other}, {family}": family for family in families(results[0].answers)}
    return _estimated(results, figures, names, _points)


def _estimated(
    results: Sequence[Result],
    figures: Sequence[Mapping[str, Estimate]],
    names: Mapping[str, str],
    cell: Callable[[Estimate | None], str],
) -> Table | None:
    """Some of the figures under headings of their own, without columns and lines of nothing."""
    names = {name: heading for name, heading in names.items() if any(name in f for f in figures)}
    lines = tuple(
        (method(result), kept(result), *(cell(own.get(name)) for name in names))
        for result, own in zip(results, figures, strict=True)
        if any(name in own for name in names)
    )
    return Table(("method", "kept", *names.values()), lines) if names else None


def table(results: Sequence[Result], name: str = "", width: int = 80) -> rich.table.Table:
    """The results as a table for a terminal of `width` letters, in their order."""
    first = results[0]
    title = f"{first.questions} questions about {first.images} images"
    title = as_text(f"{name}: {title}" if name else title)
    out = rich.table.Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    shown = columns(pooled(results), is_narrow=width < WIDE)
    for number, (heading, _) in enumerate(shown):
        out.add_column(
            heading.replace(", ", ",\n"), justify="right" if number else "left", no_wrap=True
        )
    for cells in zip(*(cells for _, cells in shown), strict=True):
        out.add_row(*map(as_text, cells))
    return out


def write_settings(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """CSV: one row a model and setting, every figure a column; pruners and versions as JSON."""
    rows = []
    for name, some in results.items():
        for result in some:
            figures = result.figures()
            parts = figures.pop("setting") | figures.pop("cost") | figures.pop("measures")
            rows.append({"model": name, **_plain(parts | figures)})
    _write(rows, path)


def write_figures(
    shown: Mapping[str, tuple[Sequence[Result], Sequence[Mapping[str, Estimate]]]], path: Path
) -> None:
    """CSV: of each model's results and their figures one row a figure."""
    rows = [
        {"model": name, "method": result.setting.method, "keep": result.setting.keep}
        | {"visual_tokens": result.visual_tokens, "figure": figure}
        | dataclasses.asdict(estimate)
        for name, (results, figures) in shown.items()
        for result, own in zip(results, figures, strict=True)
        for figure, estimate in own.items()
    ]
    _write(rows, path)


def _plain(row: dict[str, object]) -> dict[str, object]:
    return {
        key: json.dumps(value) if isinstance(value, dict | list) else value
        for key, value in row.items()
    }


def _write(rows: Sequence[dict[str, object]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(chain(*rows))))
        writer.writeheader()
        writer.writerows(rows)
