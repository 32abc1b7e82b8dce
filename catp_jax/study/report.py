"""Tables and curves of a study's results."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from catp_jax.study.sweep import UNPRUNED, Result


def table(results: Sequence[Result]) -> Table:
    """The results as a table for the terminal, in their order."""
    out = Table(title=f"{results[0].questions} questions")
    out.add_column("method", no_wrap=True)
    for column in (
        "visual\ntokens\nkept",
        "\n\naccuracy",
        "agreement\nwith\nunpruned",
        "\ncross-KV\nbytes",
        "latency,\nms a\nquestion",
    ):
        out.add_column(column, justify="right", no_wrap=True)
    for result in results:
        out.add_row(
            result.setting.method,
            f"{result.visual_tokens:.0f}",
            f"{result.accuracy:.1%}",
            f"{result.agreement:.1%}",
            f"{result.cross_kv_bytes:,}",
            f"{result.milliseconds:.1f} ± {result.spread:.1f}",
        )
    return out


def write_json_lines(results: Sequence[Result], path: Path) -> None:
    """One JSON object a line, figures only."""
    with path.open("w") as file:
        for result in results:
            row = dataclasses.asdict(result)
            del row["answers"], row["kept"]
            file.write(json.dumps(row) + "\n")


def draw_accuracy(results: Sequence[Result], path: Path) -> None:
    """Accuracy against visual tokens kept, a line per method, the unpruned model as a rule."""
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    unpruned = next(result for result in results if result.setting.method == UNPRUNED)
    axes.axhline(100 * unpruned.accuracy, color="grey", linestyle="--", label="unpruned")
    for method in dict.fromkeys(r.setting.method for r in results if r is not unpruned):
        own = sorted(
            (r for r in results if r.setting.method == method), key=lambda r: r.visual_tokens
        )
        axes.plot(
            [r.visual_tokens for r in own],
            [100 * r.accuracy for r in own],
            marker="o",
            label=method,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set_xlabel(f"visual tokens kept (of {unpruned.visual_tokens:.0f})")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"Accuracy against visual tokens kept, {unpruned.questions} questions")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
