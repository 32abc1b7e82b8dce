"""Trains VisToG's grouping (`pruning.vistog_grouping`) for a BLIP-2, on questions about scenes.

    what the model makes of scenes → groups → the model answers → loss → what is trained

That is the grouping; with it the projection in front of the language model; or the language model,
too. The paper has two stages, the projection's and the language model's. Our reading is one, which
trains all parts at once from the model given. What reads the image stays as it is. A model that was
trained along is another model, and the grouping fits that one alone. Groups are trained as a
prefill makes them, noise aside: empty ones are not read, and words close up behind the others.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import convert
from catp_jax.contract import View
from catp_jax.models.blip2 import Blip2
from catp_jax.pruning.vistog_grouping import Grouping, VisToGGrouping
from catp_jax.training.loop import Figures, Stage, adamw_stage, train
from catp_jax.training.mini_blip2 import make_text
from catp_jax.training.scene_answers import answer_logits, left_by, rows_of, shown
from catp_jax.training.scene_bank import SCENES, Bank, SceneBatch
from catp_jax.training.scenes import Scene
from catp_jax.training.scenes_blip2 import pixels_of
from catp_jax.training.scoring import answer_loss, check_options
from convert.dtypes import name_dtype

PEAK = 2e-3  # the highest rate of learning, of the grouping …
MODEL_PEAK = 3e-4  # … and of what is trained of the model
STEPS = 1000
TRAINED = {
    "grouping": (),
    "projector": ("language_projection",),
    "language_model": ("language_projection", "language_model"),
}
"""The model's parts that are trained beside the grouping, by the last of them."""
OF_ITS_OWN = ("README.md", "training_log.jsonl")  # which files tell of one model's own training


def make_bank(model: Any, tokenizer: Any, scenes: Sequence[Scene]) -> Bank:
    """Scenes as the model's queries have them, and questions in its tokenizer's words.

    Raises ValueError for a model that is no BLIP-2, or one for images of another size.
    """
    if not isinstance(model, Blip2):
        raise ValueError(f"a grouping is trained for a BLIP-2, not for {type(model).__name__}")
    size, (height, width, _) = model.config.vision.image_size, scenes[0].pixels.shape
    if (height, width) != (size, size):
        raise ValueError(f"scenes have {height}×{width} pixels, and this model takes {size}×{size}")
    graph, state = nnx.split(model)
    encode = jax.jit(lambda state, pixels: nnx.merge(graph, state).encode(pixels)[0])
    return Bank(
        scenes,
        lambda some: encode(state, jnp.asarray(pixels_of(some))),
        rows_of(make_text(tokenizer, model.config)),
    )


def train_grouping(
    model: Blip2,
    bank: Bank,
    groups: int,
    work: Path,
    *,
    trained: str = "grouping",
    steps: int = STEPS,
    seed: int = 0,
    peak: float = PEAK,
    model_peak: float = MODEL_PEAK,
    scenes: int = SCENES,
    stop_at: int | None = None,
) -> tuple[Grouping, Blip2]:
    """A grouping into so many `groups`, trained on the bank's scenes, and the model that it is for:
    the one given, or with more `trained` (see `TRAINED`) a new one.

    `work` is a folder for checkpoints and the log; with the same options a run that was cut off
    goes on from there (`stop_at` cuts it off itself). Raises ValueError if it holds another run,
    and as `check_trainable` does.
    """
    if groups < 1:
        raise ValueError(f"a grouping wants at least 1 group, got {groups}")
    options: dict[str, Any] = {"groups": groups, "trained": trained, "steps": steps}
    options |= {"seed": seed, "peak": peak, "scenes": scenes}

    def reduce(grouping: Grouping, view: View, key: Array) -> Any:
        return VisToGGrouping(keep=groups, grouping=grouping).grouped(view, key)

    graph, params, frozen = split(model, trained)
    check_options(options | ({"model_peak": model_peak} if params else {}), work)
    stage = reading_stage(graph, bank, reduce, steps, seed, (peak, model_peak), scenes)
    start = {"learned": start_of(bank, groups, seed), "model": params}
    found = _train(stage, start, frozen, work, stop_at)
    return found["learned"], nnx.merge(graph, found["model"], frozen) if params else model


def train_reading(
    model: Blip2,
    bank: Bank,
    method: Any,
    work: Path,
    *,
    trained: str,
    steps: int = STEPS,
    seed: int = 0,
    model_peak: float = MODEL_PEAK,
    scenes: int = SCENES,
) -> Blip2:
    """The model trained to read what a method leaves that learns nothing itself: to compare with
    `train_grouping`, of which all else is the same.
    """
    graph, params, frozen = split(model, trained)
    options: dict[str, Any] = {"method": repr(method), "trained": trained, "steps": steps}
    check_options(options | {"seed": seed, "model_peak": model_peak, "scenes": scenes}, work)

    def reduce(_: Any, view: View, key: Array) -> Any:
        return left_by(method, view)

    stage = reading_stage(graph, bank, reduce, steps, seed, (PEAK, model_peak), scenes)
    found = _train(stage, {"learned": {}, "model": params}, frozen, work, None)
    return nnx.merge(graph, found["model"], frozen)


def split(model: Blip2, trained: str) -> tuple[nnx.GraphDef, Any, Any]:
    """The model's structure, the arrays that are trained, and the others.

    Raises ValueError as `check_trainable` does.
    """
    check_trainable(model, trained)
    is_trained = nnx.Any(*map(nnx.PathContains, TRAINED[trained]))
    graph, params, frozen = nnx.split(model, is_trained, ...)
    return graph, params, frozen


def check_trainable(model: Blip2, trained: str) -> None:
    """Raises ValueError for a name that is not in `TRAINED`, and for a model to be trained whose
    weights are not all of float32: small steps get lost in less.
    """
    if trained not in TRAINED:
        raise ValueError(f"what is trained is one of {', '.join(TRAINED)}; got {trained}")
    types = sorted({str(array.dtype) for array in jax.tree.leaves(nnx.state(model))})
    if TRAINED[trained] and types != ["float32"]:
        raise ValueError(
            f"training the {trained.replace('_', ' ')} wants all weights in float32, and they are "
            f"in {', '.join(types)}; load the model with dtype float32"
        )


def _train(stage: Stage, start: Any, frozen: Any, work: Path, stop_at: int | None) -> Any:
    log = work / "training_log.jsonl"
    return train(stage, start, work / "grouping", log, frozen=frozen, stop_at=stop_at)


def start_of(bank: Bank, groups: int, seed: int) -> Grouping:
    """One to begin with: groups for what queries at even distances have of their own on average.

    What all tokens have in common is taken out: it would draw nearly all of them to few groups.
    """
    features = bank.features.astype(np.float32)
    common, own = features.mean(axis=(0, 1)), features.mean(axis=0)
    noise = np.random.default_rng(seed).normal(size=(groups, len(common)))
    centres = own[np.arange(groups) * len(own) // groups] - common + 0.1 * own.std() * noise
    direction = common / np.linalg.norm(common)
    centres -= np.outer(centres @ direction, direction)
    return Grouping.around(jnp.asarray(centres, jnp.float32))


def reading_stage(
    graph: nnx.GraphDef,
    bank: Bank,
    reduce: Callable[[Any, View, Array], Any],
    steps: int,
    seed: int,
    peaks: tuple[float, float],
    scenes: int,
) -> Stage:
    """The stage, for `train`: its parameters are what `reduce` has "learned" and what is trained of
    the "model", each up to a rate of its own. `reduce` says what is left of the tokens shown.
    """

    def loss(
        params: dict[str, Any], frozen: Any, batch: SceneBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        groups = reduce(params["learned"], shown(batch.features), key)
        model = nnx.merge(graph, params["model"], frozen)
        total, figures = answer_loss(answer_logits(model, batch, groups), batch.rows.targets)
        return total, {**figures, "groups": groups.valid.sum(axis=1).astype(jnp.float32).mean()}

    def batches(step: int) -> SceneBatch:
        return bank.draw(step, steps, seed, scenes=scenes)

    peak = {"learned": peaks[0], "model": peaks[1]}
    return adamw_stage("grouping", steps, loss, batches, peak=peak, seed=seed)


def write_trained(model: Blip2, source: Path, out: Path) -> None:
    """Writes the new folder `out` in Hugging Face format: a model that was trained along, with all
    that goes with the weights as the folder `source` has it, which the model came from. What that
    folder tells of its own model is left out.
    """
    raw = json.loads((source / "config.json").read_text())
    convert.write_hf(model, raw, out, side_files=source)
    name_dtype(out / "config.json", np.dtype(np.float32))
    for name in OF_ITS_OWN:
        (out / name).unlink(missing_ok=True)
