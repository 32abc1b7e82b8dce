"""At equal bytes, what is each method worth?

    python -m benchmarks.methods_table MODEL [MODEL …] --prune eigen:DIR --journals runs/table

For each model, a checkpoint that was trained on scenes, or on easy-VQA with --easy-vqa: every
method that fits it, in each of its forms, at several shares of the bytes that visual tokens take,
`random` as the mean of five seeds, where the model is pruned first and at each place where others
prune, and the bounds. The last token of each prompt is read from the cache (`study --late`), so
that methods that prune before the prompt is read and those that prune after it stand in one table.
--prune adds methods, such as those that must learn first. --full asks every method to keep
everything, and says what that changed. --gpu names a GPU to compile for (h100): what a batch's
prefill and step would move there, of the shares that --gpu-shares names. With --journals an
interrupted run goes on. The last line is one JSON object.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.fidelity import AT_LAYER, IN_CACHE
from benchmarks.record import names_of, print_record
from benchmarks.tables import plus_minus
from benchmarks.testbed import DRAWS
from catp_jax import api
from catp_jax.contract import BY_LAYER, Site
from catp_jax.model import Model
from catp_jax.pruning import BOUNDS, METHODS, is_learned, methods_for, site_of
from catp_jax.study.batches import Batches
from catp_jax.study.cost import on_gpu
from catp_jax.study.journal import Journal
from catp_jax.study.records import Conditions, GpuCost, Setting
from catp_jax.study.results import (
    RANDOM,
    Estimate,
    Result,
    difference,
    estimates,
    families,
    pooled,
    together,
    without_seed,
)
from catp_jax.study.sweep import sweep
from catp_jax.study.tasks import Task, easy_vqa_task, spread
from catp_jax.targets import GPUS
from catp_jax.training.scene_questions import scenes_task

FULL = "100%"
SHARES = ("75%", "50%", "25%", "12.5%", "6%")
FORMS = {
    "fastv:rows=all": frozenset({Site.LAYER, Site.CROSS}),
    "k_norm:site=cache": frozenset({Site.CACHE}),
    "elastic_cache:evicts": frozenset({Site.CACHE}),
    "csp:ratio=0.1": frozenset({Site.CACHE}),
    "csp:ratio=0.9": frozenset({Site.CACHE}),
}
"""Other forms of methods, and the sites of which a model must have one."""


BASELINES = {Site.LAYER: AT_LAYER, Site.CACHE: IN_CACHE}
"""What a method at such a site is held against: random tokens at the same place."""
WHILE_READ = ("zipvl",)
"""Methods of the cache that prune a layer's attention over the prompt, too; none at random does."""


def baseline(method: str, sites: frozenset[Site]) -> str | None:
    """What prunes at random where a method does, unless that is where `random` prunes anyway."""
    name, *options = method.split(":")
    if name in (RANDOM, *BOUNDS, *WHILE_READ) or name not in METHODS:
        return None
    told = next((one.removeprefix("site=") for one in options if one.startswith("site=")), None)
    site = site_of(name, sites) if told is None else Site[told.upper()]
    return None if site is None else BASELINES.get(site)


def label(method: str) -> str:
    """What a method is called in tables: without the folder that it has learned from."""
    name, *options = method.split(":")
    has_folder = name in METHODS and is_learned(name)
    return ":".join([name, *options[1:]]) if has_folder else method


def figures(
    result: Result, found: dict[str, Estimate], whole: Result, there: GpuCost | None
) -> dict[str, Any]:
    """What is recorded of a setting; bytes and FLOPs as shares of the unpruned model's, but those
    on a GPU, which are of a whole batch.
    """
    row = {
        **{name: (one.mean, one.low, one.high) for name, one in found.items()},
        "agreement": result.agreement,
        "cache": result.cost.cache_bytes / whole.cost.cache_bytes,
        "prefill": result.cost.prefill_flops / whole.cost.prefill_flops,
    }
    return row if there is None else row | {"gpu": dataclasses.asdict(there)}


def costs(
    model: Model, task: Task, settings: Sequence[Setting], conditions: Conditions, gpu: str
) -> dict[Setting, GpuCost]:
    """What the first batch would cost on a GPU, by setting; a method that draws by its first."""
    batches = Batches(model, task.examples, conditions, False, lambda doing: None)
    first = batches.encode_each(0, settings)
    given = [(batches.pruners(own, first[own]), first[own].packed.inputs) for own in settings]
    found = on_gpu(gpu, model.network, given, conditions.options.max_new_tokens)
    return dict(zip(settings, found, strict=True))


def kept_whole(results: Sequence[Result], whole: Result) -> dict[str, dict[str, Any]]:
    """What methods change that are asked to keep everything, by their names."""
    found = {}
    for result in results:
        pairs = zip(result.answers, whole.answers, strict=True)
        found[label(result.setting.method)] = {
            "other answers": sum(own.text != other.text for own, other in pairs),
            "accuracy": (result.accuracy, result.low, result.high),
            "against unpruned": difference(result.answers, whole.answers),
            "KL, nats": result.kl,
        }
    return found


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of each model: `others` are more methods, `is_full` is to keep everything too,
    and of `gpu_shares` what it would cost on `gpu` (None: nothing is compiled).
    """

    task: Task
    shares: Sequence[str]
    others: Sequence[str] = ()
    journals: Path | None = None
    is_full: bool = False
    gpu: str | None = None
    gpu_shares: Sequence[str] = ()

    def methods(self, sites: frozenset[Site]) -> list[str]:
        """All that fit a model with these sites, in each of their forms, but for `random`."""
        methods = [method for method in methods_for(sites) if method != RANDOM]
        methods += [form for form, some in FORMS.items() if some & sites]
        return methods + [one for one in self.others if site_of(one.split(":")[0], sites)]

    def settings(self, sites: frozenset[Site]) -> list[Setting]:
        """What is compared: those, random at each place, and the bounds if the task knows what is
        needed.
        """
        bounds = BOUNDS if any(example.needed for example in self.task.examples) else ()
        there = [baseline for site, baseline in BASELINES.items() if site in sites]
        draws = [draw.replace(RANDOM, one, 1) for one in (RANDOM, *there) for draw in DRAWS]
        every = (*self.methods(sites), *bounds, *draws)
        return [Setting(method, share) for method in every for share in self.shares]


def gains(results: Sequence[Result], sites: frozenset[Site]) -> dict[str, dict[str, Any]]:
    """Of each setting, by how much it is better than another form of its method, and than random
    tokens at its place.
    """
    answers = {(label(one.setting.method), one.setting.keep): one.answers for one in results}
    drawn = {one: together(one, len(DRAWS)) for one in BASELINES.values()}
    found: dict[str, dict[str, Any]] = {}
    for (method, share), mine in answers.items():
        row = found.setdefault(f"{method}, {share}", {})
        for name in (method.split(":")[0] if method in FORMS else "", baseline(method, sites)):
            other = answers.get((drawn.get(name or "", name), share))
            if other is None:
                continue
            row[f"against {name}"] = difference(mine, other)
            for family, numbers in families(mine).items():
                apart = difference(*([some[n] for n in numbers] for some in (mine, other)))
                row[f"against {name}, {family}"] = apart
    return found


def study(folder: Path, name: str, asked: Asked, console: Console) -> dict[str, Any]:
    """Prints a model's table and returns its figures."""
    model, task = api.load(folder, generation_config=False), asked.task
    settings, late = asked.settings(model.sites), bool(model.sites & {*BY_LAYER})
    full = [Setting(method, FULL) for method in asked.methods(model.sites) if asked.is_full]
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt, is_late=late)
    journal = None if asked.journals is None else Journal(asked.journals / f"{name}.jsonl")
    every = [*settings, *full]
    swept = list(sweep(model, task.examples, every, conditions, score=task.score, journal=journal))
    results = pooled([result for result in swept if result.setting not in full])
    whole, there = results[0], {}
    if asked.gpu is not None:
        compiled = [one for one in settings if one.keep in asked.gpu_shares]
        there = costs(model, task, [whole.setting, *compiled], conditions, asked.gpu)
        there |= {
            Setting(together(one.method, len(DRAWS)), one.keep): cost
            for one, cost in there.items()
            if one.method != without_seed(one.method)
        }
    apart, rows = gains(results, model.sites), {}
    cells: dict[str, dict[str, str]] = {}
    for result, found in zip(results, estimates(results), strict=True):
        row = figures(result, found, whole, there.get(result.setting))
        method, share = label(result.setting.method), result.setting.keep
        if share is None:
            rows[method] = row
            continue
        rows[f"{method}, {share}"] = row | apart[f"{method}, {share}"]
        cell = f"{plus_minus(row['accuracy'])}\n{row['cache']:.0%}"
        cells.setdefault(method, {})[str(share)] = cell
    table = Table(title=f"{name}: right answers (%), bytes of cache (of all)")
    for column in ("", *asked.shares):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for method, by in cells.items():
        table.add_row(method, *(by[share] for share in asked.shares))
    console.print(table)
    record: dict[str, Any] = {"checksum": model.checksum, "late": late, "rows": rows}
    whole_kept = [result for result in swept if result.setting in full]
    return record | ({"full": kept_whole(whole_kept, whole)} if whole_kept else {})


def easy_vqa(questions: int) -> Task:
    """So many of easy-VQA's test questions."""
    task = easy_vqa_task()
    source = {**task.source, "questions": questions}
    return dataclasses.replace(task, examples=spread(task.examples, questions), source=source)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--prune", action="append", default=[], help="one more method")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--easy-vqa", type=int, metavar="QUESTIONS", help="in place of scenes")
    parser.add_argument("--shares", nargs="+", default=SHARES)
    parser.add_argument("--full", action="store_true", help="ask every method to keep everything")
    parser.add_argument("--gpu", choices=list(GPUS), help="a GPU that need not be there")
    parser.add_argument("--gpu-shares", nargs="+", default=("25%",))
    parser.add_argument("--journals", type=Path, help="folder where the answers are kept")
    options = parser.parse_args(arguments)
    names, console = names_of(options.model), Console()
    scenes = options.easy_vqa is None
    task = (
        scenes_task(split="test", scenes=options.scenes) if scenes else easy_vqa(options.easy_vqa)
    )
    asked = Asked(
        task=task,
        shares=options.shares,
        others=options.prune,
        journals=options.journals,
        is_full=options.full,
        gpu=options.gpu,
        gpu_shares=options.gpu_shares,
    )
    models = {name: study(folder, name, asked, console) for name, folder in names.items()}
    print_record("methods_table", task, models=models)


if __name__ == "__main__":
    main()
