"""The demo: the shipped mini models answer questions about images, unpruned and pruned."""

import importlib.resources
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from catp_jax import api
from catp_jax.contract import Site
from catp_jax.model import Model
from catp_jax.readers.hub import name_of
from catp_jax.study import curves, tables, tasks
from catp_jax.study.pictures import Panel, draw_kept
from catp_jax.study.records import UNPRUNED, Result, Setting
from catp_jax.study.report import make_folder
from catp_jax.study.sweep import sweep
from catp_jax.terminal import as_text

EACH = 4  # questions about one image
SHOWN = ("trimmed_llama", "catp")  # the methods that there are pictures of


def minis() -> list[Path]:
    """The folders of the mini checkpoints that the demo shows, which come with this package."""
    assets = Path(str(importlib.resources.files("catp_jax"))) / "assets"
    return [assets / "mini-llama-vision", assets / "mini-blip2-opt"]


def settings_for(model: Model) -> list[Setting]:
    """Methods and budgets that say something about a model."""
    if Site.ENTRY in model.sites:
        methods, budgets = ("catp", "l2", "self_attention", "random"), (16, 8, 4)
    else:
        methods, budgets = ("trimmed_llama", "fastv", "random"), (130, 64, 16)
    return [Setting(method, keep) for method in methods for keep in budgets]


def run(
    folders: Sequence[Path],
    out: Path,
    limit: int | None,
    console: Console,
    ignore_config: Sequence[str] = (),
) -> None:
    """Answers `questions` of easy-VQA's test set with each model and writes the figures to `out`.

    Raises ValueError if `out` is a file or a model cannot be loaded.
    """
    make_folder(out)
    folders = folders or minis()
    names = [name_of(folder) for folder in folders]
    if len({*names}) < len(names):
        names = [str(folder) for folder in folders]
    models = {
        name: api.load(folder, ignore_config=ignore_config)
        for name, folder in zip(names, folders, strict=True)
    }
    examples = spread_out(list(tasks.easy_vqa("test")), limit or 256)

    results: dict[str, list[Result]] = {}
    panels: list[list[Panel]] = []
    pictured = pick(examples)
    for name, model in models.items():
        with console.status("reading images") as status:
            results[name] = list(
                sweep(
                    model,
                    examples,
                    settings_for(model),
                    name=name,
                    pictured=pictured,
                    report=lambda doing, name=name, show=status.update: show(
                        as_text(f"{name}: {doing}")
                    ),
                )
            )
        panels += show(model, examples, pictured, results[name])
        console.print(tables.table(results[name], name))
    curves.draw_accuracy(results, out / "accuracy.png")
    draw_kept(panels, out / "kept.png")
    every = [result for some in results.values() for result in some]
    tables.write_json_lines(every, out / "results.jsonl")
    tables.write_csv(dict(results), out / "results.csv")
    files = ("accuracy.png", "kept.png", "results.jsonl", "results.csv")
    console.print(as_text(f"written: {', '.join(str(out / name) for name in files)}"))


def spread_out(examples: list[tasks.Example], number: int) -> list[tasks.Example]:
    """`number` examples, up to `EACH` about one image, the images at even distances.

    An image is encoded once for all its questions in a batch.
    """
    if not 1 <= number <= len(examples):
        raise ValueError(f"the demo takes 1 to {len(examples)} questions, got {number}")
    groups: dict[int, list[tasks.Example]] = defaultdict(list)
    for example in examples:
        groups[example.image_id].append(example)
    each = max(EACH, -(-number // len(groups)))
    while sum(min(each, len(group)) for group in groups.values()) < number:
        each += 1
    images, picked = list(groups.values()), []
    step = max(1, len(images) * each // (number + each))
    for group in [*images[::step], *(g for n, g in enumerate(images) if n % step)]:
        count = min(each, len(group))
        picked += [group[index * len(group) // count] for index in range(count)]
    return picked[:number]


def pick(examples: list[tasks.Example]) -> list[int]:
    """Numbers of two questions about two images, such as ask for a word if there are any."""
    first = {e.image_id: number for number, e in reversed(list(enumerate(examples)))}
    return sorted(first.values(), key=lambda n: examples[n].question.startswith("wh"))[-2:]


def show(
    model: Model, examples: list[tasks.Example], numbers: Sequence[int], results: list[Result]
) -> list[list[Panel]]:
    """A row of panels for each question: the image, and what was kept of it at each budget."""
    rows = []
    for number in numbers:
        example = examples[number]
        image = model.picture(example.image)
        row = []
        for result in results:
            if result.setting.method == UNPRUNED:
                caption = f"{example.question}\nall: {result.answers[number].text}"
                row.append(Panel(image=image, kept=None, caption=caption))
            elif result.setting.method in SHOWN:
                method, keep = result.setting.method, result.setting.keep
                caption = f"{method}\nkept {keep}: {result.answers[number].text}"
                row.append(Panel(image=image, kept=result.maps[number], caption=caption))
        rows.append(row)
    return rows
