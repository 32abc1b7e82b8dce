"""The command line's calibration: `catp-jax calibrate MODEL --method … --out DIR`."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from catp_jax import cli_options as opts
from catp_jax.terminal import one_line, say

if TYPE_CHECKING:  # at run time inside the function, so that --help is quick
    from catp_jax.model import Model
    from catp_jax.study.tasks import Example

BATCH = 8  # prompts at a time
TURNS = 4  # questions about an image in a prompt, with their answers but for the last
HELD_OUT = 4  # one of so many prompts is not learned from, but for figures


@opts.with_options
def calibrate(
    model: opts.ModelFolder,
    loading: opts.Loading,
    method: Annotated[
        Literal["eigen", "attention_predictor", "vistog_grouping"],
        typer.Option(help="The method that is to learn."),
    ],
    out: Annotated[Path, opts.file_option("The folder to make; it must not exist yet.")],
    task: Annotated[
        str,
        typer.Option(
            help="Where images and questions come from: scenes, with dials after a colon, "
            "easy-vqa, or jsonl.",
            metavar="TASK",
        ),
    ] = "scenes",
    data: Annotated[Path | None, opts.file_option("jsonl: the file of questions.")] = None,
    samples: Annotated[int, typer.Option(help="How many images.", min=HELD_OUT)] = 128,
    steps: Annotated[
        int, typer.Option(help="Steps of training, of all methods but eigen.", min=1)
    ] = 600,
    groups: Annotated[int, typer.Option(help="vistog_grouping: how many.", min=1)] = 16,
    train: Annotated[
        Literal["grouping", "projector", "language_model"],
        typer.Option(
            help="vistog_grouping: what is trained, all up to this. With more than the grouping "
            "there comes another model, DIR/model, which the grouping is for."
        ),
    ] = "grouping",
    block: Annotated[
        int, typer.Option(help="attention_predictor: visual tokens of a block.", min=1)
    ] = 16,
    rows: Annotated[int, typer.Option(help="attention_predictor: rows of a history.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Fixes every random choice.", min=0)] = 0,
) -> None:
    """Let a pruning method learn what it needs to know of a model, to be used as --prune
    METHOD:DIR. Run it again with the same options to resume after an interruption.
    """
    from catp_jax import api
    from catp_jax.pruning.learned import Learned, check_new

    if any(mark in str(out) for mark in ":,"):
        raise typer.BadParameter(f"--out has a colon or a comma, which --prune cuts at: {out}")
    check_new(out)
    if method == "vistog_grouping" and (task != "scenes" or data is not None):
        raise typer.BadParameter("vistog_grouping learns from --task scenes, without dials")
    if train != "grouping":
        _check_train(train, method, loading)
    prompts, digest = _prompts(task, data, samples)
    loaded = api.load(model, **loading.keywords(), generation_config=False)
    _check_fits(loaded, method)
    settings: dict[str, Any] = {"task": task, "samples": len(prompts), "questions": digest}
    settings |= {"seed": seed}
    work, described, beside = out.with_name(f"{out.name}.work"), loaded.describe(), []
    if method == "eigen":
        shaping: dict[str, Any] = {}
        arrays, figures = _eigen(loaded, prompts)
    elif method == "vistog_grouping":
        shaping, settings = {}, settings | {"steps": steps, "groups": groups, "train": train}
        arrays, figures, network = _grouping(loaded, settings, work)
        if train != "grouping":
            settings |= {"trained_from": described}
            described, beside = _written(network, model, work / "model"), [work / "model"]
    else:
        shaping = {"block": block, "rows": rows}
        settings |= {"steps": steps}
        arrays, figures = _predictor(loaded, prompts, settings | shaping, work)
    record = {"learned_from": settings, "figures": figures}
    Learned(method, described, shaping, arrays, record).write(out, beside)
    if method != "eigen":
        shutil.rmtree(work, ignore_errors=True)
    for name, value in figures.items():
        print(one_line(f"{name}: {value}"))
    of = f" with the model {out / 'model'}" if beside else ""
    say(f"written: {out}; use it as --prune {method}:{out}{of}")


def _prompts(task: str, data: Path | None, samples: int) -> "tuple[list[tuple[Any, str]], str]":
    """Images, each with what is asked about it: questions with their answers, the last without. And
    a fingerprint of them.
    """
    from catp_jax.study.tasks import digest, easy_vqa_task, fill, jsonl_task
    from catp_jax.training.scene_questions import scenes_task
    from catp_jax.training.scenes import Dials

    name, _, dials = task.partition(":")
    if name not in ("scenes", "easy-vqa", "jsonl") or (dials and name != "scenes"):
        raise typer.BadParameter(
            f"--task is scenes, easy-vqa or jsonl, and scenes alone takes dials; got {task}"
        )
    if (data is None) == (name == "jsonl"):
        raise typer.BadParameter("--task jsonl and --data go together")
    if data is not None:
        chosen = jsonl_task(data)
    elif name == "scenes":
        with opts.wrong_call():
            parsed = Dials.parse(dials)
        chosen = scenes_task(parsed, "train", samples)
    else:
        chosen = easy_vqa_task("train")
    by_image: dict[int, list[Example]] = {}
    for example in chosen.examples:
        by_image.setdefault(example.image_id, []).append(example)
    prompts, used = [], []
    for examples in list(by_image.values())[:samples]:
        *told, last = some = examples[:TURNS]
        used += some
        asked = [fill(chosen.prompt, one.question) for one in (*told, last)]
        turns = [f"{text} {one.answer}" for text, one in zip(asked, told, strict=False)]
        prompts.append((last.image, " ".join([*turns, asked[-1]])))
    if len(prompts) < HELD_OUT:
        raise ValueError(f"calibration wants at least {HELD_OUT} images, {task} has {len(prompts)}")
    return prompts, digest(used)


def _check_fits(model: "Model", method: str) -> None:
    """Raises ValueError for a model that caches no visual tokens, for eigen also if their keys turn
    with the position; for vistog_grouping if it is no BLIP-2.
    """
    from catp_jax.contract import Site
    from catp_jax.pruning import site_of

    if method == "vistog_grouping":
        if Site.ENTRY not in model.sites or model.config.qformer.use_qformer_text_input:
            raise ValueError(
                "vistog_grouping groups the queries of a BLIP-2, before its language model; this "
                f"is {type(model.network.thaw()).__name__}"
            )
    elif site_of(method, model.sites) is None:
        raise ValueError(
            f"{method} wants a model that caches visual tokens, which "
            f"{model.describe()['language_model']} does not"
        )
    if method == "eigen" and Site.ENTRY in model.sites and hasattr(model.config.text, "rope"):
        raise ValueError(
            "eigen wants keys of visual tokens without RoPE: a BLIP-2 with OPT, or Llama 3.2 "
            f"Vision; this is {model.describe()['language_model']}"
        )


def _states(model: "Model", prompts: Sequence[tuple[Any, str]], pruner: Any) -> Iterator[Any]:
    """What a method remembers of a prefill, by layer, a batch at a time.

    The last batch is filled up with a prompt that was there already, since another size would be
    another program; that one's states are left out.
    """
    import jax

    from catp_jax.generation import generate as programs
    from catp_jax.sharding import place

    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        number = len(some)
        images, texts = zip(*some, *[some[-1]] * (BATCH - number), strict=True)
        packed = model.prepare(list(images), list(texts))
        found = programs.prefill(model.network, (pruner,), packed.given, new_slots=1)
        states = place.fetch(found.selection.states[0])
        yield jax.tree.map(lambda leaf, number=number: leaf[:number], states)


def _split(prompts: list[Any]) -> tuple[list[Any], list[Any]]:
    """Those to learn from, and those for figures."""
    held = prompts[::HELD_OUT]
    return [one for number, one in enumerate(prompts) if number % HELD_OUT], held


def _eigen(model: "Model", prompts: list[tuple[Any, str]]) -> tuple[dict[str, Any], dict[str, Any]]:
    from catp_jax.pruning.eigen import Directions, Gather, Near, search

    seen, held = _split(prompts)
    grams: dict[int, Any] = {}
    for states in _states(model, seen, Gather()):
        for layer, gram in states.items():
            if gram.keys.any():  # a layer that reads text alone has none
                sums = gram.keys.sum(axis=0), gram.values.sum(axis=0)
                before = grams.get(layer, (0, 0))
                grams[layer] = tuple(a + b for a, b in zip(before, sums, strict=True))
    directions = Directions.learned(grams)

    def errors(bases: Any) -> dict[int, float]:
        sums: dict[int, Any] = {}
        for states in _states(model, held, Near(bases=bases)):
            for layer in directions.layers:
                apart = states[layer]
                output, error = sums.get(layer, (0.0, 0.0))
                sums[layer] = (output + apart.output.sum(), error + apart.error.sum())
        return {layer: float((error / output) ** 0.5) for layer, (output, error) in sums.items()}

    ranks = search(directions, errors)
    figures = {
        "ranks of keys and of values by layer, output within 2.5 % (--keep auto)": {
            str(layer): list(pair) for layer, pair in ranks.items()
        },
        "share of the bytes that they leave": round(directions.left(ranks), 4),
    }
    return directions.with_ranks(ranks).arrays, figures


def _check_work(work: Path, options: dict[str, Any]) -> None:
    """Makes the folder of what is unfinished. Raises ValueError if there is another such."""
    from catp_jax.training.scoring import check_options

    if work.exists() and not (work / "options.json").is_file():
        raise ValueError(
            f"{work} is in the way: what is unfinished would be there; choose another --out or "
            "delete it"
        )
    try:
        check_options(options, work)
    except ValueError as error:
        raise ValueError(str(error).replace("--work", "--out")) from None


def _predictor(
    model: "Model", prompts: list[tuple[Any, str]], settings: dict[str, Any], work: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    import jax
    import numpy as np

    from catp_jax.pruning.attention_predictor import AttentionPredictor, Network
    from catp_jax.training.attention_predictor import Sequences, hit_rates, train_network

    if work.exists():
        _check_work(work, settings | {"model": model.checksum})
    block, rows, seed = settings["block"], settings["rows"], settings["seed"]
    watch = AttentionPredictor(
        keep=block, network=Network.start(jax.random.key(0)), block=block, rows=rows
    )

    def sequences(some: list[tuple[Any, str]]) -> Sequences:
        found = [
            np.asarray(state.history).reshape(-1, *state.history.shape[2:])
            for states in _states(model, some, watch)
            for state in states.values()
            if state.history.shape[-1]
        ]
        if not found:
            raise ValueError("no layer of the model reads visual tokens: nothing to learn from")
        widest = max(array.shape[-1] for array in found)
        padded = [np.pad(a, ((0, 0), (0, 0), (0, widest - a.shape[-1]))) for a in found]
        every = np.concatenate(padded)
        length = every.any(axis=2).sum(axis=1)
        return Sequences(rows=every, real=np.asarray(every.any(axis=1)), length=length)

    seen, held = map(sequences, _split(prompts))
    _check_work(work, settings | {"model": model.checksum})
    network = train_network(
        seen,
        rows=rows,
        steps=settings["steps"],
        seed=seed,
        folder=work / "network",
        log=work / "log.jsonl",
    )
    arrays = {name: np.asarray(array) for name, array in network.named().items()}
    return arrays, {
        f"foreseen of {name}": rate
        for name, rate in hit_rates(network, held, rows=rows, seed=seed).items()
    }


def _check_train(train: str, method: str, loading: opts.Loading) -> None:
    """Raises BadParameter where no other model can be trained and written."""
    if method != "vistog_grouping":
        raise typer.BadParameter(f"--train {train} is for vistog_grouping, not for {method}")
    for name, value in {
        "--processor": loading.processor,
        "--ignore-config": loading.ignore_config,
        "--weights": loading.weights,
    }.items():
        if value is not None:
            raise typer.BadParameter(
                f"--train {train} writes a model of float32 with its own files; leave out {name}"
            )


def _grouping(
    model: "Model", settings: dict[str, Any], work: Path
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The arrays, figures, and the model that they are for."""
    import numpy as np

    from catp_jax.pruning import NearestCentroid, Pool, VisToGGrouping
    from catp_jax.training.scene_answers import answered
    from catp_jax.training.scene_bank import evaluate
    from catp_jax.training.scene_questions import questions_of
    from catp_jax.training.scenes import make_scene
    from catp_jax.training.vistog_grouping import check_trainable, make_bank, train_grouping

    network, tokenizer = model.network.thaw(), model.reader.tokenizer
    scenes = [make_scene("train", number) for number in range(settings["samples"])]
    bank, number = make_bank(network, tokenizer, scenes), settings["groups"]
    check_trainable(network, settings["train"])
    _check_work(work, settings | {"model": model.checksum})
    grouping, own = train_grouping(
        network,
        bank,
        number,
        work / "grouping",
        trained=settings["train"],
        steps=settings["steps"],
        seed=settings["seed"],
    )
    held = questions_of("validation", max(settings["samples"] // HELD_OUT, 1), each=2)
    bank = make_bank(network, tokenizer, [scene for scene, _ in held])
    asked = [asked for _, asked in held]
    compared = {
        "unpruned": (network, None),
        "vistog_grouping": (own, VisToGGrouping(keep=number, grouping=grouping)),
        "nearest_centroid": (network, NearestCentroid(keep=number)),
        "pool": (network, Pool(keep=number)),
    }
    figures = {name: evaluate(answered(*one), bank, asked) for name, one in compared.items()}
    arrays = {name: np.asarray(array) for name, array in vars(grouping).items()}
    told = {
        f"right answers with {name}": {kind: x for kind, x in found.items() if "," not in kind}
        for name, found in figures.items()
    }
    return arrays, told, own


def _written(network: Any, model: Path, out: Path) -> dict[str, Any]:
    """Writes a model that was trained along, and says what is loaded from there."""
    from catp_jax import api
    from catp_jax.training.vistog_grouping import write_trained

    shutil.rmtree(out, ignore_errors=True)  # of a run that was cut off behind this
    write_trained(network, model, out)
    return api.load(out, generation_config=False).describe()
