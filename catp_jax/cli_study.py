"""The command line's studies: `catp-jax study MODEL --task …` and `catp-jax study report FILE`.

The first is short for `catp-jax study run MODEL …`. What needs no model is checked
before one is loaded.
"""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from catp_jax import cli_options as words
from catp_jax.terminal import say

if TYPE_CHECKING:  # at run time inside the functions, so that --help is quick
    from catp_jax.study.records import Setting
    from catp_jax.study.tasks import Task

RUN = "run"
LEVELS = "50%,25%,12.5%"
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
    help="Compare pruning methods on a task: `study MODEL …` runs (`study run --help` lists its "
    "options), `study report FILE` draws.",
)

Seed = Annotated[
    int,
    typer.Option(help="Draws the fraction, what random methods keep, and the bootstrap."),
]


@app.command(RUN)
def run(
    model: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, or one made by `catp-jax convert`.")
    ],
    task: Annotated[
        Literal["easy-vqa", "vqav2", "jsonl"], typer.Option(help="Where the questions come from.")
    ] = "easy-vqa",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Pruning methods, separated by commas, options after colons "
            "(catp,catp:layers=first,random). Without it: all that fit the model."
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            help="Visual tokens to keep, separated by commas: counts, or percentages of each "
            "prompt's own.",
            metavar="N|P%,…",
        ),
    ] = LEVELS,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write; an interrupted study goes on in it, and more methods and "
            "budgets can be added. Without it: runs/MODEL-TASK.jsonl."
        ),
    ] = None,
    questions: Annotated[Path | None, typer.Option(help="vqav2: the question file.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="vqav2: the annotation file.")] = None,
    images: Annotated[Path | None, typer.Option(help="vqav2: the folder of images.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="vqav2: the share of the questions, drawn at random.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="jsonl: the file of questions.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only so many questions, at even distances.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help='What is asked, with "{question}" in it. Without it: the question alone, and '
            '"Question: {question} Short answer:" for vqav2.'
        ),
    ] = None,
    seed: Seed = 42,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time.")] = 32,
    max_new_tokens: Annotated[int, words.MAX_NEW_TOKENS] = 10,
    beams: Annotated[int, words.BEAMS] = 1,
    length_penalty: Annotated[float, words.LENGTH_PENALTY] = 1.0,
    min_new_tokens: Annotated[int, words.MIN_NEW_TOKENS] = 0,
    early_stopping: Annotated[
        Literal["heuristic", "first", "never"], words.EARLY_STOPPING
    ] = "heuristic",
    dtype: Annotated[
        str | None,
        typer.Option(help="Cast the weights: float32, bfloat16 or float16.", metavar="TYPE"),
    ] = None,
    timed: Annotated[
        bool, typer.Option("--timed", help="Measure times, too, which takes programs of its own.")
    ] = False,
    mesh: Annotated[
        str | None,
        typer.Option(help="Spread the model over all devices: data=2,tensor=4.", metavar="SIZES"),
    ] = None,
) -> None:
    """Answer a task's questions unpruned and pruned; the figures go to a file."""
    from catp_jax.generation.options import Options
    from catp_jax.sharding.distributed import gathered, is_first
    from catp_jax.sharding.mesh import find_devices
    from catp_jax.study.journal import Journal
    from catp_jax.study.records import Conditions
    from catp_jax.study.sweep import known_parts
    from catp_jax.study.tasks import check_prompt, spread

    budgets = _budgets(keep)
    specs = _methods(methods)
    _check_numbers(batch_size, seed)
    find_devices()
    options = Options(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        length_penalty=length_penalty,
        min_new_tokens=min_new_tokens,
        early_stopping=early_stopping,
    )
    if prompt is not None:
        check_prompt(prompt)
    if not model.is_dir():
        raise ValueError(f"model {str(model)!r} is not a folder")
    name = model.resolve().name
    out = out or Path("runs") / f"{name}-{task}.jsonl"
    journal = Journal(out, report=say, is_written=is_first())
    if len({*gathered(journal.digest)}) > 1:
        raise ValueError(
            f"{out} is not the same on every host, and the study would go on where it was; put it "
            "on a file system that all share, or give a new --out"
        )

    given = {"questions": questions, "annotations": annotations, "images": images, "data": data}
    found = _task(task, given, fraction, seed)
    for problem in found.problems:
        say(problem)
    examples = spread(found.examples, limit)
    conditions = Conditions(
        task=found.name,
        source=found.source,
        prompt=prompt or found.prompt,
        left_out=found.left_out,
        batch=batch_size,
        options=options,
        seed=seed,
    )
    journal.check(**known_parts(conditions, examples))

    from catp_jax import api
    from catp_jax.pruning import make, methods_for
    from catp_jax.readers.generation_config import sets_defaults
    from catp_jax.study.records import Setting

    journal.claim()  # now, and not once a model is loaded
    try:
        loaded = api.load(model, dtype, mesh=mesh, generation_config=False)
        if sets_defaults(model, loaded.reader.has_generation_config):
            say("a study asks by its own options: generation_config.json is left aside")
        specs = specs or methods_for(loaded.sites)
        for spec in specs:
            make(spec, 1, loaded.sites)
        settings = [Setting(spec, budget) for spec in specs for budget in budgets]
        with interruptible():
            _sweep(loaded, found, examples, settings, conditions, journal, name, timed)
    finally:
        journal.release()
    print(f"catp-jax: written: {out}; for tables and figures: catp-jax study report {out}")


@app.command()
def report(
    files: Annotated[
        list[Path], typer.Argument(help="What `catp-jax study` wrote, of each model.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("report"),
) -> None:
    """Draw a study: Markdown table, CSV, curves with intervals, pictures of what was kept."""
    from catp_jax.study.report import write_report

    written, said = write_report(files, out)
    for line in said:
        say(line)
    print(f"written: {', '.join(map(str, written))}")


def _sweep(
    loaded: Any,
    task: "Task",
    examples: Any,
    settings: "list[Setting]",
    conditions: Any,
    journal: Any,
    name: str,
    is_timed: bool,
) -> None:
    """Runs the sweep under a progress bar and prints its table."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from catp_jax.study.sweep import sweep
    from catp_jax.study.tables import table

    seen: dict[int, int] = {}
    for number, example in enumerate(examples):
        seen.setdefault(example.image_id, number)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[questions]}/{task.fields[of]} questions"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    line = bar.add_task("", questions=0, of=len(examples))

    def progress(done: int, total: int) -> None:
        questions = done * len(examples) // total
        bar.update(line, completed=done, total=total, questions=questions)

    try:
        with bar:
            results = list(
                sweep(
                    loaded,
                    examples,
                    settings,
                    conditions,
                    score=task.score,
                    journal=journal,
                    name=name,
                    is_timed=is_timed,
                    pictured=list(seen.values())[:PICTURED],
                    report=lambda doing: bar.update(line, description=doing),
                    progress=progress,
                )
            )
    except KeyboardInterrupt:
        say(f"{journal.path} holds what was answered; the same command goes on from there")
        raise
    terminal = Console()
    terminal.print(table(results, name, terminal.width))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, for work that tidies up after itself (see `__main__`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        from catp_jax.sharding.distributed import leave

        say("interrupted")
        leave(130)
    finally:
        signal.signal(signal.SIGINT, before)


def _task(name: str, given: dict[str, Path | None], fraction: float | None, seed: int) -> "Task":
    """The task, with the files that it wants and no others."""
    from catp_jax.study.tasks import easy_vqa_task, jsonl_task
    from catp_jax.study.vqav2 import vqav2_task

    wanted = {"easy-vqa": [], "vqav2": ["questions", "annotations", "images"], "jsonl": ["data"]}
    missing = [f"--{key}" for key in wanted[name] if given[key] is None]
    if missing:
        raise typer.BadParameter(f"--task {name} wants {', '.join(missing)} too")
    extra = [f"--{key}" for key, value in given.items() if value and key not in wanted[name]]
    if fraction is not None and name != "vqav2":
        extra.append("--fraction")
    if extra:
        raise typer.BadParameter(f"--task {name} does not take {', '.join(extra)}")
    files = [path for key in wanted[name] if (path := given[key]) is not None]
    if name == "easy-vqa":
        return easy_vqa_task()
    if name == "jsonl":
        return jsonl_task(*files)
    return vqav2_task(*files, fraction=1.0 if fraction is None else fraction, seed=seed)


def _methods(text: str | None) -> list[str]:
    """The methods by name, checked as far as that goes without a model; none: all that fit."""
    from catp_jax.contract import Site
    from catp_jax.pruning import make

    if text is None:
        return []
    specs = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not specs:
        raise typer.BadParameter("--methods names none; give some, or leave it out for all")
    for spec in specs:
        make(spec, 1, frozenset(Site))
    return specs


def _budgets(text: str) -> list[int | str]:
    """Counts and percentages."""
    from catp_jax.pruning import budget

    found: list[int | str] = []
    for part in text.split(","):
        parsed = budget.parse(part)
        found.append(f"{parsed.percent:g}%" if parsed.number is None else parsed.number)
    return list(dict.fromkeys(found))


def _check_numbers(batch_size: int, seed: int) -> None:
    """Raises BadParameter for a number out of range."""
    for option, value, bound in (("--batch-size", batch_size, 1), ("--seed", seed, 0)):
        if value < bound:
            raise typer.BadParameter(f"{option} is at least {bound}, got {value}")
    if seed >= SEEDS:
        raise typer.BadParameter(f"--seed is below {SEEDS}, got {seed}")
