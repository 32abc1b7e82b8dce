"""`catp-jax generate`: what was asked, checked before a model is loaded; then the answers."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from catp_jax import cli_options as opts
from catp_jax.terminal import printable, say

if TYPE_CHECKING:  # at run time inside the functions, so that --help is quick
    from catp_jax.batch import Request
    from catp_jax.generation.options import Options
    from catp_jax.model import Model

BATCH_SIZE = 8  # lines of a file


@opts.with_options
def generate(
    model: opts.ModelFolder,
    loading: opts.Loading,
    contrast: opts.Contrast,
    generation: opts.Generation,
    seeing: opts.Seeing,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="The question. With several, image i belongs to prompt i.", metavar="TEXT"
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        opts.file_option("An image. Repeat it for several in one prompt."),
    ] = None,
    batch: Annotated[
        Path | None,
        opts.file_option(
            'A file with one JSON object a line: {"prompt": "…", "images": ["…"], "id": "…"}, '
            "or messages in place of the prompt. A line that cannot be used is reported, and the "
            "others are answered.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        opts.file_option(
            "The file for the answers to a batch, as JSON lines. What it has already is not asked "
            "again."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help=f"How many lines of a --batch file are answered at a time; {BATCH_SIZE}, if not "
            "given.",
            min=1,
        ),
    ] = None,
    prune: opts.Prune = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{opts.KEEP} auto leaves the number to a method that finds its own.",
            metavar="N|P%|auto,…",
        ),
    ] = None,
    json_output: opts.Json = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show the answer to one prompt as it comes.")
    ] = False,
    seed: Annotated[
        int | None,
        opts.generation_option(help="Answer i is drawn with seed + i, counting from 0."),
    ] = None,
    num_return_sequences: Annotated[
        int | None,
        opts.generation_option(
            help="Give so many answers to each prompt, drawn or the best of a beam search."
        ),
    ] = None,
    logprobs: Annotated[
        int | None,
        opts.generation_option(
            help="With --json or --out: add the log-probability of each token, and of so many of "
            "the likeliest ones at its place."
        ),
    ] = None,
    chat: opts.Chat = False,
    begun: opts.Begun = "",
    no_generation_config: Annotated[
        bool,
        opts.generation_option(
            "--no-generation-config",
            help="Leave the checkpoint's generation_config.json aside.",
        ),
    ] = False,
) -> None:
    """Answer questions about images.

    Options that are not given are the checkpoint's own; where it has none, answers are greedy, of
    at most 32 new tokens.
    """
    if logprobs is not None and not (json_output or out):
        raise typer.BadParameter("--logprobs requires --json or --out")
    if stream and (batch or json_output or len(prompt or []) != 1):
        raise typer.BadParameter("--stream is for one --prompt, without --json")
    asked = {"--prompt": prompt, "--image": image, "--begun": begun}
    if batch and (others := [name for name, value in asked.items() if value]):
        raise typer.BadParameter(
            f"each line of the --batch file says that itself; leave out {', '.join(others)}"
        )
    if not (batch or prompt):
        raise typer.BadParameter("give a --prompt, or a --batch file")
    if not batch and (out or batch_size):
        raise typer.BadParameter(f"{'--out' if out else '--batch-size'} is for a --batch file")
    if out and json_output:
        raise typer.BadParameter("--out writes answers as JSON, and --json prints them; give one")
    chosen, contrasted = opts.methods(prune, keep), contrast.checked()
    from catp_jax.readers.images import read_image

    for picture in image or []:
        read_image(picture)  # before a model is loaded, which may take minutes
    from catp_jax import batch as batches
    from catp_jax.families import family_of
    from catp_jax.sharding.mesh import find_devices, parse_mesh
    from convert import load_config

    file, problems = None, []
    if batch:
        requests, problems = batches.read_requests(batch)
    else:
        requests = _requests(prompt or [], image or [], begun)
    if out:
        file = batches.AnswerFile(out, report=say)
        requests, mismatched = file.missing(requests)
        problems += mismatched
    with opts.wrong_call():
        parse_mesh({} if loading.mesh is None else loading.mesh)
    find_devices()
    more = {"seed": seed, "num_return_sequences": num_return_sequences, "logprobs": logprobs}
    given = {"num_return_sequences": 1} | opts.given(more) | generation.given()
    config = load_config(model, loading.ignore_config or ())
    family, seen = family_of(config, model), seeing.checked(config)
    defaults, note = family.defaults(model, not no_generation_config)
    with opts.wrong_call():
        options = defaults.over(**given)
    _check_hosts(requests)
    if file:
        file.begin(
            {
                "model": batches.fingerprint(model),
                "load": loading.settings(batches.fingerprint) | seen | contrasted,
                "prune": chosen,
                "chat": chat,
                **dataclasses.asdict(options),
            }
        )
        if not requests and not problems:
            say(f"{out} has all answers already")
            return
    from catp_jax import api

    keywords = loading.keywords() | seen | contrasted
    loaded = api.load(model, **keywords, generation_config=False)  # options have it
    if note:
        say(note)
    pruning = {"prune": [name for name, _ in chosen], "keep": [some for _, some in chosen]}
    if stream:
        _stream(loaded, requests[0], chat, pruning, options)
        return
    size = (batch_size or BATCH_SIZE) if batch else len(requests)
    answers = batches.answer(
        loaded, requests, batch_size=size, options=options, is_chat=chat, **pruning
    )
    failed = False
    for one in itertools.chain(problems, answers):
        if isinstance(one, batches.Problem):
            failed = True
            say(f"line {one.line} of {batch}: {one.message}")
        elif file:
            file.add(one)
        elif json_output:
            print(json.dumps(one.as_row()), flush=True)
        else:
            print(_as_text(one.texts), flush=True)
    if failed:
        raise typer.Exit(1)


def _requests(prompts: list[str], images: list[Path], begun: str) -> "list[Request]":
    """What --prompt and --image ask: one prompt with all images, or each prompt with its own."""
    from catp_jax.batch import Request

    if len(prompts) == 1:
        return [Request(prompts[0], tuple(images), begun=begun)]
    if len(images) not in (0, len(prompts)):
        raise typer.BadParameter(
            f"{len(prompts)} prompts take one image each, or none; got {len(images)} images. "
            f"Use --batch for anything else"
        )
    each = [(image,) for image in images] or [() for _ in prompts]
    return [
        Request(prompt, some, number, begun=begun)
        for number, (prompt, some) in enumerate(zip(prompts, each, strict=True))
    ]


def _check_hosts(requests: "Sequence[Request]") -> None:
    """Raises ValueError if several hosts were not asked the same."""
    from catp_jax.sharding.distributed import gathered

    asked = repr([(one.prompt, one.images, one.line) for one in requests])
    if len({*gathered(hashlib.sha256(asked.encode()).hexdigest())}) > 1:
        raise ValueError("the hosts were asked different things; give all the same prompts or file")


def _stream(
    model: "Model", request: "Request", is_chat: bool, pruning: dict[str, Any], options: "Options"
) -> None:
    from catp_jax.batch import as_chat

    prompt = as_chat(request) if is_chat else request.prompt
    for piece in model.stream(
        request.images, prompt, begun=request.begun, **pruning, **dataclasses.asdict(options)
    ):
        print(printable(piece), end="", flush=True)
    print()


def _as_text(texts: list[str]) -> str:
    """One answer as it is, several numbered."""
    if len(texts) == 1:
        return printable(texts[0])
    return "\n".join(f"{number}. {printable(text)}" for number, text in enumerate(texts, start=1))
