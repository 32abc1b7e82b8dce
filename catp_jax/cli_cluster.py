"""The commands that look before a job is sent: `catp-jax plan`, `catp-jax doctor`."""

import dataclasses
import json
import math
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from catp_jax import cli_options as opts
from catp_jax.terminal import printable

GPUS = "h100, h200, a100, b200"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help=f"A model's folder, of which only config.json is read, {opts.PRESET}",
            metavar="MODEL",
        ),
    ],
    mesh: Annotated[
        str,
        typer.Option(
            help="The sizes of data, fsdp and tensor (data=2,tensor=4); the devices need not "
            "exist.",
            metavar="SIZES",
        ),
    ] = "tensor=1",
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="How many prompts at a time, with an image each; data × fsdp of them, if not "
            "given.",
            min=1,
        ),
    ] = None,
    tiles: Annotated[
        int | None,
        typer.Option(help="Llama Vision: how many tiles an image has; all, if not given.", min=1),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(help="How many text tokens a prompt has.", min=1)
    ] = 128,
    max_new_tokens: Annotated[
        int, typer.Option(help="The longest answer, in tokens.", min=1)
    ] = 128,
    prune: opts.Prune = None,
    keep: Annotated[list[str] | None, typer.Option(help=opts.KEEP, metavar="N|P%,…")] = None,
    dtype: Annotated[
        opts.DtypeName, opts.model_option("The number type of the weights.")
    ] = "bfloat16",
    ignore_config: opts.IgnoreConfig = None,
    target: Annotated[
        str | None,
        typer.Option(
            help=f"Compile for a GPU that need not exist, of {GPUS}: bytes moved, the "
            "least time of a prefill and a token, temporaries. This requires JAX's CUDA compiler.",
            metavar="GPU",
        ),
    ] = None,
    hosts: Annotated[
        int | None,
        typer.Option(
            help="How many hosts the target's GPUs are on; 8 share one, if not given.", min=1
        ),
    ] = None,
    largest_batch: Annotated[
        bool,
        typer.Option(
            "--largest-batch",
            help="Find the largest batch that fits by compiling for several; takes minutes.",
        ),
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            help="The memory of a device, in GB of 10⁹ bytes; the target's, or 80, if not given."
        ),
    ] = None,
    json_output: opts.Json = False,
) -> None:
    """Say what each device of a mesh would hold, compute and send, without loading any weights."""
    chosen = opts.methods(prune, keep)
    if memory is not None and not 0 < memory < math.inf:
        raise typer.BadParameter(f"--memory must be a size above 0, got {memory:g}")
    if target is None and (largest_batch or hosts is not None):
        raise typer.BadParameter("--largest-batch and --hosts require --target")
    from catp_jax import plan as planning
    from catp_jax.families import find_config
    from catp_jax.sharding.mesh import parse_mesh
    from catp_jax.targets import devices_of, find_gpu

    find_config(model, ignore_config or ())
    with opts.wrong_call():
        places = math.prod(parse_mesh(mesh).values())
        gpu = None if target is None else find_gpu(target)
    planning.force_devices(places if gpu is None else 1)
    if gpu is not None:
        devices_of(gpu)  # says so if there is no compiler

    def report(batch: int, total: int) -> None:
        print(f"a batch of {batch}: {total / 1e9:.3g} GB a device", file=sys.stderr, flush=True)

    with opts.wrong_call():
        made = planning.make_plan(
            model,
            mesh,
            batch=batch_size,
            tiles=tiles,
            prompt=prompt_tokens,
            new_tokens=max_new_tokens,
            dtype=dtype,
            methods=chosen,
            target=target,
            hosts=hosts,
            memory=None if memory is None else int(memory * 1e9),
            find_largest_batch=largest_batch,
            report=report,
            ignore_config=ignore_config or (),
        )
    if json_output:
        print(json.dumps(made.as_json()))
    else:
        Console(highlight=False).print(planning.table(made))


def doctor(
    model: Annotated[
        str | None, typer.Argument(help=f"A model's folder, {opts.PRESET}", metavar="MODEL")
    ] = None,
    dtype: opts.Dtype = None,
    mesh: opts.Mesh = None,
    ignore_config: opts.IgnoreConfig = None,
    json_output: opts.Json = False,
) -> None:
    """Examine versions, devices, hosts, mesh, kernels, memory and weights.

    The exit code is 1 if something fails.
    """
    from catp_jax.doctor import examine
    from catp_jax.sharding.distributed import gathered

    console, levels = Console(highlight=False, soft_wrap=True), set()
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}

    def show(one: dict[str, str]) -> None:
        levels.add(one["level"])
        if json_output:
            print(json.dumps(one), flush=True)
        else:
            level = f"[{colours[one['level']]}]{one['level']:4}[/]"
            console.print(f"{level}  {one['subject']:9}  {escape(printable(one['text']))}")

    findings = []
    for one in examine(model, mesh, ignore_config or (), dtype):
        findings.append(dataclasses.asdict(one))
        show(findings[-1])
    for process, others in enumerate(gathered(json.dumps(findings))[1:], start=1):
        for one in json.loads(others):  # the first process speaks for all
            if one["level"] != "ok":
                show(one | {"text": f"process {process}: {one['text']}"})
    if "fail" in levels:
        raise typer.Exit(1)
