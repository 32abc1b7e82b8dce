"""`python -m convert SOURCE OUT`: a Hugging Face folder to Orbax, or back with --to-hf."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from catp_jax.terminal import one_line, printable
from convert import table, to_orbax
from convert import to_hf as back_to_hf
from convert.folders import remove_leftovers
from convert.report import Report

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
            report = back_to_hf(source, out, progress)
        else:
            report = to_orbax(source, out, dtype, progress, verify, ignore_config, adapter)
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


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a Hugging Face folder; with --to-hf a converted")],
    out: Annotated[Path, typer.Argument(help="the folder to make; it must not exist yet")],
    to_hf: Annotated[bool, typer.Option("--to-hf", help="back to the Hugging Face format")] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as they are")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="read all back from the disk and compare checksums")
    ] = False,
    ignore_config: Annotated[
        list[str] | None,
        typer.Option(help="read config.json as if it had not this key; repeat it for several"),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="merge the LoRA adapter in this folder into the weights")
    ] = None,
) -> None:
    """Convert a Hugging Face folder to Orbax, or back, and report on every tensor."""
    try:
        run(source, out, to_hf, dtype, verify, ignore_config or (), adapter)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {printable(error)}", err=True)
        sys.exit(1)
    except MemoryError:
        typer.echo("error: the host's memory is full; use a machine with more", err=True)
        sys.exit(1)


def main() -> None:
    """The command line."""
    app()


if __name__ == "__main__":
    main()
