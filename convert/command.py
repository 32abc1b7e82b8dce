"""`catp-jax convert SOURCE OUT`: a Hugging Face folder to Orbax, or back with --to-hf."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from catp_jax.terminal import one_line
from convert import converted
from convert.folders import remove_leftovers
from convert.report import Report, table


def run(
    source: Path,
    out: Path,
    to_hf: bool = False,
    dtype: str | None = None,
    verify: bool = False,
    ignore_config: Sequence[str] = (),
    adapter: Path | None = None,
) -> Report:
    """Converts a folder and prints what became of every tensor. Raises ValueError."""
    if to_hf and (dtype is not None or verify or ignore_config or adapter):
        raise ValueError(
            "--dtype, --verify, --ignore-config and --adapter go with the way there; --to-hf "
            "writes what is stored, and checks it"
        )
    console = Console(stderr=True)
    for left in remove_leftovers(out):
        print(one_line(f"removed {left.name}, which an interrupted run left"), file=sys.stderr)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    bar = Progress(*columns, console=console, transient=True, disable=hidden)
    with _terminable(), bar:
        task = bar.add_task("")

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if to_hf:
            report = converted.to_hf(source, out, progress)
        else:
            report = converted.to_orbax(
                source, out, dtype, progress, verify, ignore_config, adapter
            )
    console = Console()
    if not console.is_terminal:
        console.width = 240  # in a file, a tensor is a line
    console.print(table(report))
    print(one_line(f"wrote {out}"))
    return report


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the program as an exception does, so that nothing is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not ours
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
