"""The command line's studies: `catp-jax study MODEL --task …` and `catp-jax study report FILE`.

The first is short for `catp-jax study run MODEL …`. What needs no model is checked
before one is loaded.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from catp_jax import cli_options as opts
from catp_jax.cli_compared import (
    DRAWS,
    LEVELS,
    all_that_fit,
    baselines,
    check_bounds,
    check_fit,
    settings_of,
    smaller_images,
)
from catp_jax.cli_sweep import interruptible, sweep
from catp_jax.terminal import one_line, say

if TYPE_CHECKING:  # at run time inside the functions, so that --help is quick
    from catp_jax.study.tasks import Task

RUN = "run"
SEEDS = 2**31 - 2**20  # with a question's number on top it is still a seed
PICTURED = 4  # images whose pictures go into the report


class RunByDefault(TyperGroup):
    """A group whose first word may be left out: it is then `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compare pruning methods on a task: `study MODEL …` runs a study (`study run --help` "
    "lists its options), and `study report FILE …` draws it.",
)


@app.command(RUN)
@opts.with_options
def run(
    model: opts.ModelFolder,
    loading: opts.Loading,
    contrast: opts.Contrast,
    generation: opts.Generation,
    task: Annotated[
        str,
        typer.Option(
            help="Where the questions come from: scenes, drawn by this package, with dials after a "
            "colon (scenes:objects=12,size=small,tiles=4); easy-vqa; vqav2, pope and gqa, from "
            "their authors' files; jsonl.",
            metavar="TASK",
        ),
    ] = "easy-vqa",
    questions: Annotated[
        Path | None, opts.file_option("vqav2, pope, gqa: the question file.")
    ] = None,
    annotations: Annotated[Path | None, opts.file_option("vqav2: the annotation file.")] = None,
    images: Annotated[
        Path | None, opts.file_option("vqav2, pope, gqa: the folder of images.")
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(help="vqav2, pope, gqa: the share of the questions, drawn at random."),
    ] = None,
    data: Annotated[Path | None, opts.file_option("jsonl: the file of questions.")] = None,
    limit: opts.Limit = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help='What is asked, with "{question}" where the question goes. If not given: the '
            'question alone, and "Question: {question} Short answer:" for vqav2, pope and gqa.'
        ),
    ] = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{opts.PRUNE} Of a task that knows what is needed also oracle, which keeps that "
            "first, and anti, last. Repeat it to compare; all methods that fit the model, if not "
            "given, and these bounds. A method with several seeds (random, random:seed=1) is one "
            f"line of the report; random has {DRAWS}, if no method is given.",
            metavar="METHOD,…",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{opts.KEEP} Repeat it to compare: each --prune meets each --keep of as many "
            f"budgets. If not given: {', '.join(LEVELS)}.",
            metavar="N|P%,…",
        ),
    ] = None,
    image_scale: Annotated[
        list[float] | None,
        typer.Option(
            help=f"{opts.IMAGE_SCALE} Repeat it to compare; nothing is pruned there. "
            "If not given, and without --prune: 0.5."
        ),
    ] = None,
    tiles: Annotated[
        list[int] | None,
        typer.Option(
            help=f"{opts.TILES} Repeat it to compare; nothing is pruned there. "
            "If not given, and without --prune: 1, if the model takes several."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        opts.file_option(
            "The file to write. An interrupted study resumes in it, and methods and budgets can "
            "be added to it. If not given: runs/MODEL-TASK.jsonl."
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Draws the fraction, what random methods keep, answers above temperature 0, and "
            "the bootstrap.",
            min=0,
            max=SEEDS - 1,
        ),
    ] = 42,
    batch_size: Annotated[
        int, typer.Option(help="How many questions are answered at a time.", min=1)
    ] = 32,
    timed: Annotated[
        bool, typer.Option("--timed", help="Measure times too, which takes programs of its own.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Compile for this GPU too, which need not be there (h100, h200, a100 or b200): "
            "the report then has the bytes that it would move, and FLOPs.",
            metavar="NAME",
        ),
    ] = None,
    half_pixels: Annotated[
        bool,
        typer.Option(
            "--half-pixels",
            help="Ask also about images with half the pixels a side, unpruned: the report then has "
            "accuracy on the questions that get a wrong answer there.",
        ),
    ] = False,
    chat: opts.Chat = False,
    begun: opts.Begun = "",
    late: Annotated[
        bool,
        typer.Option(
            "--late",
            help="Read the last token of each prompt from the cache, as answers are: methods that "
            "prune the cache then count from the first word on.",
        ),
    ] = False,
    generation_config: Annotated[
        bool,
        opts.generation_option(
            "--generation-config",
            help="Take options that are not given from the checkpoint's generation_config.json.",
        ),
    ] = False,
) -> None:
    """Answer the questions of a task unpruned and pruned, and write the figures to a file.

    Answers are greedy, of at most 10 new tokens, if options do not say otherwise.
    """
    from catp_jax.families import family_of
    from catp_jax.readers.generation_config import sets_defaults
    from catp_jax.readers.hub import name_of
    from catp_jax.sharding.distributed import gathered, is_first
    from catp_jax.sharding.mesh import find_devices, parse_mesh
    from catp_jax.study.half_pixels import HALVED
    from catp_jax.study.journal import Journal
    from catp_jax.study.records import Conditions, Setting
    from catp_jax.study.sweep import known_parts
    from catp_jax.study.tasks import check_prompt, first_of_each_image, spread
    from convert import load_config

    settings = settings_of(prune, keep)
    files = {"questions": questions, "annotations": annotations, "images": images, "data": data}
    make_task = _task(task, files, fraction, seed)
    with opts.wrong_call():
        parse_mesh({} if loading.mesh is None else loading.mesh)
        _check_gpu(gpu, loading.mesh)
    find_devices()
    config = load_config(model, loading.ignore_config or ())
    if not prune:  # a study of everything
        image_scale, tiles = baselines(image_scale, tiles, config)
    family, smaller = family_of(config, model), smaller_images(image_scale, tiles, config)
    defaults, note = family.defaults(model, generation_config)
    contrasted = contrast.checked()
    given = {"max_new_tokens": Conditions().options.max_new_tokens} | generation.given()
    with opts.wrong_call():
        options = defaults.over(**given, num_return_sequences=1)
        if prompt is not None:
            check_prompt(prompt)
    name = name_of(model)
    out = out or Path("runs") / f"{name}-{task.replace(':', '-')}.jsonl"
    journal = Journal(out, report=say, is_written=is_first())
    if len({*gathered(journal.digest)}) > 1:
        raise ValueError(
            f"{out} is not the same on every host, and the study would resume from it; put it "
            "on a file system that all share, or give a new --out"
        )

    chosen = make_task()
    for problem in chosen.problems:
        say(problem)
    examples = spread(chosen.examples, limit)
    check_bounds(settings, chosen.name, examples)
    conditions = Conditions(
        task=chosen.name,
        source=chosen.source,
        left_out=chosen.left_out,
        prompt=prompt or chosen.prompt,
        is_chat=chat,
        begun=begun,
        is_late=late,
        batch=batch_size,
        options=options,
        seed=seed,
        loading={
            name: value
            for name, value in loading.settings(name_of).items()
            if name not in ("dtype", "weights")  # the model's own description says them
        }
        | contrasted,
    )
    journal.check(**known_parts(conditions, examples))

    from catp_jax import api

    journal.claim()  # now, and not once a model is loaded
    try:
        is_read = family.reader.has_generation_config
        if not generation_config and sets_defaults(model, is_read):
            say(
                "a study generates by its own options: generation_config.json is left aside "
                "(--generation-config takes it)"
            )
        if note:
            say(note)
        keywords = loading.keywords() | contrasted
        loaded = api.load(model, **keywords, generation_config=False)
        settings = settings or all_that_fit(loaded, keep, examples)
        check_fit(settings, loaded)
        coarse = [Setting(HALVED, None)] if half_pixels else []
        settings = [*coarse, *settings, *smaller]
        with interruptible():
            sweep(
                loaded,
                chosen,
                examples,
                settings,
                conditions,
                journal,
                name,
                pictured=first_of_each_image(examples)[:PICTURED],
                is_timed=timed,
                gpu=gpu,
            )
    finally:
        journal.release()
    print(
        one_line(f"catp-jax: written: {out}; for tables and figures: catp-jax study report {out}")
    )


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="The files that `catp-jax study` has written, one a model.",
            parser=opts.path,
            metavar="FILE",
        ),
    ],
    out: Annotated[Path, opts.file_option("The folder for the report.")] = Path("report"),
) -> None:
    """Draw a study: a page that opens offline (report.html), the same as Markdown, CSV, curves with
    intervals, pictures of what was kept. Several models go in one report if they were asked the
    same questions.
    """
    from catp_jax.study.report import write_report

    written, messages = write_report(files, out)
    for message in messages:
        say(message)
    print(one_line(f"written: {', '.join(map(str, written))}"))


def _task(
    name: str, files: dict[str, Path | None], fraction: float | None, seed: int
) -> "Callable[[], Task]":
    """What reads the task, which has the files that it takes and no others. Raises BadParameter."""
    from catp_jax.study.gqa import gqa_task
    from catp_jax.study.pope import pope_task
    from catp_jax.study.tasks import easy_vqa_task, jsonl_task
    from catp_jax.study.vqav2 import vqav2_task

    name, _, dials = name.partition(":")
    published: dict[str, Callable[..., Task]] = {
        "vqav2": vqav2_task,
        "pope": pope_task,
        "gqa": gqa_task,
    }
    takes = {
        "scenes": [],
        "easy-vqa": [],
        "vqav2": ["questions", "annotations", "images"],
        "pope": ["questions", "images"],
        "gqa": ["questions", "images"],
        "jsonl": ["data"],
    }
    if name not in takes or (dials and name != "scenes"):
        raise typer.BadParameter(
            f"--task is {', '.join(takes)}; of these scenes alone takes dials "
            f"(scenes:objects=12); got {name}"
        )
    missing = [f"--{key}" for key in takes[name] if files[key] is None]
    if missing:
        raise typer.BadParameter(f"--task {name} requires {', '.join(missing)} too")
    extra = [f"--{key}" for key, value in files.items() if value and key not in takes[name]]
    if fraction is not None and name not in published:
        extra.append("--fraction")
    if extra:
        raise typer.BadParameter(f"--task {name} does not take {', '.join(extra)}")
    paths = [path for key in takes[name] if (path := files[key]) is not None]
    if name == "scenes":
        from catp_jax.training.scene_questions import scenes_task
        from catp_jax.training.scenes import Dials

        with opts.wrong_call():
            return partial(scenes_task, Dials.parse(dials))
    if name == "easy-vqa":
        return easy_vqa_task
    if name == "jsonl":
        return partial(jsonl_task, *paths)
    share = 1.0 if fraction is None else fraction
    return partial(published[name], *paths, fraction=share, seed=seed)


def _check_gpu(gpu: str | None, mesh: Any) -> None:
    """Raises ValueError for one that nothing can be compiled for here."""
    from catp_jax.targets import devices_of, find_gpu

    if gpu is not None:
        target = find_gpu(gpu)
        if mesh is not None:
            raise ValueError(f"the cost on {gpu} is that of one device; leave out --gpu or --mesh")
        devices_of(target)
