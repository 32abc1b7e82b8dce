"""Do the CATP paper's findings hold on mini models?

Regime: questions about test scenes of many objects and mini BLIP-2s trained on such, against VQAv2
and the real opt-2.7b in the paper (arXiv 2404.08567); generation as there: 5 beams, length penalty
0, at most 10 tokens. Both prune 32 queries to 16, 8 and 4. Minis have to be trained before any of
this is measured.

    python -m benchmarks.catp_table --model runs/scenes-blip2-opt --scenes 200

Prints, for each model, accuracy when one cross-attention layer alone votes (the paper's layer
study), the ratios of CATP to the baselines, and in words what agrees. With --journals the answers
are kept in that folder, and an interrupted run goes on. The last line is one JSON object.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import names_of, print_record
from catp_jax import api
from catp_jax.generation.options import Options
from catp_jax.models.querying import QueryingConfig
from catp_jax.pruning import BOUNDS
from catp_jax.study.journal import Journal
from catp_jax.study.records import UNPRUNED, Conditions, Result, Setting
from catp_jax.study.results import difference, families
from catp_jax.study.sweep import sweep
from catp_jax.training.scene_questions import scenes_task

BUDGETS = (16, 8, 4)
LEVELS = {16: "1/2", 8: "1/4", 4: "1/8"}

PAPER_UNPRUNED = 52.14  # VQAv2 accuracy, %
PAPER_LAYERS = {  # accuracy, %, by the layer that votes, at 16, 8 and 4 of 32 queries
    1: (44.17, 35.44, 30.17),
    2: (39.93, 31.26, 26.46),
    3: (42.80, 31.51, 18.94),
    4: (22.34, 16.94, 17.04),
    5: (27.43, 11.01, 10.48),
    6: (43.79, 34.66, 23.70),
}
PAPER_RATIOS = {"self_attention": 12.1, "l2": 6.6}  # the largest that the paper reports
BASELINES = (*PAPER_RATIOS, "random", "position")
OTHERS = (
    "catp:layers=all",
    "catp:image_weights",
    "l2",
    "self_attention",
    "position",
    "random",
    *BOUNDS,
)


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's, from -1 to 1; equal values share their mean rank."""

    def ranks(values: list[float]) -> np.ndarray:
        array = np.asarray(values)
        below = (array[:, None] > array[None]).sum(axis=1)
        equal = (array[:, None] == array[None]).sum(axis=1)
        return below + (equal - 1) / 2

    a, b = ranks(one), ranks(other)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def layer_table(name: str, by: dict[tuple[str, int], Result], layers: int) -> Table:
    """Accuracy by the layer that votes, the paper's beside ours."""
    table = Table(title=f"{name}: accuracy (%) when one cross-attention layer votes")
    table.add_column("layer", justify="right")
    for keep in BUDGETS:
        table.add_column(f"{LEVELS[keep]}\nhere", justify="right", no_wrap=True)
        table.add_column("\npaper", justify="right")
    for layer in range(1, layers + 1):
        cells = []
        for column, keep in enumerate(BUDGETS):
            own = by[f"catp:layers={layer}", keep]
            half = 50 * (own.high - own.low)
            cells += [f"{100 * own.accuracy:.1f} ± {half:.1f}"]
            cells += [f"{PAPER_LAYERS[layer][column]:.2f}" if layer in PAPER_LAYERS else ""]
        table.add_row(str(layer), *cells)
    return table


def others_table(name: str, by: dict[tuple[str, int], Result]) -> Table:
    """The other methods, and how many times as accurate CATP is as the baselines."""
    table = Table(title=f"{name}: other ways to choose")
    table.add_column("method")
    for keep in BUDGETS:
        table.add_column(LEVELS[keep], justify="right", no_wrap=True)
    for method in OTHERS:
        own = [by[method, keep] for keep in BUDGETS]
        cells = [f"{100 * r.accuracy:.1f} ± {50 * (r.high - r.low):.1f}" for r in own]
        table.add_row(method, *cells)
    for voters, label in (("last", "CATP"), ("first", "CATP, first layer")):
        for baseline, paper in PAPER_RATIOS.items():
            cells = [f"{ratio(by, voters, baseline, keep):.2f} ×" for keep in BUDGETS]
            table.add_row(f"{label} : {baseline} (paper: up to {paper})", *cells)
    return table


def ratio(by: dict[tuple[str, int], Result], voters: str, baseline: str, keep: int) -> float:
    """Accuracy of CATP over that of a baseline."""
    layers = [number for number in range(1, 100) if (f"catp:layers={number}", keep) in by]
    own = by[f"catp:layers={layers[-1 if voters == 'last' else 0]}", keep]
    return own.accuracy / max(by[baseline, keep].accuracy, 1e-9)


def by_family(result: Result) -> dict[str, float]:
    """Accuracy of each family's questions."""
    return {
        family: float(np.mean([result.answers[number].score for number in numbers]))
        for family, numbers in families(result.answers).items()
    }


def paired(by: dict[tuple[str, int], Result], layers: int) -> dict[str, Any]:
    """By how much CATP is better than other ways, and its first layer's and its weighted votes than
    its own, at each budget: paired differences.
    """
    last = f"catp:layers={layers}"
    pairs = [(last, other) for other in BASELINES]
    pairs += [("catp:layers=1", last), ("catp:image_weights", last)]
    return {
        f"{own} − {other}": {
            LEVELS[keep]: difference(by[own, keep].answers, by[other, keep].answers)
            for keep in BUDGETS
        }
        for own, other in pairs
    }


def in_words(by: dict[tuple[str, int], Result], layers: int) -> list[str]:
    """Where our figures agree with the paper's, and where not, by paired differences."""
    out = []
    for column, keep in enumerate(BUDGETS):
        own = [by[f"catp:layers={layer}", keep] for layer in range(1, layers + 1)]
        ours = [result.accuracy for result in own]
        theirs = [PAPER_LAYERS[layer][column] for layer in range(1, layers + 1)]
        best = int(np.argmax(ours))
        near = [
            str(number)
            for number, result in enumerate(own, 1)
            if number != best + 1 and compared(own[best], result) == "equal"
        ]
        told = f"layer {best + 1} votes best here"
        if near:
            told += f" (layers that are no worse, as far as can be told: {', '.join(near)})"
        out.append(
            f"At {LEVELS[keep]} {told}, layer {int(np.argmax(theirs)) + 1} in the paper; the order "
            f"of the layers correlates by {rank_correlation(ours, theirs):+.2f} (Spearman)."
        )
    for other in BASELINES:
        signs = [compared(by[f"catp:layers={layers}", k], by[other, k]) for k in BUDGETS]
        ratios = [ratio(by, "last", other, keep) for keep in BUDGETS]
        line = (
            f"CATP against {other} at 1/2, 1/4, 1/8: {', '.join(signs)} (equal: the 95 % interval "
            f"of the paired difference holds zero); {min(ratios):.2f} to {max(ratios):.2f} times "
            "its accuracy"
        )
        if other in PAPER_RATIOS:
            verdict = "agrees" if set(signs) == {"better"} else "does not agree"
            line += f", up to {PAPER_RATIOS[other]} in the paper: {verdict}"
        out.append(f"{line}.")
    return out


def compared(own: Result, other: Result) -> str:
    """Better, worse or equal, by the paired difference."""
    _, low, high = difference(own.answers, other.answers)
    return "better" if low > 0 else "worse" if high < 0 else "equal"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=Path, action="append", required=True, help="a BLIP-2; repeat it for several"
    )
    parser.add_argument("--scenes", type=int, default=200, help="with a question of each family")
    parser.add_argument("--journals", type=Path, help="folder where the answers are kept")
    parser.add_argument("--num-beams", type=int, default=5)
    options = parser.parse_args(arguments)
    names, console = names_of(options.model), Console()
    task = scenes_task(scenes=options.scenes)
    conditions = Conditions(
        task=task.name,
        source=task.source,
        prompt=task.prompt,
        options=Options(
            max_new_tokens=10,
            min_new_tokens=1,
            num_beams=options.num_beams,
            length_penalty=1.0 if options.num_beams == 1 else 0.0,
        ),
    )
    found: dict[str, Any] = {}
    for name, folder in names.items():
        model = api.load(folder, generation_config=False)
        if not isinstance(model.config, QueryingConfig):
            sys.exit(f"error: {folder} is no BLIP-2 or InstructBLIP, whose queries CATP prunes")
        layers = len(model.config.qformer.cross_layers)
        methods = [*(f"catp:layers={layer}" for layer in range(1, layers + 1)), *OTHERS]
        settings = [Setting(method, keep) for method in methods for keep in BUDGETS]
        journal = Journal(options.journals / f"{name}.jsonl") if options.journals else None
        with console.status(name) as status:
            results = list(
                sweep(
                    model,
                    task.examples,
                    settings,
                    conditions,
                    score=task.score,
                    journal=journal,
                    name=name,
                    report=lambda doing, name=name, show=status.update: show(f"{name}: {doing}"),
                )
            )
        by = {(r.setting.method, r.setting.keep): r for r in results if r.setting.keep}
        unpruned = next(r for r in results if r.setting.method == UNPRUNED)
        console.print(layer_table(name, by, layers))
        console.print(others_table(name, by))
        console.print(
            f"Unpruned: {100 * unpruned.accuracy:.1f} % here, {PAPER_UNPRUNED} % in the paper."
        )
        words = in_words(by, layers) if layers == len(PAPER_LAYERS) else []
        for line in words:
            console.print(line)
        found[name] = {
            "checksum": model.describe()["checksum"],
            "unpruned": unpruned.accuracy,
            "accuracy": {f"{m}, keep {k}": by[m, k].accuracy for m, k in by},
            "interval": {f"{m}, keep {k}": [by[m, k].low, by[m, k].high] for m, k in by},
            "by family": {str(result.setting): by_family(result) for result in results},
            "paired": paired(by, layers),
            "words": words,
        }
    print_record("catp_table", task, num_beams=options.num_beams, models=found)


if __name__ == "__main__":
    main()
