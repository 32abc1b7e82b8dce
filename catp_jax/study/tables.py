"""Tables of a study's results: Markdown, a terminal's, CSV."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from catp_jax.study.records import UNPRUNED, Result
from catp_jax.study.results import difference, families, interval, needed_kept
from catp_jax.terminal import as_text

WIDE = 130  # letters that the whole table takes
NOTHING = "–"  # a cell of what was not measured

NOTES = """\
- accuracy: mean score; in brackets its bootstrap 95 % interval, over images, each with all its
  questions
- needed, kept: the mean share of what an answer depends on that was kept, where the task says so
- against: the mean difference of the scores of the same questions, in percentage points; in
  brackets its bootstrap 95 % interval over images
- precision, recall and F1 are of saying yes, and the yes ratio is how often it was said
- agreement: share of the questions answered as the unpruned model answers them
- KL: of the first answer token's distribution from the unpruned model's, mean over the questions
- cache: all that decoding keeps of one question, a share of its batch; with beam search the
  beams share what the prompt left, and each keeps its own new tokens
- prefill FLOPs: of one question, as the compiler counts them in the compiled prefill of a batch;
  other programs count loops and kernels differently
- times, where they were asked for: medians ± half the interquartile range; prefill and token (a
  greedy step, whatever the beams) of a whole batch, question with its image and everything around
  it, as a share of its batch
"""


def columns(results: Sequence[Result], is_narrow: bool = False) -> list[tuple[str, list[str]]]:
    """Title and cells of each column that has something to show; the main ones if narrow."""
    every: list[tuple[str, bool, Callable[[Result], str]]] = [
        # title, whether it is a main one, cell
        ("method", True, lambda r: r.setting.method),
        ("kept", True, lambda r: f"{r.visual_tokens:.5g}" if is_narrow else _kept(r)),
        (
            "accuracy, [95 %]",
            True,
            lambda r: f"{r.accuracy:.1%} [{100 * r.low:.1f}, {100 * r.high:.1f}]",
        ),
        *((name, False, partial(_measure, name)) for name in measured(results)),
        ("agreement", True, lambda r: f"{r.agreement:.1%}"),
        ("KL, nats", False, lambda r: f"{r.kl:.3f}"),
        (
            "cache" if is_narrow else "cache, bytes",
            True,
            lambda r: decimal(r.cost.cache_bytes) if is_narrow else f"{r.cost.cache_bytes:,}",
        ),
        ("prefill, MFLOPs", False, lambda r: f"{r.cost.prefill_flops / 1e6:,.2f}"),
        ("prefill, ms", False, lambda r: _time(r.cost.prefill_ms, r.cost.prefill_spread)),
        ("token, ms", False, lambda r: _time(r.cost.token_ms, r.cost.token_spread)),
        (
            "question, ms",
            True,
            lambda r: _number(r.milliseconds) if is_narrow else _time(r.milliseconds, r.spread),
        ),
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


def _kept(result: Result) -> str:
    """The mean number of visual tokens, and the percentage where one was asked for."""
    share = f" ({result.setting.keep})" if isinstance(result.setting.keep, str) else ""
    return f"{result.visual_tokens:.5g}{share}"


def markdown_table(results: Sequence[Result]) -> list[str]:
    """The table's lines."""
    shown = columns(results)
    lines = [
        "| " + " | ".join(title for title, _ in shown) + " |",
        "|---" + "|---:" * (len(shown) - 1) + "|",
    ]
    for cells in zip(*(cells for _, cells in shown), strict=True):
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown_families(results: Sequence[Result]) -> list[str]:
    """A table of accuracy by family of questions, and of what was kept of what is needed; nothing
    if the task has no families.
    """
    found = families(results[0].answers)
    if not found:
        return []
    lines = [
        "| method | kept | needed, kept | " + " | ".join(found) + " |",
        "|---|---:|---:" + "|---:" * len(found) + "|",
    ]
    for result in results:
        share = needed_kept(result.answers)
        cells = [
            result.setting.method,
            _kept(result),
            NOTHING if share is None else f"{share:.1%}",
        ]
        for numbers in found.values():
            some = [result.answers[number] for number in numbers]
            scores, images = [one.score for one in some], [one.image for one in some]
            low, high = interval(scores, images, seed=result.seed)
            mean = sum(scores) / len(scores)
            cells.append(f"{mean:.1%} [{100 * low:.1f}, {100 * high:.1f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown_differences(results: Sequence[Result]) -> list[str]:
    """A table of each setting's paired difference from unpruned, and from random at its budget, in
    percentage points; nothing if there is neither.
    """
    unpruned = [r for r in results if r.setting.method == UNPRUNED]
    random = {r.setting.keep: r for r in results if r.setting.method == "random"}
    lines = []
    for result in results:
        if result.setting.method == UNPRUNED:
            continue
        others = [unpruned[0] if unpruned else None, random.get(result.setting.keep)]
        cells = [result.setting.method, _kept(result)]
        for other in others:
            if other is None or other is result:
                cells.append(NOTHING)
                continue
            mean, low, high = difference(result.answers, other.answers, seed=result.seed)
            cells.append(f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
        if {*cells[2:]} != {NOTHING}:
            lines.append("| " + " | ".join(cells) + " |")
    head = ["| method | kept | against unpruned | against random |", "|---|---:|---:|---:|"]
    return [*head, *lines] if lines else []


def table(results: Sequence[Result], name: str = "", width: int = 80) -> Table:
    """The results as a table for a terminal of `width` letters, in their order."""
    first = results[0]
    title = f"{first.questions} questions about {first.images} images"
    title = as_text(f"{name}: {title}" if name else title)
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    shown = columns(results, is_narrow=width < WIDE)
    for number, (heading, _) in enumerate(shown):
        out.add_column(
            heading.replace(", ", ",\n"), justify="right" if number else "left", no_wrap=True
        )
    for cells in zip(*(cells for _, cells in shown), strict=True):
        out.add_row(*map(as_text, cells))
    return out


def write_csv(results: Mapping[str, Sequence[Result]], path: Path) -> None:
    """One row a model and setting, every figure a column; pruners and versions as JSON."""
    rows = []
    for name, some in results.items():
        for result in some:
            figures = result.figures()
            parts = figures.pop("setting") | figures.pop("cost") | figures.pop("measures")
            others = {
                key: json.dumps(value) if isinstance(value, dict | list) else value
                for key, value in figures.items()
            }
            rows.append({"model": name, **parts, **others})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(chain(*rows))))
        writer.writeheader()
        writer.writerows(rows)
