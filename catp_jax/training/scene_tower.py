"""The first stage of both recipes on scenes: an image encoder learns what covers each patch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from catp_jax.struct import pytree
from catp_jax.training.loop import Figures, Stage, adamw_stage
from catp_jax.training.scene_batches import LABELS, patch_labels
from catp_jax.training.scenes import Scene, make_scene

SCENES = 8  # in a step


@pytree
class PatchBatch:
    """Scenes, and what each token of theirs is labelled with (see `scene_batches`)."""

    pixels: Float[Array, "i *tiles c height width"]
    labels: dict[str, Int[Array, "i *tiles n"]]
    weights: Float[Array, "i *tiles n"]


def sines(
    rows: Int[np.ndarray, " n"], columns: Int[np.ndarray, " n"], width: int
) -> Float[Array, "n+1 width"]:
    """Where patches are: sines of row and column. In front of them zeros, for the class token."""
    frequencies = 64.0 ** -(np.arange(width // 4) / (width // 4))
    angles = [place[:, None] * frequencies for place in (rows, columns)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return jnp.asarray(np.pad(np.concatenate(waves, axis=1), ((1, 0), (0, 0))), jnp.float32)


def tower_stage(
    steps: int,
    see: Callable[[Any, Any], Array],
    graph: nnx.GraphDef,
    pixels_of: Callable[[Sequence[Scene]], np.ndarray],
    tokens_of: Callable[[np.ndarray], np.ndarray],
    patch: int,
    seed: int,
) -> Stage:
    """What each token is labelled with, read off by a linear head each (`empty_heads`).

    `see(tower, pixels)` gives the tokens; `pixels_of` makes the model's pixels of scenes, and
    `tokens_of` puts a grid of patches, [rows, columns], in the order of the tokens.
    """

    def batch(step: int) -> PatchBatch:
        scenes = [make_scene("train", step * SCENES + n, seed=seed) for n in range(SCENES)]
        labelled = [patch_labels(scene, patch) for scene in scenes]
        return PatchBatch(
            pixels=jnp.asarray(pixels_of(scenes)),
            labels={
                name: jnp.asarray(np.stack([tokens_of(labels[name]) for labels, _ in labelled]))
                for name in LABELS
            },
            weights=jnp.asarray(np.stack([tokens_of(weights) for _, weights in labelled])),
        )

    def loss(
        params: dict[str, Any], frozen: None, batch: PatchBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        features = see(nnx.merge(graph, params["tower"]), batch.pixels)
        total, figures = jnp.zeros(()), {}
        on_objects = batch.weights * (batch.labels["name"] > 0).astype(jnp.float32)
        for name, labels in batch.labels.items():
            logits = features @ params[name]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            total += (losses * batch.weights).sum() / labels.shape[0]
            is_right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
            figures[name] = (is_right * on_objects).sum() / on_objects.sum()
        return total, {"loss": total, **figures}

    return adamw_stage("tower", steps, loss, batch, peak=2e-3, seed=seed)


def empty_heads(width: int) -> dict[str, Array]:
    """A head for each sort of label."""
    return {name: jnp.zeros((width, len(labels))) for name, labels in LABELS.items()}
