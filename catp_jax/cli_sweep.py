"""A study as the command line runs it: how far it is, what it found, and Ctrl-C."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from catp_jax.terminal import one_line, say

if TYPE_CHECKING:  # at run time inside the functions, so that --help is quick
    from catp_jax.model import Model
    from catp_jax.study.journal import Journal
    from catp_jax.study.records import Conditions, Setting
    from catp_jax.study.tasks import Example, Task


def sweep(
    loaded: "Model",
    task: "Task",
    examples: "Sequence[Example]",
    settings: "Sequence[Setting]",
    conditions: "Conditions",
    journal: "Journal",
    name: str,
    *,
    pictured: Sequence[int],
    is_timed: bool = False,
    gpu: str | None = None,
) -> None:
    """Runs a sweep and prints its table; how far it is, as a bar or, where that is a file or a
    pipe, as a line for each tenth. Words that the model cannot know are said at the start.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from catp_jax.sharding.distributed import is_first
    from catp_jax.study import sweep as module
    from catp_jax.study.tables import table

    _say_unknown_words(loaded, task.name, examples)
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[questions]}/{task.fields[of]} questions"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    line = bar.add_task("", questions=0, of=len(examples))
    tenths = 0

    def progress(done: int, total: int) -> None:
        nonlocal tenths
        questions = done * len(examples) // total
        bar.update(line, completed=done, total=total, questions=questions)
        if 10 * done // total > tenths and is_first() and not console.is_terminal:
            tenths = 10 * done // total
            say(f"{one_line(name)}: {10 * tenths} % answered")

    try:
        with bar:
            results = list(
                module.sweep(
                    loaded,
                    examples,
                    settings,
                    conditions,
                    score=task.score,
                    measures=task.measures,
                    journal=journal,
                    name=name,
                    is_timed=is_timed,
                    gpu=gpu,
                    pictured=pictured,
                    report=lambda doing: bar.update(line, description=doing),
                    progress=progress,
                )
            )
    except KeyboardInterrupt:
        if journal.path is not None:
            say(f"{journal.path} has what was answered; the same command resumes")
        raise
    terminal = Console()
    terminal.print(table(results, name, terminal.width))


def _say_unknown_words(model: "Model", task: str, examples: "Sequence[Example]") -> None:
    """Says which words of the task the model can neither read nor write."""
    from catp_jax.messages import listed
    from catp_jax.readers.token_text import unknown_words

    texts = [text for one in examples for text in (one.question, *one.accepted)]
    if found := unknown_words(model.reader.tokenizer, texts):
        say(
            f"the model's tokenizer has no tokens for {len(found)} of the words of {task}, which "
            f"it can neither read nor write: {one_line(listed(found, 5))}"
        )


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
