"""How often each visual position was kept: whether a method looks at the image, or at places."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from catp_jax.study.pictures import new_figure
from catp_jax.study.records import Answer, Result
from catp_jax.study.results import drawn, pool

SIDE = 1.5  # inches of a panel
MARGIN = 0.25  # inches, for a panel's caption
NAMES = 1.1  # inches, for the methods' names
COLUMNS = 5  # budgets, at most
MOST = 4.0  # times as often as all positions; colours end there

Grid = tuple[int, int, int, int]


@dataclass(frozen=True)
class Positions:
    """How often a setting kept each visual position, as multiples of the mean over all: 1 all over
    is no bias.

    `patches` lie over the image, [rows, columns]; of models whose tokens have no place they are
    None. `others` are what has no place, in order: all tokens then, or what each tile has besides
    its patches. They are of `questions` of the same layout, the commonest, out of `of`.
    """

    method: str
    keep: int | str
    patches: np.ndarray | None
    others: np.ndarray
    questions: int
    of: int


def positions_of(results: Sequence[Result]) -> list[Positions]:
    """Those of every setting that selects; several seeds count together. Means are left out, since
    every token is in one, and so is what each layer keeps for itself.
    """
    out = []
    for some in drawn(results):
        setting = pool(some).setting
        answers = [answer for result in some for answer in result.answers]
        selected = [one for one in answers if one.kept is not None and one.cached is None]
        selected = [one for one in selected if not one.is_merged]
        layouts = Counter((one.grid, one.available) for one in selected)
        if setting.keep is None or not layouts:
            continue
        ((grid, available), number), *_ = layouts.most_common(1)
        same = [one for one in answers if (one.grid, one.available) == (grid, available)]
        patches, others = laid_out(how_often(same, available), grid)
        asked = (number // len(some), len(answers) // len(some))
        out.append(Positions(setting.method, setting.keep, patches, others, *asked))
    return out


def how_often(answers: Sequence[Answer], available: int) -> np.ndarray:
    """How often each of so many positions was kept, as multiples of the mean."""
    counts = np.zeros(available)
    for answer in answers:
        counts[list(answer.kept or ())] += 1
    return counts / max(float(counts.mean()), 1e-12)


def laid_out(values: np.ndarray, grid: Grid | None) -> tuple[np.ndarray | None, np.ndarray]:
    """Values of all positions over the image, and those that have no place in it."""
    if grid is None:
        return None, values
    down, across, rows, columns = grid
    tiles = values.reshape(down * across, -1)
    first = tiles.shape[1] - rows * columns
    patches = tiles[:, first:].reshape(down, across, rows, columns)
    return patches.transpose(0, 2, 1, 3).reshape(down * rows, across * columns), tiles[:, :first]


def draw_positions(positions: Sequence[Positions], path: Path) -> None:
    """A line a method, a column a budget, the largest first: maps over the image, or bars."""
    methods = list(dict.fromkeys(one.method for one in positions))
    budgets = sorted({one.keep for one in positions}, key=_size, reverse=True)[:COLUMNS]
    placed = {(one.method, one.keep): one for one in positions}
    are_maps = positions[0].patches is not None
    width = SIDE if are_maps else 1.4 * SIDE
    height = SIDE if are_maps else 0.7 * SIDE
    figure = new_figure(NAMES + width * len(budgets), (height + MARGIN) * len(methods) + MARGIN)
    grid = figure.subplots(len(methods), len(budgets), squeeze=False, sharex=True, sharey=True)
    shown = None
    for line, method in enumerate(methods):
        for column, keep in enumerate(budgets):
            axes, one = grid[line, column], placed.get((method, keep))
            title = [f"keep {keep}"] if line == 0 else []
            if one is None:
                axes.axis("off")
            elif one.patches is None:
                _draw_bars(axes, one)
            else:
                shown, said = _draw_map(axes, one.patches, one.others)
                title.append(said)
            axes.set_title("\n".join(title), fontsize=8)
        grid[line, 0].set_ylabel(method.replace(", ", "\n"), fontsize=8, parse_math=False)
    if shown is None:
        figure.supxlabel("query", fontsize=8)
        figure.supylabel("kept, × as often as the mean query", fontsize=8)
    else:
        bar = figure.colorbar(shown, ax=grid, extend="both", fraction=0.04, aspect=50)
        bar.set_ticks([1 / MOST, 1 / 2, 1, 2, MOST], labels=["¼", "½", "1", "2", "4"])
        bar.minorticks_off()
        bar.set_label("kept, × as often as the mean position", fontsize=8)
    figure.savefig(path, dpi=150)


def _size(keep: int | str) -> float:
    """Budgets in order; of several methods in turn, by the last."""
    return float(str(keep).split(",")[-1].rstrip("%"))


def _draw_bars(axes: Any, one: Positions) -> None:
    """A bar for each of the tokens, which have no place."""
    axes.bar(np.arange(len(one.others)), one.others, width=1.0, color="#0072B2")
    axes.axhline(1, color="black", lw=0.8, ls="--")
    axes.tick_params(labelsize=7)


def _draw_map(axes: Any, patches: np.ndarray, others: np.ndarray) -> tuple[Any, str]:
    """What a colour bar is of, and what the colours do not show."""
    from matplotlib.colors import LogNorm

    axes.set_xticks([])
    axes.set_yticks([])
    seen, norm = np.clip(patches, 1e-3, None), LogNorm(1 / MOST, MOST)
    shown = axes.imshow(seen, cmap="RdBu_r", norm=norm, interpolation="nearest")
    elsewhere = f", class {others.mean():.1f}×" if others.size else ""
    return shown, f"most {patches.max():.1f}×{elsewhere}"
