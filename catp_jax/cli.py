"""The command line: `catp-jax generate`, `match`, `study`, `calibrate`, `convert`, `plan`,
`doctor`, `demo`.

Bad input ends with one message on stderr and exit code 1 (2 for a call that is itself wrong). What
takes long to import is imported where it is needed, so that --help and refusals are quick.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import catp_jax
from catp_jax import cli_calibrate, cli_cluster, cli_demo, cli_generate, cli_study
from catp_jax import cli_options as opts
from catp_jax.cli_sweep import interruptible
from catp_jax.terminal import printable, say

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=catp_jax.__doc__,
)

SEVERAL = ("generate", "study", "doctor")  # commands that may run on several hosts


def _version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"catp-jax {version('catp-jax')}")
        raise typer.Exit


@app.callback()
def start(
    context: typer.Context,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed",
            help="Run on several hosts, which JAX finds (Slurm, Kubernetes, Open MPI). Every host "
            "runs the same command, and the first one prints.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="Run on several hosts that JAX does not find: the address of process 0.",
            metavar="HOST:PORT",
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(help="How many processes there are.", min=1)
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(help="Which of them this one is, counting from 0.", min=0)
    ] = None,
    heartbeat: Annotated[
        int, typer.Option(help="Seconds after which a silent process counts as dead.")
    ] = 100,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    processes = (coordinator, num_processes, process_id)
    if distributed or any(word is not None for word in processes):
        if context.invoked_subcommand not in SEVERAL:
            raise typer.BadParameter(
                f"several processes are for {', '.join(SEVERAL)}; run this in one"
            )
        from catp_jax.sharding.distributed import is_first
        from catp_jax.sharding.distributed import start as start_processes

        start_processes(*processes, heartbeat=heartbeat)
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 it lives as long as the process


app.command()(cli_generate.generate)


@app.command()
def convert(
    source: opts.ModelFolder,
    out: Annotated[
        Path,
        typer.Argument(
            help="The folder to make; it must not exist yet.", parser=opts.path, metavar="OUT"
        ),
    ],
    to_hf: Annotated[
        bool,
        typer.Option("--to-hf", help="Convert a converted folder back to Hugging Face's format."),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all back from the disk and compare checksums.")
    ] = False,
    dtype: opts.Dtype = None,
    adapter: opts.Adapter = None,
    ignore_config: opts.IgnoreConfig = None,
) -> None:
    """Convert a Hugging Face folder to Orbax, or back, and report on every tensor."""
    from convert.command import run

    with interruptible():
        run(source, out, to_hf, dtype, verify, ignore_config or (), adapter)


app.command()(cli_cluster.plan)
app.command()(cli_cluster.doctor)


@app.command()
def match(
    model: opts.ModelFolder,
    image: Annotated[list[Path], opts.file_option("An image. Repeat it for several.")],
    text: Annotated[list[str], typer.Option(help="A text. Repeat it for several.", metavar="TEXT")],
    json_output: opts.Json = False,
    dtype: opts.Dtype = None,
    adapter: opts.Adapter = None,
    processor: opts.Processor = None,
    ignore_config: opts.IgnoreConfig = None,
) -> None:
    """Score how well texts fit images, with a BLIP-2 for image-text retrieval.

    ITC is a cosine, for searching among many. ITM is the probability that an image and a text fit
    each other, which takes longer and ranks better.
    """
    from catp_jax.readers.images import read_image

    pictures = [read_image(path) for path in image]
    from catp_jax import matching

    matcher = matching.load_matcher(
        model, dtype, adapter=adapter, processor=processor, ignore_config=ignore_config or ()
    )
    itc = matcher.itc(pictures, text)
    pairs = [(i, t) for i in range(len(image)) for t in range(len(text))]
    itm = matcher.itm([pictures[i] for i, _ in pairs], [text[t] for _, t in pairs])
    for (i, t), probability in zip(pairs, itm.tolist(), strict=True):
        row = {
            "image": str(image[i]),
            "text": text[t],
            "itc": float(itc[i, t]),
            "itm": probability,
        }
        line = f"itm {probability:.3f}  itc {itc[i, t]:+.3f}  {image[i]}  {text[t]}"
        print(json.dumps(row) if json_output else printable(line))


app.command()(cli_demo.demo)
app.add_typer(cli_study.app, name="study")
app.command()(cli_calibrate.calibrate)


def leave(code: int) -> NoReturn:
    """Ends the command; what never got as far as JAX has nobody to wait for."""
    if "jax" in sys.modules:
        from catp_jax.sharding import distributed

        distributed.leave(code)
    sys.exit(code)


def main() -> None:
    """Entry point: errors of the input become messages, not tracebacks."""
    try:
        app()
    except ModuleNotFoundError:
        raise  # __main__ names it
    except MemoryError:
        say("the host's memory is full; use a machine with more")
        leave(1)
    except (ValueError, OSError, ImportError) as error:
        say(str(error))
        leave(1)
    except RuntimeError as error:
        from jax.errors import JaxRuntimeError

        from catp_jax.sharding.distributed import lost

        message = "the device's memory is full; lower --batch-size or use --dtype bfloat16"
        if not isinstance(error, JaxRuntimeError):
            raise
        if "RESOURCE_EXHAUSTED" not in str(error) and (message := lost(error)) is None:
            raise
        say(message)
        leave(1)
