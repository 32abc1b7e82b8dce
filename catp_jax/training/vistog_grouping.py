"""Trains VisToG's grouping (`pruning.vistog_grouping`) for a BLIP-2, on questions about scenes.

    what the model makes of scenes → groups → the model answers → loss → the grouping alone

The rest of the model is frozen: the paper trains the projector, too, and the language model, but
then a grouping would fit no other copy of the model. Groups are trained as a prefill makes them,
noise aside: empty ones are not read, and words close up behind the others.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from catp_jax.contract import Site, View, run_pruners
from catp_jax.models.blip2 import Blip2
from catp_jax.pruning.vistog_grouping import Grouping, VisToGGrouping
from catp_jax.training.loop import Figures, Stage, adamw_stage, train
from catp_jax.training.mini_blip2 import make_text
from catp_jax.training.scene_answers import answer_logits, rows_of
from catp_jax.training.scene_bank import Bank, SceneBatch, evaluate
from catp_jax.training.scene_questions import Asked
from catp_jax.training.scenes import Scene
from catp_jax.training.scenes_blip2 import pixels_of
from catp_jax.training.scoring import answer_loss, check_options, is_answered

PEAK = 2e-3  # the highest rate of learning
STEPS = 1000


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
    steps: int = STEPS,
    seed: int = 0,
    peak: float = PEAK,
    stop_at: int | None = None,
) -> Grouping:
    """A grouping into so many `groups`, trained on the bank's scenes.

    `work` is a folder for checkpoints and the log; with the same options a run that was cut off
    goes on from there (`stop_at` cuts it off itself). Raises ValueError if it holds another run.
    """
    if groups < 1:
        raise ValueError(f"a grouping wants at least 1 group, got {groups}")
    options = {"groups": groups, "steps": steps, "seed": seed, "peak": peak}
    check_options(options, work)
    graph, frozen = nnx.split(model)
    stage = grouping_stage(graph, bank, steps, seed, peak)
    start = start_of(bank, groups, seed)
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


def grouping_stage(graph: nnx.GraphDef, bank: Bank, steps: int, seed: int, peak: float) -> Stage:
    """The stage, for `train`: its parameters are a `Grouping`, the model's state is frozen."""

    def loss(
        grouping: Grouping, frozen: Any, batch: SceneBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        view = shown(batch.features)
        method = VisToGGrouping(keep=grouping.semantic.shape[0], grouping=grouping)
        groups = method.grouped(view, key)
        total, figures = answer_loss(
            answer_logits(nnx.merge(graph, frozen), batch, groups), batch.rows.targets
        )
        return total, {**figures, "groups": groups.valid.sum(axis=1).astype(jnp.float32).mean()}

    def batches(step: int) -> SceneBatch:
        return bank.draw(step, steps, seed)

    return adamw_stage("grouping", steps, loss, batches, peak=peak, seed=seed)


def shown(features: Float[Array, "i n d"]) -> View:
    """What a model shows of some images at its entry, evidence aside."""
    images, tokens, _ = features.shape
    numbers = jnp.arange(tokens, dtype=jnp.int32)
    return View(
        site=Site.ENTRY,
        layer=0,
        num_visual=tokens,
        tokens=features,
        numbers=jnp.broadcast_to(numbers, (images, tokens)),
        valid=jnp.ones((images, tokens), bool),
        sees=jnp.ones((images, 1, tokens), bool),
    )


def answered(model: Blip2, method: Any) -> Callable[[SceneBatch], Float[Array, "i q"]]:
    """1 where greedy decoding would give exactly the answer, of what a method for the entry that
    needs no evidence leaves (None: of all tokens).
    """
    graph, state = nnx.split(model)

    @jax.jit
    def is_right(state: Any, method: Any, batch: SceneBatch) -> Array:
        pruners = () if method is None else (method,)
        keep = run_pruners(pruners, shown(batch.features))[0].tokens
        return is_answered(answer_logits(nnx.merge(graph, state), batch, keep), batch.rows.targets)

    return lambda batch: is_right(state, method, batch)


def compare(
    model: Blip2, bank: Bank, asked: list[list[Asked]], methods: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """The share of right answers by family, of each method (see `answered`), on questions about the
    bank's scenes; let those be others than the grouping was trained on.
    """
    return {name: evaluate(answered(model, m), bank, asked) for name, m in methods.items()}
