"""The command line: `catp-jax generate`, `match`, `study`, `convert`, `plan`, `doctor`,
`demo`.

Bad input ends with one message on stderr and exit code 1 (2 for a call that is itself wrong). What
takes long to import is imported where it is needed, so that --help and refusals are quick.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from catp_jax import cli_cluster, cli_study
from catp_jax import cli_options as words
from catp_jax.terminal import printable, say

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="BLIP-2 and Llama 3.2 Vision in JAX, with visual tokens pruned at fixed shapes.",
)

ModelFolder = Annotated[
    Path,
    typer.Argument(
        help="A Hugging Face folder, one made by `catp-jax convert`, or the name of a model that "
        "Hugging Face's tools have downloaded (org/name)."
    ),
]
ProcessorFolder = Annotated[
    Path | None,
    typer.Option(help="Take tokenizer and image processor from elsewhere.", metavar="DIR|NAME"),
]
Dtype = Annotated[
    str | None, typer.Option(help="Cast the weights: float32, bfloat16 or float16.", metavar="TYPE")
]


Adapter = Annotated[
    Path | None,
    typer.Option(help="Merge the LoRA adapter in this folder; one beside the weights always is."),
]

METHODS = "catp, l2, self_attention, position, trimmed_llama, fastv, k_norm, random"
SEVERAL = ("generate", "study", "doctor")  # commands that may run on several hosts


def _version(asked: bool) -> None:
    if asked:
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
            "runs the same command; the first one prints.",
        ),
    ] = False,
    coordinator: Annotated[
        str | None,
        typer.Option(help="Several hosts, told by hand: process 0's.", metavar="HOST:PORT"),
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="How many processes there are.")] = None,
    process_id: Annotated[
        int | None, typer.Option(help="Which of them this one is, from 0.")
    ] = None,
    heartbeat: Annotated[
        int, typer.Option(help="Seconds after which a silent process counts as dead.")
    ] = 100,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    told = (coordinator, num_processes, process_id)
    if distributed or any(word is not None for word in told):
        if context.invoked_subcommand not in SEVERAL:
            raise typer.BadParameter(
                f"several processes are for {', '.join(SEVERAL)}; run this in one"
            )
        from catp_jax.sharding.distributed import is_first
        from catp_jax.sharding.distributed import start as start_processes

        start_processes(*told, heartbeat=heartbeat)
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 it lives as long as the process


@app.command()
def generate(
    context: typer.Context,
    model: ModelFolder,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="The question. With several, image i belongs to prompt i."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image; repeat it for several in one prompt.")
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            help='A file with one JSON object a line: {"prompt": "…", "images": ["…"], "id": "…"}, '
            "or messages in place of the prompt. A line that cannot be used is reported, the "
            "others are answered.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file for a batch's answers, as JSON lines; what it has is not asked again."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Lines of a --batch file that are answered at a time.")
    ] = 8,
    prune: Annotated[
        list[str] | None,
        typer.Option(
            help=f"A pruning method, of {METHODS}; options follow after colons "
            "(trimmed_llama:k_ratio=0.25). Repeat it to apply several in order.",
            metavar="METHOD",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Visual tokens to keep: a count, a percentage of each prompt's own, or auto for "
            "a method that finds its own number. One for each --prune.",
            metavar="N|P%|auto",
        ),
    ] = None,
    max_new_tokens: Annotated[int | None, words.MAX_NEW_TOKENS] = None,
    min_new_tokens: Annotated[int | None, words.MIN_NEW_TOKENS] = None,
    beams: Annotated[int | None, words.BEAMS] = None,
    length_penalty: Annotated[float | None, words.LENGTH_PENALTY] = None,
    early_stopping: Annotated[
        Literal["heuristic", "first", "never"] | None, words.EARLY_STOPPING
    ] = None,
    temperature: Annotated[float | None, words.TEMPERATURE] = None,
    top_k: Annotated[int | None, words.TOP_K] = None,
    top_p: Annotated[float | None, words.TOP_P] = None,
    seed: Annotated[int | None, words.SEED] = None,
    repetition_penalty: Annotated[float | None, words.REPETITION_PENALTY] = None,
    no_repeat_ngram_size: Annotated[int | None, words.NO_REPEAT_NGRAM_SIZE] = None,
    bad_word: Annotated[list[str] | None, words.BAD_WORD] = None,
    suppress_token: Annotated[list[int] | None, words.SUPPRESS_TOKEN] = None,
    begin_suppress_token: Annotated[list[int] | None, words.BEGIN_SUPPRESS_TOKEN] = None,
    stop: Annotated[list[str] | None, words.STOP] = None,
    logprobs: Annotated[int | None, words.LOGPROBS] = None,
    generation_config: Annotated[bool, words.GENERATION_CONFIG] = True,
    begun: Annotated[
        str, typer.Option(help="What the answer begins with; the model goes on from there.")
    ] = "",
    stream: Annotated[
        bool, typer.Option("--stream", help="Show the answer to one prompt as it comes.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the checkpoint's chat template.")
    ] = False,
    mask_mode: Annotated[
        Literal["meta", "hf"] | None,
        typer.Option(
            help="Llama Vision: text that sees no image does nothing (meta), or as in transformers."
        ),
    ] = None,
    vision_mode: Annotated[
        Literal["meta", "hf"] | None,
        typer.Option(help="Llama Vision: tower states as in Meta's code, or in transformers (hf)."),
    ] = None,
    dtype: Dtype = None,
    processor: ProcessorFolder = None,
    weights: Annotated[
        Literal["int8", "float8"] | None,
        typer.Option(help="Narrow the language model's layers to 8 bits as they load."),
    ] = None,
    mesh: cli_cluster.MeshOption = None,
    ignore_config: cli_cluster.IgnoreConfig = None,
    adapter: Adapter = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON object per prompt, with what was kept.")
    ] = False,
) -> None:
    """Answer questions about images.

    Options that are not given are the checkpoint's own, else greedy, with 32 new tokens at most.
    """
    if logprobs is not None and not (json_output or out):
        raise typer.BadParameter("--logprobs want --json, or --out")
    if stream and (batch or json_output or len(prompt or []) != 1):
        raise typer.BadParameter("--stream is for one --prompt, without --json")
    if len(prune or []) != len(keep or []):
        raise typer.BadParameter(
            f"each --prune wants its --keep: got {len(prune or [])} methods and "
            f"{len(keep or [])} budgets"
        )
    if batch and (prompt or image or begun):
        raise typer.BadParameter("--batch brings its own prompts and images; leave out the others")
    if not (batch or prompt):
        raise typer.BadParameter("give a --prompt, or a --batch file")
    if out and not batch:
        raise typer.BadParameter("--out is for the answers to a --batch file")
    if batch_size < 1:
        raise typer.BadParameter(f"--batch-size is at least 1, got {batch_size}")
    from catp_jax.readers.images import read_image

    for path in image or []:
        read_image(path)  # before a model is loaded, which may take minutes
    from catp_jax.readers.hub import find_folder

    folder = find_folder(model)
    from catp_jax import batch as batches
    from catp_jax.families import family_of
    from catp_jax.generation.options import Options
    from catp_jax.pruning.named import named
    from catp_jax.sharding.distributed import gathered
    from catp_jax.sharding.mesh import find_devices, parse_mesh
    from convert import load_config

    methods = named(prune, keep)
    file, problems = None, []
    if batch:
        requests, problems = batches.read_requests(batch)
    else:
        requests = [
            dataclasses.replace(request, begun=begun)
            for request in _requests(prompt or [], image or [])
        ]
        batch_size = len(requests)
    if out:
        file = batches.AnswerFile(out, report=say)
        requests, others = file.missing(requests)
        problems += others
    parse_mesh({} if mesh is None else mesh)
    find_devices()
    family = family_of(load_config(folder, ignore_config or ()), folder)
    defaults = family.defaults(folder)[0] if generation_config else Options()
    options = defaults.over(**words.given(context.params), num_return_sequences=1)
    asked = repr([(one.prompt, one.images, one.line) for one in requests])
    if len({*gathered(hashlib.sha256(asked.encode()).hexdigest())}) > 1:
        raise ValueError("the hosts were asked different things; give all the same prompts or file")
    if file:
        file.begin(
            {
                "model": batches.fingerprint(folder),
                "load": (dtype, weights, mask_mode, vision_mode, ignore_config),
                "folders": [
                    batches.fingerprint(find_folder(one)) for one in (adapter, processor) if one
                ],
                "prune": methods,
                "chat": chat,
                **dataclasses.asdict(options),
            }
        )
        if not requests and not problems:
            say(f"{out} has all answers already")
            return
    from catp_jax import api

    loaded = api.load(
        folder,
        dtype,
        mesh=mesh,
        weights=weights,
        vision_mode=vision_mode,
        mask_mode=mask_mode,
        ignore_config=ignore_config or (),
        adapter=adapter,
        generation_config=generation_config,
        processor=processor,
    )
    if loaded.note:
        say(loaded.note)
    if stream:
        own, text = requests[0], (batches.as_chat(requests[0]) if chat else requests[0].prompt)
        for piece in loaded.stream(
            own.images, text, prune=prune, keep=keep, begun=begun, **dataclasses.asdict(options)
        ):
            print(printable(piece), end="", flush=True)
        print()
        return
    answers = batches.answer(
        loaded,
        requests,
        batch_size=batch_size,
        prune=prune,
        keep=keep,
        options=options,
        is_chat=chat,
    )
    failed = False
    for found in itertools.chain(problems, answers):
        if isinstance(found, batches.Problem):
            failed = True
            say(f"line {found.line} of {batch}: {found.message}")
        elif file:
            file.add(found)
        else:
            text = json.dumps(found.as_row()) if json_output else printable(found.text)
            print(text, flush=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="The folder to convert, or a downloaded model's name.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not exist.")],
    to_hf: Annotated[
        bool, typer.Option("--to-hf", help="From a converted folder back to Hugging Face's form.")
    ] = False,
    dtype: Dtype = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all back from the disk and compare checksums.")
    ] = False,
    ignore_config: cli_cluster.IgnoreConfig = None,
    adapter: Adapter = None,
) -> None:
    """Convert a Hugging Face folder to Orbax, or back, and report every tensor."""
    from catp_jax.readers.hub import find_folder
    from convert.__main__ import run

    with cli_study.interruptible():
        run(find_folder(source), out, to_hf, dtype, verify, ignore_config or (), adapter)


app.command()(cli_cluster.plan)
app.command()(cli_cluster.doctor)


@app.command()
def match(
    model: ModelFolder,
    image: Annotated[list[Path], typer.Option(help="An image; repeat it for several.")],
    text: Annotated[list[str], typer.Option(help="A text; repeat it for several.")],
    dtype: Dtype = None,
    processor: ProcessorFolder = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON object per image and text.")
    ] = False,
) -> None:
    """Score how well texts fit images, with a BLIP-2 for image-text retrieval.

    ITC is a cosine, cheap, for search among many; ITM the probability that the two fit, better.
    """
    from catp_jax.readers.images import read_image

    pictures = [read_image(path) for path in image]
    from catp_jax import matching

    matcher = matching.load_matcher(model, dtype, processor=processor)
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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("demo"),
    model: Annotated[
        list[Path] | None,
        typer.Option(help="A model's folder; repeat it for several. Default: the shipped minis."),
    ] = None,
    questions: Annotated[int, typer.Option(help="How many test questions to answer.")] = 256,
) -> None:
    """Answer easy-VQA questions unpruned and pruned: tables, curves and pictures."""
    from catp_jax import demo as module

    module.run(model or [], out, questions, Console())


app.add_typer(cli_study.app, name="study")


def _requests(prompts: list[str], images: list[Path]) -> list[Any]:
    """What --prompt and --image ask: one prompt with all images, or each prompt with its own."""
    from catp_jax.batch import Request

    if len(prompts) == 1:
        return [Request(prompts[0], tuple(images))]
    if len(images) not in (0, len(prompts)):
        raise typer.BadParameter(
            f"{len(prompts)} prompts want one image each, or none; got {len(images)} images. "
            f"Use --batch for anything else"
        )
    own = [(image,) for image in images] or [() for _ in prompts]
    return [
        Request(prompt, some, number)
        for number, (prompt, some) in enumerate(zip(prompts, own, strict=True))
    ]


def leave(code: int) -> NoReturn:
    """Ends the command; what never got as far as JAX has nobody to wait for."""
    if "jax" in sys.modules:
        from catp_jax.sharding import distributed

        distributed.leave(code)
    sys.exit(code)


def main() -> None:
    """Entry point: errors of the input become messages, not tracebacks."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch
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

        said = "the device's memory is full; lower --batch-size or use --dtype bfloat16"
        if not isinstance(error, JaxRuntimeError):
            raise
        if "RESOURCE_EXHAUSTED" not in str(error) and (said := lost(error)) is None:
            raise
        say(said)
        leave(1)
