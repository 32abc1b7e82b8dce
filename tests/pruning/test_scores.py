"""The shared scores: attention weights, ranks, choosing the best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import View
from catp_jax.pruning import scores
from tests.pruning import oracles
from tests.pruning.views import kept, random_view, shown


@pytest.fixture(scope="module")
def view():
    return random_view(seed=7, rows=11)


def evidence(view: View) -> tuple[jax.Array, jax.Array, jax.Array]:
    return view.attention.queries, view.attention.keys, view.sees


def test_attention_is_the_oracles(view):
    weights = np.asarray(scores.attention(*evidence(view)))
    for sample in range(5):
        for head in range(6):
            for row in range(11):
                expected = oracles.attention_row(*shown(view, sample), row, head)
                np.testing.assert_allclose(weights[sample, head, row], expected, atol=1e-6)


def test_attention_rows_sum_to_one_or_are_zero(view):
    total = np.asarray(scores.attention(*evidence(view))).sum(axis=-1)
    seeing = np.asarray(view.sees.any(axis=2))[:, None]
    np.testing.assert_allclose(total, np.broadcast_to(seeing, total.shape), atol=1e-6)


@pytest.mark.parametrize("rows_at_once", [1, 3, 4, 10, 11, 12])
def test_attention_received_does_not_depend_on_the_rows_taken_at_once(
    view, rows_at_once, monkeypatch
):
    whole = scores.attention(*evidence(view)).sum(axis=2)
    one_row = whole.size  # weights of one row
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", rows_at_once * one_row)
    np.testing.assert_allclose(scores.attention_received(*evidence(view)), whole, atol=2e-6)


def test_attention_received_in_passes_never_holds_all_rows(monkeypatch):
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", 4 * 5 * 6 * 17)
    view = random_view(rows=23, columns=17)
    jaxpr = str(jax.make_jaxpr(scores.attention_received)(*evidence(view)))
    assert "5,6,4,17" in jaxpr  # weights of four rows
    assert "5,6,23,17" not in jaxpr
    assert "5,6,24,17" not in jaxpr


@pytest.mark.parametrize("batch", [1, 16, 64])
def test_attention_received_holds_as_many_weights_whatever_the_batch(batch):
    queries = jax.ShapeDtypeStruct((batch, 512, 32, 16), jnp.float32)
    keys = jax.ShapeDtypeStruct((batch, 6432, 8, 16), jnp.float32)
    sees = jax.ShapeDtypeStruct((batch, 512, 6432), jnp.bool_)
    lowered = jax.jit(scores.attention_received).lower(queries, keys, sees)
    held = lowered.compile().memory_analysis().temp_size_in_bytes
    given = 4 * queries.size + 4 * keys.size + sees.size  # which may be padded and transposed
    assert held <= 4 * 4 * scores.LOGITS_AT_ONCE + 2 * given


def test_weights_are_float32_in_a_bfloat16_model(view):
    queries, keys, _ = evidence(view)
    queries, keys = queries.astype(jnp.bfloat16), keys.astype(jnp.bfloat16)
    weights = scores.attention(queries, keys, view.sees)
    assert weights.dtype == jnp.float32
    exact = scores.attention(
        queries.astype(jnp.float32), keys.astype(jnp.float32), view.sees
    )  # of the same rounded numbers
    np.testing.assert_allclose(weights, exact, atol=1e-5)


def test_rank_gives_the_highest_zero_and_equals_by_place():
    assert scores.rank(jnp.asarray([0.2, 0.9, 0.2, 0.5])).tolist() == [2, 0, 3, 1]


def test_keep_best_sorts_members_first_and_by_the_next_score_where_equal():
    member = jnp.asarray([[True, True, False, True, True]])
    first = jnp.asarray([[1, 2, 9, 2, 2]], jnp.int32)
    second = jnp.asarray([[0.0, 0.1, 0.0, 0.3, 0.1]])
    assert kept(scores.keep_best(2, member, first, second), 0) == [1, 3]
    assert kept(scores.keep_best(1, member, first, second), 0) == [3]
    assert kept(scores.keep_best(3, member, first, second), 0) == [1, 3, 4]
    assert kept(scores.keep_best(4, member, first, second), 0) == [0, 1, 3, 4]


def test_keep_best_puts_empty_entries_last_and_stops_at_the_axis():
    member = jnp.asarray([[False, True, False, True]])
    keep = scores.keep_best(9, member, jnp.asarray([[5.0, 1.0, 5.0, 2.0]]))
    assert keep.indices.shape == (1, 4)
    assert keep.valid.tolist() == [[True, True, False, False]]
    assert keep.indices[0, :2].tolist() == [1, 3]
    assert sorted(keep.indices[0].tolist()) == [0, 1, 2, 3]


def test_a_limit_leaves_each_sample_its_own_number_of_the_best():
    member = jnp.asarray([[True] * 5] * 3)
    score = jnp.asarray([[5, 1, 4, 2, 3]] * 3, jnp.int32)
    keep = scores.keep_best(4, member, score, limit=jnp.asarray([2, 4, 9]))
    assert [kept(keep, row) for row in range(3)] == [[0, 2], [0, 2, 3, 4], [0, 2, 3, 4]]
    assert keep.valid.tolist()[0] == [True, True, False, False]
