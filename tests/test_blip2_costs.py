"""Evidence that nobody reads costs nothing, and a shorter sequence costs what a shorter one does.

FLOPs are the compiler's own count (`cost_analysis`) of whole compiled prefills, so that what is
thrown away by it is not counted.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from catp_jax.contract import Keep, Room
from catp_jax.generation import generate as programs
from catp_jax.models import caching, qformer, t5, vit
from catp_jax.models.blip2 import Blip2, Blip2Inputs
from catp_jax.pruning import CATP, L2Norm, Position, SelfAttention
from catp_jax.struct import replace
from tests.blip2_methods import AT_ENTRY, fastv
from tests.random_blip2 import (
    CROSS_LAYERS,
    OPT,
    QFORMER,
    QUERIES,
    VISION,
    Kind,
    packed,
    random_blip2,
)
from tests.test_costs import equations, flops

BATCH, ROWS, KEEP = 4, 16, 3
HEADS, CHANNELS = QFORMER.num_attention_heads, QFORMER.hidden_size // QFORMER.num_attention_heads
IMAGE_TOKENS = VISION.tokens
# queries · keys of one cross-attention layer: a multiply and an add for each channel
PRODUCT = BATCH * QUERIES * IMAGE_TOKENS * HEADS * CHANNELS * 2
# who beats whom: every pair of queries in every head and column; softmax: every weight
PAIRS = BATCH * QUERIES**2 * IMAGE_TOKENS * HEADS
WEIGHTS = BATCH * QUERIES * IMAGE_TOKENS * HEADS


@functools.cache
def prefill_flops(kind: Kind, *pruners: Any) -> float:
    def run(model: Blip2, inputs: Blip2Inputs) -> Any:
        out = programs.prefill.__wrapped__(model, pruners, inputs, new_slots=0)
        return out.logits, out.cache, out.selection.kept

    return flops(run, random_blip2(kind), packed().inputs)


@functools.cache
def gather_flops(kind: Kind, keep: int) -> float:
    """A prefill that keeps entries somebody else chose."""

    def run(model: Blip2, inputs: Blip2Inputs, kept: Keep) -> Any:
        front = replace(model.front(inputs), view=None)
        return model.back(front, programs.Selector((), model.sites, chosen=kept), Room(new=0))

    indices = jnp.broadcast_to(jnp.arange(keep, dtype=jnp.int32), (BATCH, keep))
    kept = Keep(indices=indices, valid=jnp.ones((BATCH, keep), bool))
    return flops(run, random_blip2(kind), packed().inputs, kept)


def extra(pruner: Any) -> float:
    return prefill_flops("opt", pruner) - gather_flops("opt", KEEP)


@pytest.mark.parametrize("pruner", [Position(keep=KEEP), L2Norm(keep=KEEP)])
def test_methods_that_read_no_evidence_cost_a_gather(pruner: Any):
    # norms and a sort of seven numbers
    assert extra(pruner) < BATCH * QUERIES * (2 * QFORMER.hidden_size + 60)
    assert extra(pruner) < 0.002 * prefill_flops("opt")


def test_catp_costs_the_weights_of_one_layer_and_the_vote():
    least, most = PRODUCT + PAIRS, PRODUCT + 15 * WEIGHTS + 8 * PAIRS
    for layers in ("last", "first"):
        assert least <= extra(CATP(keep=KEEP, layers=layers)) <= most


def test_catp_over_all_layers_costs_each_once():
    one, every = extra(CATP(keep=KEEP)), extra(CATP(keep=KEEP, layers="all"))
    assert 0.9 * CROSS_LAYERS * one < every < 1.1 * CROSS_LAYERS * one


def test_image_weights_cost_one_layer_of_the_image_encoder():
    product = BATCH * IMAGE_TOKENS**2 * VISION.hidden_size * 2
    more = extra(CATP(keep=KEEP, image_weights=True)) - extra(CATP(keep=KEEP))
    weights = BATCH * IMAGE_TOKENS**2 * VISION.num_attention_heads
    assert product <= more <= product + 15 * weights + 4 * WEIGHTS + 4 * PAIRS


def opt_cost(tokens: int, layers: int) -> int:
    """Multiplications and additions of so many of OPT's layers, the products alone."""
    width = OPT.hidden_size
    return BATCH * layers * (tokens * 2 * (4 * width**2 + 2 * width * OPT.ffn_dim))


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_language_model_costs_less_for_every_query_that_goes(kind: Kind):
    costs = [gather_flops(kind, keep) for keep in (2, 4, 6)]
    assert costs[0] < costs[1] < costs[2]
    # attention is quadratic, so that the later ones cost a little more
    one, two = costs[1] - costs[0], costs[2] - costs[1]
    assert one <= two <= 1.1 * one
    if kind == "opt":
        assert one >= opt_cost(2, OPT.num_hidden_layers)


def test_pruning_between_layers_saves_in_the_later_ones():
    early, late = (prefill_flops("opt", fastv(KEEP, layer)) for layer in (1, 2))
    assert early < late < prefill_flops("opt")
    assert late - early >= 0.9 * opt_cost(QUERIES - KEEP, 1)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_pruning_costs_less_than_not_pruning(kind: Kind):
    assert prefill_flops(kind, Position(keep=KEEP)) < 0.95 * prefill_flops(kind)


def test_only_the_layers_that_vote_are_computed_beside_the_models_own(monkeypatch):
    for module in (vit, qformer, caching, t5):
        monkeypatch.setattr(module, "attend", lambda queries, *rest, **options: queries)

    def weights(pruner: Any) -> list[tuple[int, ...]]:
        """Shapes of all exponentials in the traced program that survive."""

        def run(model: Blip2, inputs: Blip2Inputs) -> Any:
            out = programs.prefill.__wrapped__(model, (pruner,), inputs, new_slots=0)
            return out.logits

        jaxpr = jax.make_jaxpr(run)(random_blip2("opt"), packed().inputs).jaxpr
        return [
            variable.aval.shape
            for equation in equations(jaxpr)
            if equation.primitive.name == "exp"
            for variable in equation.outvars
        ]

    voters = (BATCH, HEADS, QUERIES, IMAGE_TOKENS)
    image = (BATCH, VISION.num_attention_heads, IMAGE_TOKENS, IMAGE_TOKENS)
    length = QUERIES + ROWS
    assert weights(CATP(keep=KEEP)) == [voters]
    assert weights(CATP(keep=KEEP, layers="all")) == [voters] * CROSS_LAYERS
    assert weights(CATP(keep=KEEP, weights=jnp.ones(CROSS_LAYERS))) == [voters] * CROSS_LAYERS
    assert sorted(weights(CATP(keep=KEEP, image_weights=True))) == sorted([voters, image])
    own = (BATCH, HEADS, QUERIES, QUERIES)
    assert weights(SelfAttention(keep=KEEP)) == [own] * QFORMER.num_hidden_layers
    assert weights(fastv(KEEP)) == [(BATCH, OPT.num_attention_heads, 1, length)]
    for name in ("l2", "position", "random"):
        assert weights(AT_ENTRY[name](KEEP)) == []
