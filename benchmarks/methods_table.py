"""At equal bytes, what is each method worth?

    python -m benchmarks.methods_table MODEL [MODEL …] --prune eigen:DIR --journals runs/table

For each model, a checkpoint that was trained on scenes: every method that fits it, in each of its
forms, at several shares of the bytes that visual tokens take, `random` as the mean of five seeds,
and the bounds. The last token of each prompt is read from the cache (`study --late`), so that
methods that prune before the prompt is read and those that prune after it stand in one table.
--prune adds methods, such as those that must learn first. With --journals an interrupted run goes
on. The last line is one JSON object.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import names_of, print_record
from benchmarks.testbed import DRAWS, plus_minus
from catp_jax import api
from catp_jax.contract import BY_LAYER, Site
from catp_jax.pruning import BOUNDS, METHODS, is_learned, methods_for, site_of
from catp_jax.study.journal import Journal
from catp_jax.study.records import Conditions, Setting
from catp_jax.study.results import RANDOM, Estimate, Result, difference, estimates, families, pooled
from catp_jax.study.sweep import sweep
from catp_jax.study.tasks import Task
from catp_jax.training.scene_questions import scenes_task

SHARES = ("75%", "50%", "25%", "12.5%", "6%")
FORMS = {
    "fastv:rows=all": frozenset({Site.LAYER, Site.CROSS}),
    "k_norm:site=cache": frozenset({Site.CACHE}),
    "elastic_cache:evicts": frozenset({Site.CACHE}),
    "csp:ratio=0.1": frozenset({Site.CACHE}),
    "csp:ratio=0.9": frozenset({Site.CACHE}),
}
"""Other forms of methods, and the sites of which a model must have one."""


def label(method: str) -> str:
    """What a method is called in tables: without the folder that it has learned from."""
    name, *options = method.split(":")
    has_folder = name in METHODS and is_learned(name)
    return ":".join([name, *options[1:]]) if has_folder else method


def figures(result: Result, found: dict[str, Estimate], whole: Result) -> dict[str, Any]:
    """What is recorded of a setting; bytes and FLOPs as shares of the unpruned model's."""
    return {
        **{name: (one.mean, one.low, one.high) for name, one in found.items()},
        "agreement": result.agreement,
        "cache": result.cost.cache_bytes / whole.cost.cache_bytes,
        "prefill": result.cost.prefill_flops / whole.cost.prefill_flops,
    }


def study(
    folder: Path,
    name: str,
    task: Task,
    shares: Sequence[str],
    others: Sequence[str],
    journals: Path | None,
    console: Console,
) -> dict[str, Any]:
    """Prints a model's table and returns its figures."""
    model = api.load(folder, generation_config=False)
    fitting = [one for one in others if site_of(one.split(":")[0], model.sites) is not None]
    methods = [method for method in methods_for(model.sites) if method != RANDOM]
    methods += [form for form, sites in FORMS.items() if sites & model.sites]
    every = (*methods, *fitting, *BOUNDS, *DRAWS)
    settings = [Setting(method, share) for method in every for share in shares]
    late = bool(model.sites & {*BY_LAYER})
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt, is_late=late)
    journal = None if journals is None else Journal(journals / f"{name}.jsonl")
    results = pooled(
        list(sweep(model, task.examples, settings, conditions, score=task.score, journal=journal))
    )
    table = Table(title=f"{name}: right answers (%), bytes of cache (of all)")
    for column in ("", *shares):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    whole = results[0]
    cells: dict[str, dict[str, str]] = {}
    rows = {}
    for result, found in zip(results, estimates(results), strict=True):
        row = figures(result, found, whole)
        method, share = label(result.setting.method), result.setting.keep
        rows[method if share is None else f"{method}, {share}"] = row
        if share is not None:
            cell = f"{plus_minus(row['accuracy'])}\n{row['cache']:.0%}"
            cells.setdefault(method, {})[str(share)] = cell
    for method, by in cells.items():
        table.add_row(method, *(by[share] for share in shares))
    console.print(table)
    by_setting = {(label(one.setting.method), one.setting.keep): one.answers for one in results}
    for method, share in by_setting:
        base = method.split(":")[0]
        if method in FORMS and (base, share) in by_setting:
            mine, other = by_setting[method, share], by_setting[base, share]
            rows[f"{method}, {share}"] |= {f"against {base}": difference(mine, other)}
            for family, numbers in families(mine).items():
                apart = difference(*([some[n] for n in numbers] for some in (mine, other)))
                rows[f"{method}, {share}"] |= {f"against {base}, {family}": apart}
    return {"checksum": model.checksum, "late": late, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--prune", action="append", default=[], help="one more method")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--shares", nargs="+", default=SHARES)
    parser.add_argument("--journals", type=Path, help="folder where the answers are kept")
    options = parser.parse_args(arguments)
    names, console = names_of(options.model), Console()
    task = scenes_task(split="test", scenes=options.scenes)
    models = {
        name: study(folder, name, task, options.shares, options.prune, options.journals, console)
        for name, folder in names.items()
    }
    print_record("methods_table", task, models=models)


if __name__ == "__main__":
    main()
