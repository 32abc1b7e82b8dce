"""Every method for cross-attention on the tiny Llama Vision: runs that tests share, and references.

One batch has it all: text before the image, an image in front, none, three images, two tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.contract import Keep
from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models.cross_decoder import Branches, CrossLayer
from catp_jax.models.mllama import Inputs, Mllama
from catp_jax.pruning import FastV, KNorm, NearestCentroid, Pool, Random, TrimmedLlama, Uniform
from catp_jax.readers.mllama_packing import MllamaPacked, locate
from tests.pruning import oracles
from tests.pruning.views import shown
from tests.random_mllama import CONFIG, NEVER, PAD, ROOM, packed, random_mllama

NEW = 6  # tokens to generate
BUDGET = 7  # visual tokens to keep: fewer than any image has

METHODS = {
    "trimmed_llama": lambda keep: TrimmedLlama(keep=keep),
    "trimmed_llama, union": lambda keep: TrimmedLlama(keep=keep, per_head=max(keep // 3, 2)),
    "trimmed_llama, ratio": lambda keep: TrimmedLlama(keep=keep, k_ratio=0.1),
    "fastv": lambda keep: FastV(keep=keep),
    "k_norm": lambda keep: KNorm(keep=keep),
    "random": lambda keep: Random(keep=keep, seed=3),
    "uniform": lambda keep: Uniform(keep=keep),
    "nearest_centroid": lambda keep: NearestCentroid(keep=keep),
    "pool": lambda keep: Pool(keep=keep),
}
MERGES = ("nearest_centroid", "pool")
FULL = {
    **{name: method(ROOM) for name, method in METHODS.items() if "," not in name},
    "trimmed_llama, union": TrimmedLlama(keep=ROOM, per_head=ROOM),
    "trimmed_llama, ratio": TrimmedLlama(keep=ROOM, k_ratio=1.0),
}
CASES = [
    *((method, "meta") for method in METHODS if method not in MERGES),
    *((method, "hf") for method in ("trimmed_llama, union", "k_norm")),
]


def generate(
    pruners: tuple[Any, ...], batch: MllamaPacked, new: int = NEW, **choice: Any
) -> programs.Generated:
    return programs.generate(
        random_mllama(),
        pruners,
        batch.inputs,
        sampling(len(batch.available), **choice),
        Stop(ends=NEVER, pad=PAD, max_new_tokens=new),
    )


@functools.cache
def mixed(method: str | None, mode: str = "meta") -> programs.Generated:
    """The mixed batch, generated once for all tests."""
    return generate(() if method is None else (METHODS[method](BUDGET),), packed(mode=mode))


def difference(one: Any, other: Any) -> float:
    """max |Δ| over the largest magnitude."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())


def kept_places(out_kept: Keep, batch: MllamaPacked, row: int) -> list[tuple[int, ...]]:
    """(image, tile, row, column) of each visual token that a prompt keeps."""
    numbers = np.asarray(out_kept.indices[row])[np.asarray(out_kept.valid[row])]
    places = locate(numbers, batch.tiles[row], CONFIG)
    return list(zip(places.image, places.tile, places.row, places.column, strict=True))


@jax.jit
def view_of(model: Mllama, inputs: Inputs) -> Any:
    return model.front(inputs).view


@jax.jit
def masked_model(model: Mllama, inputs: Inputs, allowed: jax.Array, prompt: jax.Array) -> jax.Array:
    """Logits of every row, computed layer by layer over all visual tokens.

    Columns that are not `allowed` [b, n] are masked: for rows of the prompt in all cross-attention
    layers but the first, for later rows in all.
    """
    decoder, visual = model.language_model, model.encode(inputs.images)
    batch, length = inputs.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    causal = jnp.tril(jnp.ones((length, length), bool))[None] & inputs.token_valid[:, None, :]
    real = visual.slots.valid[:, None, :]
    everywhere = visual.sees & real
    x = decoder.embed_tokens(inputs.tokens)
    is_first = True
    for layer in decoder.layers:
        if not isinstance(layer, CrossLayer):
            x, _, _ = layer(x, decoder._rope(positions), causal)
            continue
        left = allowed[:, None, :] | (prompt[:, :, None] & is_first)
        mask, fallback = everywhere & left, real & left
        some = mask.any(axis=2)
        if inputs.mask_mode == "hf":
            mask = jnp.where(some[:, :, None], mask, fallback)
        branches = Branches(attends=mask.any(axis=2), feeds=some)
        x = layer(x, layer.cross_attn.project(visual.features), mask, branches)
        is_first = False
    return model.lm_head(decoder.norm(x))


def oracle_columns(method: str, mode: str) -> np.ndarray:
    """The visual tokens [b, n] that the paper's selection keeps, from slow loops."""
    view = view_of(random_mllama(), packed(mode=mode).inputs)
    allowed = np.zeros(view.valid.shape, bool)
    for row in range(5):
        queries, keys, sees = shown(view, row)
        if method == "fastv":
            own = oracles.fastv(queries, keys, sees, keep=BUDGET)
        elif method == "k_norm":
            own = oracles.k_norm(keys, sees, keep=BUDGET)
        elif method == "uniform":
            own = np.flatnonzero(sees.any(axis=0)).tolist()
            if (found := len(own)) > BUDGET:
                own = [own[-(-(n + 1) * found // BUDGET) - 1] for n in range(BUDGET)]
        elif method == "random":  # nothing to derive: any selection will do
            kept = mixed(method, mode).selection.kept
            own = np.asarray(kept.indices[row])[np.asarray(kept.valid[row])].tolist()
        else:
            options = {
                "trimmed_llama": {},
                "trimmed_llama, union": {"per_head": 2},
                "trimmed_llama, ratio": {"k_ratio": "0.1"},
            }[method]
            own = oracles.trimmed_llama(queries, keys, sees, capacity=BUDGET, **options).kept
        allowed[row, own] = True
    return allowed


def last_rows(logits: jax.Array, inputs: Inputs) -> np.ndarray:
    last = np.asarray(inputs.token_valid).sum(axis=1) - 1
    return np.asarray(logits)[np.arange(len(last)), last]
