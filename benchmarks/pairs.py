"""At equal bytes, does a pair of methods beat the best single one?

    python -m benchmarks.pairs MODEL --directions eigen:DIR --journals runs/pairs

Half of the tokens and half of each one's numbers are a quarter of the bytes. Methods of tokens,
each with one that thins keys or puts keys and values down in few directions, against every such
method alone, on scenes; the last token of each prompt is read from the cache. What takes more bytes
than the budget, since it cannot do with less, is left out. The best single method and the best pair
are chosen by the questions about half of the images, and held against each other on the other half,
so that being the best of many is no advantage. The last line is one JSON object.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.methods_table import label
from benchmarks.record import print_record
from benchmarks.tables import plus_minus
from benchmarks.testbed import accuracy
from catp_jax import api
from catp_jax.contract import Site
from catp_jax.pruning import site_of
from catp_jax.study.journal import Journal
from catp_jax.study.records import Answer, Conditions, Setting
from catp_jax.study.results import difference
from catp_jax.study.sweep import sweep
from catp_jax.training.scene_questions import scenes_task

TOKENS = (
    "trimmed_llama",
    "fastv",
    "nearest_centroid",
    "csp",
    "elastic_cache",
    "aircache",
    "zipvl",
)
BUDGETS: dict[str, dict[str, tuple[str, str]]] = {
    "25%": {"think": ("75%", "33.3%"), "eigen": ("50%", "50%")},
    "12.5%": {"think": ("75%", "16.7%"), "eigen": ("50%", "25%")},
}
"""Of all bytes: what each thinner leaves of a token's, and the tokens beside it."""
OVER = 1.1
"""How many times as many bytes as methods of tokens alone a setting may take."""

Answers = Sequence[Answer]


def settings_of(methods: Sequence[str], thinners: Sequence[str]) -> dict[str, dict[str, Setting]]:
    """By budget and name, each method alone and each pair."""
    found: dict[str, dict[str, Setting]] = {}
    for budget, shares in BUDGETS.items():
        own = {label(method): Setting(method, budget) for method in (*methods, *thinners)}
        for method in methods:
            for thin in thinners:  # first: a head's own tokens come last
                numbers, tokens = shares[label(thin)]
                pair = Setting(f"{thin},{method}", f"{numbers},{tokens}")
                own[f"{method} and {label(thin)}"] = pair
        found[budget] = own
    return found


def halves(answers: Answers) -> tuple[list[Answer], list[Answer]]:
    """Those about every other image, and the rest."""
    images = sorted({one.image for one in answers})
    chosen = {*images[::2]}
    return (
        [one for one in answers if one.image in chosen],
        [one for one in answers if one.image not in chosen],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--directions", help="eigen:DIR")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--journals", type=Path, help="folder where the answers are kept")
    options = parser.parse_args(arguments)
    model, console = api.load(options.model, generation_config=False), Console()
    if Site.CACHE not in model.sites:
        parser.error("this model prunes nothing in its cache")
    thinners = ["think", *([options.directions] if options.directions else [])]
    methods = [method for method in TOKENS if site_of(method, model.sites) is not None]
    wanted = settings_of(methods, thinners)
    task = scenes_task(split="test", scenes=options.scenes)
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt, is_late=True)
    journal = None if options.journals is None else Journal(options.journals / "pairs.jsonl")
    every = [setting for own in wanted.values() for setting in own.values()]
    results = {
        result.setting: result
        for result in sweep(
            model, task.examples, every, conditions, score=task.score, journal=journal
        )
    }
    whole = next(iter(results.values())).cost.cache_bytes
    budgets: dict[str, Any] = {}
    for budget, own in wanted.items():
        sizes = {name: results[setting].cost.cache_bytes / whole for name, setting in own.items()}
        most = OVER * min(sizes[label(method)] for method in methods)
        split = {name: halves(results[setting].answers) for name, setting in own.items()}
        fitting = [name for name in own if sizes[name] <= most]
        by_kind = {
            kind: [name for name in fitting if (" and " in name) is (kind == "pair")]
            for kind in ("alone", "pair")
        }
        best = {
            kind: max(names, key=lambda name: accuracy(split[name][0])[0])
            for kind, names in by_kind.items()
            if names
        }
        title = f"{budget} of the bytes; best by the other images: {' and '.join(best.values())}"
        table = Table(title=title)
        for column in ("", "right, %", "bytes, %", f"points to {best['alone']}"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        rows = {}
        for name in fitting:
            apart = difference(split[name][1], split[best["alone"]][1])
            rows[name] = {
                "accuracy": accuracy(split[name][1]),
                "bytes": sizes[name],
                "to best": apart,
            }
            told = "{:+.0f} [{:+.0f}, {:+.0f}]".format(*(100 * figure for figure in apart))
            table.add_row(
                name, plus_minus(rows[name]["accuracy"]), f"{100 * sizes[name]:.0f}", told
            )
        console.print(table)
        left_out = [name for name in own if name not in fitting]
        budgets[budget] = {"best": best, "rows": rows, "too large": left_out}
    print_record("pairs", task, model=options.model.name, checksum=model.checksum, budgets=budgets)


if __name__ == "__main__":
    main()
