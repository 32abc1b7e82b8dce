"""What the options of the commands are called, take, and say in --help: each stands here once.

Options that go together are the fields of one class, and `with_options` gives a command all of
them. Their meaning, and the rules among them, are Python's: `api.load`, `generation.options`,
`pruning.named`.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:  # at run time inside the functions, so that --help is quick
    from catp_jax.pruning.named import Named

METHODS = (
    "catp, l2, self_attention, position, trimmed_llama, fastv, k_norm, csp, elastic_cache, think, "
    "zipvl, aircache, random, uniform, nearest_centroid, pool; eigen:DIR, attention_predictor:DIR "
    "and vistog_grouping:DIR, see calibrate"
)
MODEL_PANEL, GENERATION_PANEL = "Model", "Generation"


def path(text: str) -> Path:
    """A path, with `~` for the home directory wherever it stands (`--out=~/x`)."""
    return Path(os.path.expanduser(text))


def folder(text: str) -> Path:
    """A model's folder, by its path or its name, org/name, in the local Hugging Face cache."""
    from catp_jax.readers.hub import find_folder

    try:
        return find_folder(text)
    except ValueError as error:  # which the command line would frame as a wrong call
        raise FileNotFoundError(str(error)) from None


def file_option(help: str) -> Any:
    """An option that takes a path."""
    return typer.Option(help=help, parser=path, metavar="PATH")


def model_option(help: str, **options: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=MODEL_PANEL, **options)


def generation_option(*names: str, help: str, **options: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=GENERATION_PANEL, **options)


ModelFolder = Annotated[
    Path,
    typer.Argument(
        help="A Hugging Face folder, one made by `catp-jax convert`, or the name of a model that "
        "Hugging Face's tools have downloaded (org/name).",
        parser=folder,
        metavar="MODEL",
    ),
]
PRESET = (
    "the name of a model that Hugging Face's tools have downloaded (org/name), or that of a "
    "published checkpoint, downloaded or not (Salesforce/blip2-opt-2.7b)."
)
DtypeName = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[
    DtypeName | None,
    model_option("Cast the weights to this type; as they are stored, if not given."),
]
IgnoreConfig = Annotated[
    list[str] | None,
    model_option(
        "Read config.json as if it did not have this key (text_config.KEY for one of a part). "
        "Repeat it for several.",
        metavar="KEY",
    ),
]
Adapter = Annotated[
    Path | None,
    model_option(
        "Merge the LoRA adapter in this folder; one beside the weights is always merged.",
        parser=folder,
        metavar="DIR|NAME",
    ),
]
Processor = Annotated[
    Path | None,
    model_option(
        "Take the tokenizer and the image processor from another folder.",
        parser=folder,
        metavar="DIR|NAME",
    ),
]
Mesh = Annotated[
    str | None,
    model_option(
        "Spread the model over all devices: sizes of data, fsdp and tensor, whose product is their "
        "number (data=2,tensor=4). `catp-jax plan` says what fits.",
        metavar="SIZES",
    ),
]
Chat = Annotated[
    bool,
    generation_option("--chat", help="Put each prompt through the checkpoint's chat template."),
]
Begun = Annotated[
    str,
    generation_option(help="The text that each answer begins with; the model continues it."),
]
Limit = Annotated[
    int | None, typer.Option(help="Ask only so many questions, at even distances.", min=1)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]

PRUNE = (
    f"Pruning methods, of {METHODS}. Options follow a method after colons; several methods, "
    "separated by commas, apply in order (catp:layers=first,fastv)."
)
Prune = Annotated[list[str] | None, typer.Option(help=PRUNE, metavar="METHOD,…")]
KEEP = (
    "How many visual tokens each of these methods keeps: a count, or a percentage of each prompt's "
    "own tokens (50%,8)."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """How a model is loaded: keywords of `api.load`."""

    dtype: Dtype = None
    weights: Annotated[
        Literal["int8", "float8"] | None,
        model_option("Narrow the layers of the language model to 8 bits as they load."),
    ] = None
    mesh: Mesh = None
    adapter: Adapter = None
    processor: Processor = None
    ignore_config: IgnoreConfig = None
    vision_mode: Annotated[
        Literal["meta", "hf"] | None,
        model_option(
            "Llama Vision: take the states of the vision tower as Meta's code does (meta) or as "
            "transformers does (hf); as config.json says, if not given."
        ),
    ] = None
    mask_mode: Annotated[
        Literal["meta", "hf"] | None,
        model_option(
            "Llama Vision: text that sees no image attends to none (meta, if not given), or to all "
            "as in transformers (hf)."
        ),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """Those of `api.load`."""
        return vars(self) | {"ignore_config": tuple(self.ignore_config or ())}

    def settings(self, of_folder: Callable[[Path], Any]) -> dict[str, Any]:
        """What was given and answers depend on, for records; a folder is what `of_folder` makes of
        it.
        """
        return {
            name: of_folder(value) if isinstance(value, Path) else value
            for name, value in given(self.keywords()).items()
            if name != "mesh"
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast:
    """Whether answers are contrasted: keywords of `api.load`."""

    contrast: Annotated[
        float | None,
        model_option(
            "MINT: answer by what the visual tokens say that --prune keeps, in contrast to all of "
            "them, so strongly (1); it takes twice the time."
        ),
    ] = None
    plausible: Annotated[
        float | None,
        model_option(
            "In a --contrast, leave out tokens less likely than this share of the likeliest (0.1)."
        ),
    ] = None

    def checked(self) -> dict[str, Any]:
        """What was given. Raises BadParameter."""
        from catp_jax.generation.contrast import check_contrast

        with wrong_call():
            check_contrast(self.contrast, self.plausible)
        return given(vars(self))


IMAGE_SCALE = (
    "Show the model each image with this share of its rows and columns of pixels (0.5): Llama "
    "Vision may take fewer tiles of it, for the others it is a blur."
)
TILES = "Llama Vision: cut an image into so many tiles at most."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeing:
    """What a model sees of an image: keywords of `api.load`."""

    image_scale: Annotated[float | None, typer.Option(help=IMAGE_SCALE)] = None
    tiles: Annotated[int | None, typer.Option(help=TILES)] = None

    def checked(self, config: Any) -> dict[str, Any]:
        """What was given, for a model of this configuration. Raises BadParameter."""
        from catp_jax.readers.seen import Seen

        keywords = given(vars(self))
        with wrong_call():
            Seen(**keywords).check(config)
        return keywords


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are generated: fields of `generation.options.Options`."""

    max_new_tokens: Annotated[
        int | None, generation_option(help="The longest answer, in tokens.")
    ] = None
    min_new_tokens: Annotated[
        int | None, generation_option(help="The shortest answer, in tokens.")
    ] = None
    num_beams: Annotated[
        int | None,
        generation_option(
            help="Search for the likeliest answer with so many beams; 1 does not search."
        ),
    ] = None
    length_penalty: Annotated[
        float | None,
        generation_option(
            help="Beam search: above 0 favours long answers, below 0 short ones; 0 does not look "
            "at the length."
        ),
    ] = None
    early_stopping: Annotated[
        Literal["heuristic", "first", "never"] | None,
        generation_option(
            help="Beam search ends when no better answer is likely (heuristic), with the first "
            "--num-beams answers (first), or when none can be better (never)."
        ),
    ] = None
    temperature: Annotated[
        float | None, generation_option(help="Draw answers at this temperature; 0 is greedy.")
    ] = None
    top_k: Annotated[
        int | None,
        generation_option(help="Draw from this many of the likeliest tokens; 0 is all."),
    ] = None
    top_p: Annotated[
        float | None,
        generation_option(
            help="Draw from the likeliest tokens that have this share of the probability."
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        generation_option(
            help="Above 1, tokens that the prompt or the answer already has are less likely."
        ),
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None,
        generation_option(help="No sequence of this many tokens stands twice; 0 allows it."),
    ] = None
    bad_words: Annotated[
        list[str] | None,
        generation_option(
            "--bad-word", help="Never write this word. Repeat it for several.", metavar="TEXT"
        ),
    ] = None
    suppress_tokens: Annotated[
        list[int] | None,
        generation_option(
            "--suppress-token",
            help="Never write the token of this number. Repeat it for several.",
            metavar="ID",
        ),
    ] = None
    begin_suppress_tokens: Annotated[
        list[int] | None,
        generation_option(
            "--begin-suppress-token",
            help="Begin no answer with the token of this number. Repeat it for several.",
            metavar="ID",
        ),
    ] = None
    forced_eos_token_id: Annotated[
        list[int] | None,
        generation_option(
            "--forced-eos-token",
            help="End an answer of --max-new-tokens with the token of this number. Repeat it for "
            "several.",
            metavar="ID",
        ),
    ] = None
    stop_strings: Annotated[
        list[str] | None,
        generation_option(
            "--stop", help="End an answer with this text. Repeat it for several.", metavar="TEXT"
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """The options that were given."""
        return given(vars(self))


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value not in (None, (), [])}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameters that are dataclasses."""
    hints = typing.get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    classes: dict[str, Any] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            parameters.append(_parameter(name, hints[name], parameter.default))
            continue
        classes[name] = hints[name]
        types = typing.get_type_hints(hints[name], include_extras=True)
        fields = dataclasses.fields(hints[name])
        parameters += [_parameter(one.name, types[one.name], one.default) for one in fields]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, kind in classes.items():
            fields = [one.name for one in dataclasses.fields(kind)]
            values[name] = kind(**{field: values.pop(field) for field in fields})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


@contextlib.contextmanager
def wrong_call() -> Iterator[None]:
    """What is refused inside is a wrong call: exit code 2."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def methods(prune: list[str] | None, keep: list[str] | None) -> "Named":
    """The methods that apply in order, each with its budget. Raises BadParameter if --prune and
    --keep do not name them.
    """
    specs, budgets = _once("--prune", prune), _once("--keep", keep)
    if (specs is None) != (budgets is None):
        raise typer.BadParameter("--prune and --keep go together; give both or neither")
    from catp_jax.pruning import BOUNDS
    from catp_jax.pruning.named import named

    with wrong_call():
        found = named(specs, budgets)
    if told := [spec for spec, _ in found if spec.partition(":")[0] in BOUNDS]:
        raise typer.BadParameter(
            f"{told[0]} must be told which visual tokens are needed; only a study of a task that "
            "knows it can (study --task scenes)"
        )
    return found


def _once(option: str, values: list[str] | None) -> str | None:
    if values and len(values) > 1:
        raise typer.BadParameter(
            f"give {option} once, with commas between what applies in order "
            f"({option} {','.join(values)})"
        )
    return values[0] if values else None
