"""Every method for BLIP-2 on the tiny models: runs that tests share, and references."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catp_jax.contract import Keep, Reduction, Room, Site, View, run_pruners
from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models.blip2 import Blip2, Blip2Inputs
from catp_jax.pruning import (
    CATP,
    FastV,
    L2Norm,
    NearestCentroid,
    Pool,
    Position,
    Random,
    SelfAttention,
    Uniform,
)
from catp_jax.readers.packing import Packed
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.random_blip2 import CROSS_LAYERS, NEVER, PAD, QUERIES, Kind, packed, random_blip2

NEW = 5  # tokens to generate
BUDGET = 3  # of 7 queries
LAYER = 2  # where FastV works; the tiny OPT has layers 0 to 2

AT_ENTRY = {
    "catp": lambda keep: CATP(keep=keep),
    "catp, first": lambda keep: CATP(keep=keep, layers="first"),
    "catp, weights": lambda keep: CATP(keep=keep, weights=jnp.linspace(1.0, 0.4, CROSS_LAYERS)),
    "catp, image weights": lambda keep: CATP(keep=keep, image_weights=True),
    "l2": lambda keep: L2Norm(keep=keep),
    "self_attention": lambda keep: SelfAttention(keep=keep),
    "position": lambda keep: Position(keep=keep),
    "random": lambda keep: Random(keep=keep, site=Site.ENTRY, seed=3),
    "uniform": lambda keep: Uniform(keep=keep, site=Site.ENTRY),
    "nearest_centroid": lambda keep: NearestCentroid(keep=keep, site=Site.ENTRY),
    "pool": lambda keep: Pool(keep=keep, site=Site.ENTRY),
}


def fastv(keep: int, layer: int = LAYER) -> FastV:
    return FastV(keep=keep, site=Site.LAYER, layer=layer)


def generate(
    kind: Kind, pruners: tuple[Any, ...], batch: Packed | Blip2Inputs, new: int = NEW, **choice: Any
) -> programs.Generated:
    """One program that does it all."""
    inputs = batch.inputs if isinstance(batch, Packed) else batch
    return programs.generate(
        random_blip2(kind),
        pruners,
        inputs,
        sampling(inputs.tokens.shape[0], **choice),
        Stop(ends=NEVER, pad=PAD, max_new_tokens=new),
    )


@functools.cache
def unpruned(kind: Kind) -> programs.Generated:
    return generate(kind, (), packed())


@functools.cache
def pruned_inside(keep: int = BUDGET) -> programs.Generated:
    """OPT with FastV."""
    return generate("opt", (fastv(keep),), packed())


@jax.jit
def choose(model: Blip2, inputs: Blip2Inputs, pruners: Any) -> tuple[Any, dict[str, Keep]]:
    """The prefill up to the selection, and every method's selection."""
    front = model.front(inputs)
    keeps = {name: run_pruners((pruner,), front.view)[0].tokens for name, pruner in pruners.items()}
    return replace(front, view=None), keeps


def at_entry(
    kind: Kind, batch: Packed | Blip2Inputs, keep: int = BUDGET
) -> dict[str, programs.Generated]:
    """What `generate` gives for each method at the entry, by two programs: the selections differ in
    numbers, not in shapes.
    """
    inputs = batch.inputs if isinstance(batch, Packed) else batch
    pruners = {name: make(keep) for name, make in AT_ENTRY.items()}
    front, keeps = choose(random_blip2(kind), inputs, pruners)
    return {
        name: programs.generate_from(
            random_blip2(kind),
            (),
            front,
            kept,
            programs.Selection(kept=kept, cached={}, states=()),
            sampling(inputs.tokens.shape[0]),
            Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW),
        )
        for name, kept in keeps.items()
    }


@functools.cache
def whole(kind: Kind) -> dict[str, programs.Generated]:
    """Every method at the entry on the whole batch."""
    return at_entry(kind, packed())


def difference(one: Any, other: Any) -> float:
    """max |Δ| over the largest magnitude."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())


def own(keep: Keep, row: int) -> list[int]:
    """The visual tokens that a prompt keeps."""
    return np.asarray(keep.indices[row])[np.asarray(keep.valid[row])].tolist()


def left_padded(inputs: Blip2Inputs) -> Blip2Inputs:
    """The same prompts, padded on the left."""
    valid = np.asarray(inputs.token_valid)
    padding = (~valid).sum(axis=1)
    assert len(set(padding.tolist())) > 1
    roll = [np.roll(row, size) for row, size in zip(inputs.tokens, padding, strict=True)]
    return replace(
        inputs, tokens=jnp.asarray(np.stack(roll)), token_valid=jnp.asarray(valid[:, ::-1])
    )


# --- references -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="layer")
def layer_view(model: Blip2, inputs: Blip2Inputs, layer: int) -> View:
    """What OPT shows in front of a layer."""
    seen = {}

    def select(view: View) -> Reduction:
        if view.site is Site.LAYER:
            seen[view.layer] = view
        return Reduction()

    model.back(model.front(inputs), select, Room(new=1))
    return seen[layer]


def last_row_scores(view: View, sample: int) -> list[float]:
    """FastV's score of each visual token in slow loops: the last row's weights, mean of heads."""
    queries, keys, sees = (
        np.asarray(array[sample])
        for array in (view.attention.queries, view.attention.keys, view.sees)
    )
    last = max(row for row in range(len(sees)) if sees[row].any())
    heads = queries.shape[1]
    rows = [oracles.attention_row(queries, keys, sees, last, head) for head in range(heads)]
    return np.mean(rows, axis=0)[:QUERIES].tolist()


@jax.jit
def masked_opt(model: Blip2, inputs: Blip2Inputs, allowed: jax.Array, first: int) -> jax.Array:
    """Logits of every row, layer by layer over the whole sequence: from layer `first` on, the
    visual tokens that are not `allowed` [b, q] are masked for every row.
    """
    language, (visual, _) = model.language_model, model.encode(inputs.pixels)
    visual = model.language_projection(visual[inputs.image_index])
    x = jnp.concatenate([visual, language.embed(inputs.tokens)], axis=1)
    batch, length = x.shape[:2]
    real = jnp.concatenate([jnp.ones((batch, QUERIES), bool), inputs.token_valid], axis=1)
    left = jnp.concatenate([allowed, inputs.token_valid], axis=1)
    place = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    x = x + language.model.decoder.embed_positions(place + 2)
    earlier = jnp.tril(jnp.ones((length, length), bool))[None]
    for number, layer in enumerate(language.model.decoder.layers):
        seen = jnp.where(number >= first, left, real)  # one program, whatever the layer
        x, _, _ = layer(x, earlier & seen[:, None])
    return language.logits(x)
