"""Trains the network of AttentionPredictor on rows of attention that a model has shown.

    r₁ r₂ … rₜ₋₁ → network → rₜ        mean squared error, one network for all layers and heads

A `Sequences` holds the pooled rows of a prompt and its answer, by layer and head. A step draws some
places t in them; a history has what came before, and zeros in front of that.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from catp_jax.pruning.attention_predictor import Network, hit_rate
from catp_jax.struct import pytree
from catp_jax.training.loop import Figures, adamw_stage, train

DRAWN = 64
"""Histories in a step of training."""
SHARES = (0.5, 0.25, 0.125)
"""The shares of the blocks for which hit rates are given."""


@pytree
class Sequences:
    """Rows of attention, the earliest first, `length` of them at the end, and zeros in front;
    blocks that are no padding are `real`.
    """

    rows: Float[np.ndarray, "n rows blocks"]
    real: Bool[np.ndarray, "n blocks"]
    length: Int[np.ndarray, " n"]


@pytree
class Histories:
    """What is known before a row, and the row."""

    history: Float[Array, "n rows blocks"]
    real: Bool[Array, "n blocks"]
    row: Float[Array, "n blocks"]


def histories(
    sequences: Sequences, which: Int[np.ndarray, " n"], back: Int[np.ndarray, " n"], rows: int
) -> Histories:
    """The row that is `back` before the last one, of these sequences, and `rows` before it."""
    some, width = sequences.rows[which], sequences.rows.shape[1]
    padded = np.pad(some, ((0, 0), (rows, 0), (0, 0)))
    end = rows + width - 1 - back  # where the row is
    places = end[:, None] - rows + np.arange(rows)[None]
    each = np.arange(len(which))
    return Histories(
        history=jnp.asarray(padded[each[:, None], places]),
        real=jnp.asarray(sequences.real[which]),
        row=jnp.asarray(padded[each, end]),
    )


def train_network(
    sequences: Sequences, *, rows: int, steps: int, seed: int, folder: Path, log: Path
) -> Network:
    """A network for histories of so many `rows`; goes on from a checkpoint in `folder`.

    Raises ValueError if no sequence has two rows.
    """
    usable = np.flatnonzero(sequences.length > 1)
    if not len(usable):
        raise ValueError("no prompt has two rows of attention; give longer questions")

    def batch(step: int) -> Histories:
        rng = np.random.default_rng((seed, step))
        which = rng.choice(usable, DRAWN)
        return histories(sequences, which, rng.integers(0, sequences.length[which] - 1), rows)

    def loss(
        network: Network, frozen: None, batch: Histories, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        off = (network(batch.history, batch.real) - batch.row) ** 2
        error = off.sum() / batch.real.sum(dtype=jnp.int32).astype(jnp.float32)
        return error, {"error": error}

    stage = adamw_stage("network", steps, loss, batch, peak=3e-3, seed=seed)
    return train(stage, Network.start(jax.random.key(seed)), folder, log)


def hit_rates(network: Network, sequences: Sequences, *, rows: int, seed: int) -> dict[str, float]:
    """Which share of the highest blocks of the last row is foreseen by the network, by the row
    before and at random, for some shares of a prompt's own blocks.
    """
    usable, own = np.flatnonzero(sequences.length > 1), sequences.real.sum(axis=1)
    rng = np.random.default_rng(seed)
    predict = jax.jit(lambda batch: network(batch.history, batch.real))
    found: dict[str, list[np.ndarray]] = {}
    parts = [
        (blocks, alike[start : start + DRAWN])
        for blocks in np.unique(own[usable]).tolist()
        for alike in [usable[own[usable] == blocks]]
        for start in range(0, len(alike), DRAWN)
    ]
    for blocks, which in parts:
        batch = histories(sequences, which, np.zeros(len(which), np.int64), rows)
        by = {
            "network": predict(batch),
            "the row before": batch.history[:, -1],
            "chance": jnp.asarray(rng.random(batch.row.shape), jnp.float32),
        }
        for share in SHARES:
            number = max(int(share * blocks), 1)
            for name, row in by.items():
                hits = np.asarray(hit_rate(row, batch.row, number, batch.real))
                found.setdefault(f"{share:.1%} of the blocks, {name}", []).append(hits)
    return {name: round(float(np.concatenate(some).mean()), 4) for name, some in found.items()}
