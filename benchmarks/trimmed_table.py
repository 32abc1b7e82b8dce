"""Do the findings of the Trimmed Llama paper hold on the shipped mini model?

Regime: questions about test scenes of many objects and the mini Llama Vision trained on such, with
260 visual features and six heads that choose, against SEED-Bench and the real 11B and 90B in the
paper (arXiv 2504.00557); greedy answers. The mini was trained before any of this was measured.

    python -m benchmarks.trimmed_table --scenes 200

Prints, for each K_ratio, which share of the features the heads together keep and what accuracy that
leaves, the paper's figures beside it, and in words whether half of the features are as good as all
of them: worse, where the interval of the paired difference lies below zero; as good, where it lies
above minus two points; else it cannot be told. With --journals the answers are kept in that folder,
and an interrupted run goes on. The last line is one JSON object.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import print_record
from catp_jax import api
from catp_jax.study.journal import Journal
from catp_jax.study.records import UNPRUNED, Conditions, Result, Setting
from catp_jax.study.results import difference, families
from catp_jax.study.sweep import sweep
from catp_jax.training.scene_questions import scenes_task

MINI = Path(__file__).resolve().parents[1] / "catp_jax" / "assets" / "scenes-llama-vision"
RATIOS = (0.5, 0.25, 0.15, 0.05)
PARITY = ("50%", "40%")  # the paper: as good as all features
MARGIN = 2.0  # points that may be lost, at most, where it is said to be as good
PAPER = {  # of a K_ratio: the share of the features kept, SEED-Bench, and unpruned, all in %
    "11B": {0.25: (61.5, 72.3, 72.6), 0.05: (14.2, 62.3, 72.6)},
    "90B": {0.25: (74.2, 75.9, 76.3), 0.15: (51.0, 75.4, 76.3)},
}


def share_kept(result: Result) -> float:
    """The mean share of its visual tokens that a question kept."""
    return float(np.mean([one.visual_tokens / one.available for one in result.answers]))


def ratios_table(by: dict[float, Result], unpruned: Result) -> Table:
    """Share kept and accuracy by K_ratio, relative to the unpruned model, the paper's beside it."""
    table = Table(title="What the heads keep together, and accuracy, in % of all and of unpruned")
    table.add_column("K_ratio", justify="right")
    for group in ("kept", "accuracy"):
        table.add_column(f"{group}\nhere", justify="right")
        for size in PAPER:
            table.add_column(f"\n{size}", justify="right")
    for ratio, result in by.items():
        told = [figures.get(ratio) for figures in PAPER.values()]
        table.add_row(
            f"{ratio}",
            f"{100 * share_kept(result):.1f}",
            *("" if one is None else f"{one[0]:.1f}" for one in told),
            f"{100 * result.accuracy / unpruned.accuracy:.1f}",
            *("" if one is None else f"{100 * one[1] / one[2]:.1f}" for one in told),
        )
    return table


def in_words(parity: dict[str, Result], unpruned: Result) -> list[str]:
    """Whether so many of the features are as good as all of them: overall and by family."""
    out = []
    for keep, result in parity.items():
        parts = {"all questions": range(len(result.answers)), **families(result.answers)}
        said = []
        for name, numbers in parts.items():
            own, whole = ([r.answers[n] for n in numbers] for r in (result, unpruned))
            mean, low, high = (100 * figure for figure in difference(own, whole))
            verdict = "worse" if high < 0 else "as good" if low >= -MARGIN else "cannot be told"
            said.append(f"{name} {mean:+.1f} [{low:+.1f}, {high:+.1f}], {verdict}")
        out.append(
            f"With {keep} of the features, against all of them, in points: {'; '.join(said)}."
        )
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=MINI, help="default: the shipped mini")
    parser.add_argument("--scenes", type=int, default=200, help="with a question of each family")
    parser.add_argument("--journals", type=Path, help="folder where the answers are kept")
    options = parser.parse_args(arguments)
    console = Console()
    task = scenes_task(scenes=options.scenes)
    model, name = api.load(options.model, generation_config=False), options.model.resolve().name
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt)
    settings = [Setting(f"trimmed_llama:k_ratio={ratio}", "auto") for ratio in RATIOS]
    settings += [Setting("trimmed_llama", keep) for keep in PARITY]
    journal = Journal(options.journals / f"{name}.jsonl") if options.journals else None
    results = list(
        sweep(model, task.examples, settings, conditions, score=task.score, journal=journal)
    )
    by = {result.setting: result for result in results}
    unpruned = by[Setting(UNPRUNED, None)]
    ratios = {ratio: by[setting] for ratio, setting in zip(RATIOS, settings, strict=False)}
    parity = {keep: by[Setting("trimmed_llama", keep)] for keep in PARITY}
    console.print(ratios_table(ratios, unpruned))
    words = in_words(parity, unpruned)
    for line in words:
        console.print(line)
    figures: dict[str, Any] = {
        str(result.setting): {
            "kept": share_kept(result),
            "accuracy": result.accuracy,
            "interval": [result.low, result.high],
        }
        for result in results
    }
    checksum = model.describe()["checksum"]
    print_record(
        "trimmed_table", task, model=name, checksum=checksum, settings=figures, words=words
    )


if __name__ == "__main__":
    main()
