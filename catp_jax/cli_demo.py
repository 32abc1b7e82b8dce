"""`catp-jax demo`: a small study of the shipped mini models, and its report."""

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from catp_jax import cli_options as opts
from catp_jax.cli_sweep import sweep
from catp_jax.terminal import one_line, say

if TYPE_CHECKING:  # at run time inside the functions, so that --help is quick
    from catp_jax.model import Model
    from catp_jax.study.records import Setting
    from catp_jax.study.tasks import Example

LIMIT = 256  # questions
SEEDS = 3  # of keeping at random


def demo(
    out: Annotated[Path, opts.file_option("The folder for the figures.")] = Path("demo"),
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="A model's folder or name; the mini models of this package, if not given. Repeat "
            "it for several.",
            parser=opts.folder,
            metavar="DIR|NAME",
        ),
    ] = None,
    limit: opts.Limit = LIMIT,
    ignore_config: opts.IgnoreConfig = None,
) -> None:
    """Answer questions about drawn scenes unpruned and pruned: tables, curves and pictures."""
    from catp_jax import api
    from catp_jax.readers.hub import name_of
    from catp_jax.study.finished import study_of
    from catp_jax.study.journal import Journal
    from catp_jax.study.records import Conditions
    from catp_jax.study.report import draw_report, make_folder
    from catp_jax.study.tasks import spread
    from catp_jax.training.scene_questions import FAMILIES, scenes_task

    make_folder(out)
    folders = model or minis()
    names = [name_of(folder) for folder in folders]
    if len({*names}) < len(names):
        names = [str(folder) for folder in folders]
    names = list(map(one_line, names))  # they are titles of pictures too
    models = {
        name: api.load(folder, ignore_config=ignore_config or (), generation_config=False)
        for name, folder in zip(names, folders, strict=True)
    }
    task = scenes_task(scenes=-(-(limit or LIMIT) // len(FAMILIES)))
    examples = spread(task.examples, limit)
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt)
    studies = {}
    for name, loaded in models.items():
        settings, journal = settings_for(loaded), Journal()
        say(f"{name}: {len(examples)} questions, unpruned and under {len(settings)} settings")
        sweep(loaded, task, examples, settings, conditions, journal, name, pictured=pick(examples))
        studies[name] = study_of(journal)
    print(f"written: {', '.join(map(one_line, draw_report(studies, out)))}")


def minis() -> list[Path]:
    """The folders of the checkpoints that the demo shows: one of each kind that was trained on
    scenes and comes with this package.
    """
    assets = Path(str(importlib.resources.files("catp_jax"))) / "assets"
    return [assets / f"scenes-{kind}" for kind in ("blip2-opt", "llama-vision")]


def settings_for(model: "Model") -> "list[Setting]":
    """A few methods and budgets, as many as a demo has time for."""
    from catp_jax.contract import Site
    from catp_jax.study.records import Setting

    if Site.ENTRY in model.sites:
        methods, budgets = ("catp", "l2", "self_attention"), (16, 8, 4)
    else:
        methods, budgets = ("trimmed_llama", "fastv"), (64, 16, 8)
    draws = (f"random:seed={10_000 * seed}" for seed in range(SEEDS))
    return [Setting(method, keep) for method in (*methods, *draws, "oracle") for keep in budgets]


def pick(examples: "tuple[Example, ...]") -> list[int]:
    """Numbers of two questions about two images, such as ask for a word if there are any."""
    from catp_jax.study.tasks import first_of_each_image

    numbers = first_of_each_image(examples)
    return sorted(numbers, key=lambda n: examples[n].question.startswith("wh"))[-2:]
