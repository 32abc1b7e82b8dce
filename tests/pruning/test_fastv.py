"""FastV's last-row score against slow loops, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site, View
from catp_jax.pruning import make
from catp_jax.pruning.fastv import FastV
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import kept, random_view, run, shown, view_of_weights, with_attention

#                    head 0                  head 1
HAND = [
    [[0.90, 0.04, 0.03, 0.03], [0.90, 0.04, 0.03, 0.03]],
    [[0.10, 0.20, 0.60, 0.10], [0.30, 0.30, 0.10, 0.30]],
]
# last row, mean of the heads: .20 .25 .35 .20


def select(keep: int, view: View):
    return run(FastV(keep=keep), view)[0].tokens


def test_hand_made_only_the_last_row_counts():
    assert kept(select(1, view_of_weights(HAND)), 0) == [2]
    assert kept(select(2, view_of_weights(HAND)), 0) == [1, 2]


def test_hand_made_last_row_is_the_last_that_sees_the_image():
    view = view_of_weights([*HAND, [[0.01, 0.01, 0.01, 0.97]] * 2])
    assert kept(select(1, view), 0) == [3]
    padded = replace(view, sees=view.sees.at[:, 2].set(False))
    assert kept(select(1, padded), 0) == [2]


def test_equal_scores_go_to_the_earlier_token():
    view = view_of_weights([[[0.25, 0.25, 0.25, 0.25]]])
    assert kept(select(2, view), 0) == [0, 1]


@pytest.mark.parametrize("keep", [1, 4, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_selection_is_the_oracles(keep: int, seed: int):
    view = random_view(seed)
    chosen = select(keep, view)
    for sample in range(5):
        assert kept(chosen, sample) == oracles.fastv(*shown(view, sample), keep=keep)


def test_earlier_rows_do_not_matter():
    view = random_view()
    last = np.asarray(view.sees.any(axis=2)).cumsum(axis=1)
    is_last = jnp.asarray(last == last[:, -1:])[:, :, None, None]
    queries = view.attention.queries
    changed = with_attention(view, queries=jnp.where(is_last, queries, -queries))
    for sample in range(5):
        assert kept(select(4, view), sample) == kept(select(4, changed), sample)


@pytest.mark.parametrize("keep", [1, 4, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_papers_text_counts_all_rows(keep: int, seed: int):
    view = random_view(seed)
    chosen = run(FastV(keep=keep, rows="all"), view)[0].tokens
    for sample in range(5):
        expected = oracles.fastv_of_all_rows(*shown(view, sample), keep=keep)
        assert kept(chosen, sample) == expected


def test_hand_made_all_rows_count():
    # sums over both heads: 2.20, .58, .76, .46
    assert kept(run(FastV(keep=2, rows="all"), view_of_weights(HAND))[0].tokens, 0) == [0, 2]
    with pytest.raises(ValueError, match="fastv:rows takes last, or all, got 'first'"):
        make("fastv:rows=first", 2, frozenset({Site.CROSS}))
