"""Evidence that nobody reads costs nothing, and pruning saves what it claims.

FLOPs are the compiler's own count (`cost_analysis`) of whole compiled prefills, so that what is
thrown away by it is not counted.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Keep, Room
from catp_jax.generation import generate as programs
from catp_jax.models import cross_decoder, tiled_vit
from catp_jax.models.mllama import Inputs, Mllama
from catp_jax.pruning import FastV, KNorm, Pool, Random, TrimmedLlama
from catp_jax.readers.mllama_packing import pack
from catp_jax.struct import replace
from tests.random_mllama import CONFIG, IMAGE, PER_TILE, TEXT, picture, random_mllama

BATCH, ROWS, COLUMNS, KEEP = 2, 96, 4 * PER_TILE, 8
WIDTH, HEADS, KV_HEADS, CHANNELS = (
    TEXT.hidden_size,
    TEXT.num_attention_heads,
    TEXT.num_key_value_heads,
    TEXT.head_dim,
)
# queries · keys of one layer: a multiply and an add for each channel
SCORE_PRODUCT = BATCH * ROWS * COLUMNS * HEADS * CHANNELS * 2


@functools.cache
def inputs() -> Inputs:
    prompts = [(1, IMAGE, *range(1, 1 + size), *range(1, 46)) for size in (45, 40)]
    batch = pack(prompts, [[picture(4, 1)], [picture(4, 2)]], CONFIG).inputs
    assert batch.tokens.shape == (BATCH, ROWS)
    return batch


def flops(run: Any, *arguments: Any) -> float:
    return jax.jit(run).lower(*arguments).compile().cost_analysis()["flops"]


@functools.cache
def prefill_flops(pruner: Any) -> float:
    def run(model: Mllama, inputs: Inputs) -> Any:
        out = programs.prefill.__wrapped__(
            model, () if pruner is None else (pruner,), inputs, new_slots=0
        )
        return out.logits, out.cache, out.selection.kept

    return flops(run, random_mllama(), inputs())


@functools.cache
def gather_flops(keep: int) -> float:
    """A prefill that keeps entries somebody else chose."""

    def run(model: Mllama, inputs: Inputs, kept: Keep) -> Any:
        front = replace(model.front(inputs), view=None)
        return model.back(front, programs.Selector((), model.sites, chosen=kept), Room(new=0))

    indices = jnp.broadcast_to(jnp.arange(keep, dtype=jnp.int32), (BATCH, keep))
    kept = Keep(indices=indices, valid=jnp.ones((BATCH, keep), bool))
    return flops(run, random_mllama(), inputs(), kept)


def test_the_count_is_of_this_size():
    # one layer's score product is a visible part of what is counted
    assert 0.005 < SCORE_PRODUCT / prefill_flops(None) < 0.5


def test_random_costs_a_gather():
    # drawing numbers and sorting them: some hundred operations a token, no product with queries
    assert prefill_flops(Random(keep=KEEP)) - gather_flops(KEEP) < 0.15 * SCORE_PRODUCT


def test_k_norm_reads_no_queries():
    norms = BATCH * COLUMNS * KV_HEADS * (2 * CHANNELS + 10)
    extra = prefill_flops(KNorm(keep=KEEP)) - gather_flops(KEEP)
    assert extra < norms + 0.1 * SCORE_PRODUCT


def test_fastv_computes_one_row():
    extra = prefill_flops(FastV(keep=KEEP)) - gather_flops(KEEP)
    assert SCORE_PRODUCT / ROWS <= extra < 0.2 * SCORE_PRODUCT


def test_trimmed_llama_computes_the_weights_of_one_layer():
    extra = prefill_flops(TrimmedLlama(keep=KEEP)) - gather_flops(KEEP)
    # the product, and about ten operations a weight for softmax, mask and sums
    weights = BATCH * HEADS * ROWS * COLUMNS
    assert SCORE_PRODUCT <= extra <= SCORE_PRODUCT + 15 * weights


def test_pooling_costs_the_means_and_their_keys_in_the_first_layer():
    extra = prefill_flops(Pool(keep=KEEP)) - gather_flops(KEEP)
    means = BATCH * KEEP * COLUMNS * WIDTH * 2
    made = BATCH * KEEP * WIDTH * 2 * KV_HEADS * CHANNELS * 2
    # where patches lie, and a sort: some hundred operations a token, whatever its width
    assert means + made <= extra <= means + made + 500 * BATCH * COLUMNS


def test_keeping_everything_at_random_is_within_a_hair_of_not_pruning():
    full, unpruned = prefill_flops(Random(keep=COLUMNS)), prefill_flops(None)
    assert abs(full - unpruned) < 0.01 * unpruned


def test_later_layers_cost_in_proportion_to_what_is_kept():
    # the tiny model has one cross-attention layer after the first
    per_token = BATCH * (
        2 * WIDTH * 2 * KV_HEADS * CHANNELS  # keys and values
        + 2 * ROWS * 2 * HEADS * CHANNELS  # attention: queries · keys, weights · values
    )
    costs = {keep: gather_flops(keep) for keep in (8, 16, 32)}
    one, two = costs[16] - costs[8], costs[32] - costs[16]
    # beside the products there are some operations on every weight (softmax) and key (norm)
    assert 8 * per_token <= one <= 1.5 * 8 * per_token
    np.testing.assert_allclose(two, 2 * one, rtol=0.1)


@pytest.mark.parametrize("method", [FastV, KNorm, Random])
def test_pruning_costs_less_than_not_pruning(method: Any):
    # Trimmed Llama's own weights cost what this model's single later layer saves.
    assert prefill_flops(method(keep=KEEP)) < 0.97 * prefill_flops(None)


@pytest.mark.parametrize("method", [KNorm, Pool])
@pytest.mark.parametrize("keep", [KEEP, 3])
def test_the_cache_has_as_many_slots_as_are_kept(method: Any, keep: int):
    out = jax.eval_shape(
        lambda model, inputs: programs.prefill.__wrapped__(
            model, (method(keep=keep),), inputs, new_slots=5
        ),
        random_mllama(),
        inputs(),
    )
    assert len(out.cache.cross[0].blocks) == len(TEXT.cross_attention_layers)
    (text,), (cross,), tail = out.cache.text, out.cache.cross, out.cache.tail
    depth = TEXT.num_hidden_layers - len(TEXT.cross_attention_layers)
    assert len(text.blocks) == len(tail.blocks) == depth
    for part, slots in ((text, ROWS), (tail, 5), (cross, keep)):
        for layer in part.blocks:
            assert layer.keys.shape == layer.values.shape == (BATCH, KV_HEADS, slots, CHANNELS)
    assert cross.numbers.shape == cross.valid.shape == (BATCH, keep)


def test_only_trimmed_llama_computes_attention_weights_beside_the_models_own(monkeypatch):
    for module, name in ((cross_decoder, "attend"), (tiled_vit, "attend_padded")):
        monkeypatch.setattr(module, name, lambda queries, keys, values, seen: queries)

    def weights(pruner: Any) -> list[tuple[int, ...]]:
        """Shapes of all exponentials over visual tokens in the traced program."""

        def run(model: Mllama, inputs: Inputs) -> Any:
            return programs.prefill.__wrapped__(model, (pruner,), inputs, new_slots=0).logits

        return [
            variable.aval.shape
            for equation in equations(jax.make_jaxpr(run)(random_mllama(), inputs()).jaxpr)
            if equation.primitive.name == "exp"
            for variable in equation.outvars
            if COLUMNS in variable.aval.shape
        ]

    assert weights(TrimmedLlama(keep=KEEP)) == [(BATCH, HEADS, ROWS, COLUMNS)]
    assert weights(FastV(keep=KEEP)) == [(BATCH, HEADS, 1, COLUMNS)]
    assert weights(KNorm(keep=KEEP)) == []
    assert weights(Random(keep=KEEP)) == []


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, nested ones too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                nested = getattr(inner, "jaxpr", inner)
                if hasattr(nested, "eqns"):
                    yield from equations(nested)
