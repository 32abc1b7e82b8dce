"""Curves of a study: accuracy over what is kept, and over the layer whose votes decide."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catp_jax.study.pictures import new_figure
from catp_jax.study.records import UNPRUNED, Result

ONE_LAYER = re.compile(r"catp(?::layers=(\d+|first|last))?")
SIZE = (6.5, 4.6)  # inches of one model's curves
MARKERS = "osD^vPX*"
DODGE = 1.02  # neighbouring methods stand a little apart, so that their bars can be told apart


def layer_of(method: str, cross_layers: int | None = None) -> int | None:
    """The one cross-attention layer, from 1 on, that CATP's vote is taken from; None if not so.

    `cross_layers`: how many the model has. Without it `catp`, which takes the last one's, has none.
    """
    match = ONE_LAYER.fullmatch(method)
    if not match:
        return None
    layer = match[1] or "last"
    return cross_layers if layer == "last" else 1 if layer == "first" else int(layer)


def by_layer(
    results: Sequence[Result], cross_layers: int | None = None
) -> list[tuple[int, Result]]:
    """The results that one layer's vote decides, each with it; one a layer and budget."""
    one_each = {
        (layer, result.setting.keep): (layer, result)
        for result in results
        if (layer := layer_of(result.setting.method, cross_layers)) is not None
    }
    return list(one_each.values())


def unpruned_of(results: Sequence[Result]) -> Result | None:
    """The unpruned model's result."""
    return next((result for result in results if result.setting.method == UNPRUNED), None)


def draw_accuracy(panels: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Accuracy against visual tokens kept, with 95 % intervals: a panel per model, by its name; a
    line per method, the unpruned model as a rule with its band.
    """
    methods = list(
        dict.fromkeys(
            result.setting.method
            for panel in panels.values()
            for result in panel
            if result.setting.method != UNPRUNED
        )
    )
    figure, grid = _figure(len(panels))
    for axes, (name, panel) in zip(grid, panels.items(), strict=True):
        _draw_unpruned(axes, panel)
        for number, method in enumerate(methods):
            mine = [result for result in panel if result.setting.method == method]
            mine.sort(key=lambda result: result.visual_tokens)
            if mine:
                shift = DODGE ** (number - (len(methods) - 1) / 2)
                places = [result.visual_tokens * shift for result in mine]
                _draw_line(axes, places, mine, number, method)
        _log_axis(axes)
        axes.set_xlabel(f"visual tokens kept{_of_all(panel)}")
        axes.set_title(_title(name, panel[0]))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_layers(
    panels: Mapping[str, Sequence[Result]], path: Path, cross_layers: Mapping[str, int | None]
) -> None:
    """Accuracy by the one cross-attention layer that CATP's vote is taken from, a line a budget.

    `cross_layers` says of each model how many it has, see `layer_of`.
    """
    figure, grid = _figure(len(panels))
    for axes, (name, panel) in zip(grid, panels.items(), strict=True):
        _draw_unpruned(axes, panel)
        layered = by_layer(panel, cross_layers[name])
        budgets = sorted({result.visual_tokens for _, result in layered}, reverse=True)
        for number, kept in enumerate(budgets):
            mine = sorted(
                ((layer, result) for layer, result in layered if result.visual_tokens == kept),
                key=lambda pair: pair[0],
            )
            shift = 0.04 * (number - (len(budgets) - 1) / 2)
            places = [layer + shift for layer, _ in mine]
            _draw_line(axes, places, [result for _, result in mine], number, f"keep {kept:g}")
        axes.set_xticks(sorted({layer for layer, _ in layered}))
        axes.set_xlabel("cross-attention layer that votes")
        axes.set_title(_title(name, panel[0]))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    figure = new_figure(SIZE[0] * panels, SIZE[1])
    grid = figure.subplots(1, panels, squeeze=False)[0]
    for axes in grid:
        axes.grid(alpha=0.3)
        axes.set_ylabel("accuracy (%)")
    return figure, list(grid)


def _draw_unpruned(axes: Any, results: Sequence[Result]) -> None:
    unpruned = unpruned_of(results)
    if unpruned is not None:
        axes.axhspan(100 * unpruned.low, 100 * unpruned.high, color="grey", alpha=0.15, lw=0)
        axes.axhline(100 * unpruned.accuracy, color="grey", linestyle="--", label="unpruned")


def _draw_line(
    axes: Any, places: list[float], results: Sequence[Result], number: int, label: str
) -> None:
    values = [100 * result.accuracy for result in results]
    axes.errorbar(
        places,
        values,
        # a mean of few values may stand a rounding error outside its interval
        yerr=[
            [max(0.0, 100 * (result.accuracy - result.low)) for result in results],
            [max(0.0, 100 * (result.high - result.accuracy)) for result in results],
        ],
        color=f"C{number % 10}",
        linestyle=("-", "--", ":")[number // 10 % 3],
        marker=MARKERS[number % len(MARKERS)],
        markersize=4.5,
        capsize=2,
        elinewidth=0.8,
        label=label,
    )


def _log_axis(axes: Any) -> None:
    from matplotlib import ticker

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))


def _of_all(results: Sequence[Result]) -> str:
    unpruned = unpruned_of(results)
    return "" if unpruned is None else f" (of {unpruned.visual_tokens:.0f})"


def _title(name: str, result: Result) -> str:
    questions = f"{result.questions} questions about {result.images} images"
    return f"{name}: {questions}" if name else questions
