"""Curves of a study: accuracy over what is kept or cached, of all questions and by family, and over
the layer whose votes decide.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from catp_jax.pruning import BOUNDS
from catp_jax.study.half_pixels import HALVED
from catp_jax.study.pictures import new_figure
from catp_jax.study.records import UNPRUNED, Result
from catp_jax.study.results import RANDOM, Estimate, is_random, unpruned_of

ONE_LAYER = re.compile(r"catp(?::layers=(\d+|first|last))?")
SIZE = (4.6, 3.6)  # inches of a panel
ACROSS = 3  # panels, at most
MARKERS = "osD^vPX*"
# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow and black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FRONT = "front"
GREY = "#777777"
GREYS = {"oracle": ("^", ":"), "anti": ("v", ":"), UNPRUNED: ("*", "-")}
LEGEND = 1.9  # inches
CLOSEST = 1.25  # labels of an axis, as ratios
DODGE = 1.02  # neighbouring methods stand a little apart, so that their bars can be told apart

Figures = Mapping[str, Estimate]


@dataclass(frozen=True)
class Line:
    """Accuracies at places on the axis, under a name."""

    name: str
    places: tuple[float, ...]
    values: tuple[Estimate, ...]


@dataclass(frozen=True)
class Panel:
    """Lines under a title; `rules` are accuracies at no place, with their bands.

    `is_stepped` draws the front of all points: what no other has at less.
    """

    title: str
    axis: str
    lines: tuple[Line, ...]
    rules: tuple[tuple[str, Estimate], ...] = ()
    is_log: bool = True
    ticks: tuple[float, ...] = ()
    is_stepped: bool = False


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


def is_layered(results: Sequence[Result], cross_layers: int | None) -> bool:
    """Whether votes of at least two layers can be compared."""
    return len({layer for layer, _ in by_layer(results, cross_layers)}) > 1


def kept_panel(
    results: Sequence[Result], figures: Sequence[Figures], title: str, figure: str = "accuracy"
) -> Panel:
    """A figure over the visual tokens kept: a line a method, what has no budget as a rule."""
    shown = [pair for pair in zip(results, figures, strict=True) if figure in pair[1]]
    pruned = [(result, own) for result, own in shown if result.setting.keep is not None]
    methods = list(dict.fromkeys(result.setting.method for result, _ in pruned))
    lines = []
    for number, method in enumerate(methods):
        mine = [(r.visual_tokens, own) for r, own in pruned if r.setting.method == method]
        mine.sort(key=lambda pair: pair[0])
        shift = DODGE ** (number - (len(methods) - 1) / 2)
        places, values = zip(*((kept * shift, own[figure]) for kept, own in mine), strict=True)
        lines.append(Line(method, places, values))
    rules = tuple(
        (result.setting.method, own[figure]) for result, own in shown if result.setting.keep is None
    )
    unpruned = unpruned_of(results)
    of = "" if unpruned is None else f" (of {unpruned.visual_tokens:.0f})"
    ticks = apart(result.visual_tokens for result, _ in pruned)
    return Panel(title, f"visual tokens kept{of}", tuple(lines), rules, ticks=ticks)


def cache_panel(results: Sequence[Result], title: str) -> Panel:
    """Accuracy over cache bytes, and the front that nothing is better than at less. Bounds, which
    must be told what is needed, are no methods and stay out.
    """
    shown = [r for r in results if r.setting.method.partition(":")[0] not in (*BOUNDS, HALVED)]
    lines = []
    for method in dict.fromkeys(result.setting.method for result in shown):
        mine = sorted(
            (r for r in shown if r.setting.method == method), key=lambda r: r.cost.cache_bytes
        )
        places = tuple(r.cost.cache_bytes / 1000 for r in mine)
        lines.append(Line(method, places, tuple(accuracy_of(r) for r in mine)))
    ticks = apart(place for line in lines for place in line.places)
    return Panel(title, "cache of a question (kB)", tuple(lines), ticks=ticks, is_stepped=True)


def layer_panel(results: Sequence[Result], title: str, cross_layers: int | None) -> Panel:
    """Accuracy by the one cross-attention layer that CATP's vote is taken from, a line a budget."""
    layered = by_layer(results, cross_layers)
    budgets = sorted({result.visual_tokens for _, result in layered}, reverse=True)
    lines = []
    for number, kept in enumerate(budgets):
        mine = sorted(
            ((layer, result) for layer, result in layered if result.visual_tokens == kept),
            key=lambda pair: pair[0],
        )
        shift = 0.04 * (number - (len(budgets) - 1) / 2)
        places = tuple(layer + shift for layer, _ in mine)
        values = tuple(accuracy_of(result) for _, result in mine)
        lines.append(Line(f"keep {kept:g}", places, values))
    unpruned = unpruned_of(results)
    rules = () if unpruned is None else ((UNPRUNED, accuracy_of(unpruned)),)
    ticks = tuple(float(layer) for layer in sorted({layer for layer, _ in layered}))
    axis = "cross-attention layer that votes"
    return Panel(title, axis, tuple(lines), rules, is_log=False, ticks=ticks)


def accuracy_of(result: Result) -> Estimate:
    """A result's accuracy, as its file has it."""
    return Estimate(result.accuracy, result.low, result.high)


def apart(places: Iterable[float]) -> tuple[float, ...]:
    """Places that have room for their labels on an axis of logarithms, from the largest down."""
    ticks: list[float] = []
    for place in sorted({*places}, reverse=True):
        if not ticks or ticks[-1] / place > CLOSEST:
            ticks.append(place)
    return tuple(ticks)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, value), those that no other has the value of at less or the same cost, from
    the cheapest on.
    """
    best, out = -math.inf, []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if value > best:
            out.append((cost, value))
            best = value
    return out


def draw_curves(panels: Sequence[Panel], path: Path | IO[bytes]) -> None:
    """Panels in rows, as a PNG, all with one legend: a method has its colour in all of them."""
    looks = looks_of(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    across = min(len(panels), ACROSS)
    down = -(-len(panels) // across)
    figure = new_figure(SIZE[0] * across + LEGEND, SIZE[1] * down)
    grid = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    entries: dict[str, Any] = {}
    for axes, panel in zip(grid, panels, strict=False):
        entries |= _draw(axes, panel, looks)
    if FRONT in entries:  # behind the methods of all panels
        entries[FRONT] = entries.pop(FRONT)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    legend = figure.legend(
        entries.values(), entries, loc="outside right upper", fontsize=8, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=150, format="png")


def looks_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each method's line is drawn: in grey what is none, chance and the bounds."""
    looks, number = {}, 0
    for name in names:
        word = name.partition(":")[0]
        if word in GREYS or word.partition(",")[0] == RANDOM:
            elsewhere = ("+", "--")  # random tokens at another place
            marker, style = GREYS.get(word, ("x", "-") if is_random(name) else elsewhere)
            looks[name] = {"color": GREY, "linestyle": style, "marker": marker}
            continue
        looks[name] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": ("-", "--", "-.")[number // len(COLOURS) % 3],
            "marker": MARKERS[number % len(MARKERS)],
        }
        number += 1
    return looks


def _draw(axes: Any, panel: Panel, looks: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Draws a panel; its legend's entries."""
    entries: dict[str, Any] = {}
    for (name, value), style in zip(panel.rules, ("--", ":", "-."), strict=False):
        low, high = 100 * value.low, 100 * value.high
        axes.axhspan(low, high, color=GREY, alpha=0.12, lw=0)
        entries[name] = axes.axhline(100 * value.mean, color="black", linestyle=style, lw=1)
    for line in panel.lines:
        # a mean of few values may stand a rounding error outside its interval
        below = [max(0.0, 100 * (value.mean - value.low)) for value in line.values]
        above = [max(0.0, 100 * (value.high - value.mean)) for value in line.values]
        entries[line.name] = axes.errorbar(
            line.places,
            [100 * value.mean for value in line.values],
            yerr=[below, above],
            **looks[line.name],
            linewidth=1.4,
            markersize=4.5,
            capsize=2,
            elinewidth=0.8,
        )
    if panel.is_stepped:
        points = [
            (place, 100 * value.mean)
            for line in panel.lines
            for place, value in zip(line.places, line.values, strict=True)
        ]
        entries[FRONT] = axes.step(
            *zip(*front(points), strict=True), where="post", color="black", lw=5, alpha=0.13
        )[0]
    if panel.is_log:
        from matplotlib import ticker

        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
    if panel.ticks:
        axes.set_xticks(panel.ticks)
        axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, labelleft=True)
    axes.set_ylabel("accuracy (%)", fontsize=9)
    axes.set_xlabel(panel.axis, fontsize=9)
    axes.set_title(panel.title, fontsize=10, parse_math=False)
    return entries
