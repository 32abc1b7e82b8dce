"""The CATP paper's baselines against slow loops and by hand, and what all methods at the entry do:
L2 norm, self-attention, position, random.
"""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Keep, Site, View
from catp_jax.pruning import CATP, FastV, L2Norm, Position, Random, SelfAttention
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import (
    QUERIES,
    SELF_LAYERS,
    attention_of,
    entry,
    entry_view,
    kept,
    prune,
    random_view,
    run,
    sample_of,
)

METHODS = {
    "catp": lambda keep: CATP(keep=keep),
    "catp, image weights": lambda keep: CATP(keep=keep, layers="all", image_weights=True),
    "l2": lambda keep: L2Norm(keep=keep),
    "self_attention": lambda keep: SelfAttention(keep=keep),
    "position": lambda keep: Position(keep=keep),
    "random": lambda keep: Random(keep=keep, site=Site.ENTRY, seed=5),
}


def select(pruner, view: View) -> Keep:
    return run(pruner, view)[0].tokens


# --- L2 norm ----------------------------------------------------------------------------------


def hand_made(tokens: list[list[float]], *among: list[list[list[float]]]) -> View:
    number = len(tokens)
    even = attention_of([[[1 / number] * number] * number])
    layers = [attention_of(layer) for layer in among] or [even]
    return entry(np.asarray([tokens]), [even], layers, even)


def test_hand_made_l2_keeps_the_longest():
    view = hand_made([[3, 4], [0, 6], [5, 0], [1, 1]])  # 5, 6, 5, 1.4
    assert kept(select(L2Norm(keep=1), view), 0) == [1]
    assert kept(select(L2Norm(keep=2), view), 0) == [0, 1]  # 0 and 2 are equal
    assert kept(select(L2Norm(keep=3), view), 0) == [0, 1, 2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_l2_is_the_oracles(seed: int):
    view = entry_view(seed)
    chosen = select(L2Norm(keep=3), view)
    for sample in range(3):
        score = oracles.l2(np.asarray(view.tokens[sample]))
        assert kept(chosen, sample) == oracles.best(score, 3)


def test_l2_of_a_bfloat16_model_is_taken_in_float32():
    # in bfloat16 the sums of squares would be equal
    tokens = np.zeros((1, 2, 300))
    tokens[0, 0, 0], tokens[0, 1] = 16.0, 16.0 / np.sqrt(300)
    tokens[0, 1, 0] += 0.2
    view = entry_view(0, batch=1)
    view = replace(
        view,
        tokens=jnp.asarray(tokens, jnp.bfloat16),
        num_visual=2,
        numbers=view.numbers[:, :2],
        valid=view.valid[:, :2],
        sees=view.sees[:, :, :2],
    )
    exact = [float(np.linalg.norm(np.asarray(x, np.float64))) for x in view.tokens[0]]
    assert kept(select(L2Norm(keep=1), view), 0) == [int(np.argmax(exact))]


# --- self-attention ---------------------------------------------------------------------------


def test_hand_made_self_attention_counts_what_a_query_receives_not_what_it_gives():
    look = [[[0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.1, 0.7, 0.2]]]  # received .4 1.7 .9
    view = hand_made([[1, 0]] * 3, look)
    assert kept(select(SelfAttention(keep=1), view), 0) == [1]
    assert kept(select(SelfAttention(keep=2), view), 0) == [1, 2]


def test_hand_made_self_attention_sums_layers_and_heads():
    one = [[[0.6, 0.2, 0.2]] * 3, [[0.2, 0.2, 0.6]] * 3]  # two heads: 2.4 1.2 2.4
    other = [[[0.2, 0.2, 0.6]] * 3]  # .6 .6 1.8
    assert kept(select(SelfAttention(keep=1), hand_made([[1, 0]] * 3, one)), 0) == [0]
    assert kept(select(SelfAttention(keep=1), hand_made([[1, 0]] * 3, one, other)), 0) == [2]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_self_attention_is_the_oracles_over_all_layers(seed: int):
    view = entry_view(seed)
    assert len(view.evidence.among) == SELF_LAYERS
    chosen = select(SelfAttention(keep=3), view)
    for sample in range(3):
        score = sum(oracles.received(*sample_of(layer, sample)) for layer in view.evidence.among)
        assert kept(chosen, sample) == oracles.best(score.tolist(), 3)


# --- position and random ----------------------------------------------------------------------


def test_position_keeps_the_first():
    chosen = select(Position(keep=3), entry_view())
    assert [kept(chosen, sample) for sample in range(3)] == [[0, 1, 2]] * 3


def test_position_goes_by_the_numbers_from_before_any_pruning():
    view = entry_view(2)
    keep, _ = prune((L2Norm(keep=4), Position(keep=2)), view)
    for sample in range(3):
        left = oracles.best(oracles.l2(np.asarray(view.tokens[sample])), 4)
        assert kept(keep, sample) == left[:2]


def test_random_at_the_entry_draws_by_number():
    view = entry_view(2)
    whole = select(Random(keep=3, site=Site.ENTRY, seed=5), view)
    assert len({tuple(kept(whole, sample)) for sample in range(3)}) == 1  # one set for all
    other = select(Random(keep=3, site=Site.ENTRY, seed=6), view)
    assert kept(whole, 0) != kept(other, 0)


# --- all methods at the entry -----------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [QUERIES, QUERIES + 9])
def test_a_full_budget_keeps_everything_in_place(method: str, keep: int):
    chosen = select(METHODS[method](keep), entry_view())
    assert chosen.indices.tolist() == [list(range(QUERIES))] * 3
    assert chosen.valid.all()


@pytest.mark.parametrize("method", METHODS)
def test_the_count_is_exact_in_order_and_a_smaller_budget_keeps_a_part(method: str):
    view = entry_view(6)
    chosen = {keep: select(METHODS[method](keep), view) for keep in (2, 5)}
    for sample in range(3):
        few, many = (kept(chosen[keep], sample) for keep in (2, 5))
        assert (len(few), len(many)) == (2, 5)
        assert many == sorted(set(many))
        assert set(few) < set(many)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_keeps_the_same_whoever_its_neighbours_are(method: str):
    view = entry_view(7)
    whole = select(METHODS[method](3), view)
    for order in (jnp.asarray([2, 0, 1]), jnp.asarray([1])):
        part = select(METHODS[method](3), jax.tree.map(operator.itemgetter(order), view))
        assert [kept(part, place) for place in range(len(order))] == [
            kept(whole, int(sample)) for sample in order
        ]


@pytest.mark.parametrize("method", METHODS)
def test_a_limit_leaves_each_sample_what_a_smaller_budget_would(method: str):
    view = entry_view(8)
    limit = [1, 4, 9]
    keep = select(replace(METHODS[method](5), limit=jnp.asarray(limit, jnp.int32)), view)
    assert keep.indices.shape == (3, 5)
    for sample, own in enumerate(limit):
        smaller = select(METHODS[method](min(own, 5)), view)
        assert kept(keep, sample) == kept(smaller, sample)


@pytest.mark.parametrize("method", METHODS)
def test_entries_that_are_no_tokens_are_never_kept(method: str):
    view = entry_view(9)
    valid = view.valid.at[0, 2].set(False).at[0, 5].set(False).at[1].set(False)
    keep = select(METHODS[method](6), replace(view, valid=valid))
    assert kept(keep, 0) == [0, 1, 3, 4, 6]
    assert kept(keep, 1) == []
    assert len(kept(keep, 2)) == 6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [-1, 0])
def test_a_budget_that_is_no_count_is_refused(method: str, keep: int):
    # -1 would be all but one
    with pytest.raises(ValueError, match=f"keep at least 1 visual token, got keep={keep}"):
        run(METHODS[method](keep), entry_view())


def test_methods_that_read_a_q_former_are_refused_where_there_is_none():
    blind = replace(entry_view(), evidence=None)
    with pytest.raises(ValueError, match="SelfAttention reads a Q-Former's attention"):
        run(SelfAttention(keep=2), blind)
    with pytest.raises(ValueError, match="SelfAttention reads a Q-Former's attention"):
        run(SelfAttention(keep=2), random_view())
    for pruner in (L2Norm(keep=2), Position(keep=2)):  # those that need none
        assert select(pruner, blind).indices.shape == (3, 2)


def test_a_method_that_reads_attention_is_refused_at_the_entry():
    with pytest.raises(ValueError, match="no attention over visual tokens at site ENTRY"):
        run(FastV(keep=2, site=Site.ENTRY), entry_view())
