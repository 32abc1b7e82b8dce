"""K-norm against slow loops, and by hand."""

import jax.numpy as jnp
import pytest

from catp_jax.contract import Attention, View
from catp_jax.pruning.k_norm import KNorm
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import kept, random_view, run, shown, view_of_weights, with_attention


def select(keep: int, view: View):
    return run(KNorm(keep=keep), view)[0].tokens


def test_hand_made_the_shortest_keys_stay():
    # two key heads; norms per token (5, 1) (2, 2) (3, 3) (0, 4): means 3, 2, 3, 2
    keys = [[[3, 4], [1, 0]], [[0, 2], [2, 0]], [[3, 0], [0, 3]], [[0, 0], [0, 4]]]
    plain = view_of_weights([[[0.25] * 4, [0.25] * 4]])
    view = replace(
        plain,
        attention=Attention(queries=jnp.ones((1, 1, 2, 2)), keys=jnp.asarray([keys], jnp.float32)),
        values=jnp.asarray([keys], jnp.float32),
    )
    assert kept(select(2, view), 0) == [1, 3]
    assert kept(select(3, view), 0) == [0, 1, 3]  # 0 and 2 are equal; the earlier one
    assert kept(select(1, view), 0) == [1]


@pytest.mark.parametrize("keep", [1, 4, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_selection_is_the_oracles(keep: int, seed: int):
    view = random_view(seed)
    chosen = select(keep, view)
    for sample in range(5):
        _, keys, sees = shown(view, sample)
        assert kept(chosen, sample) == oracles.k_norm(keys, sees, keep=keep)


def test_queries_do_not_matter():
    view = random_view()
    changed = with_attention(view, queries=-3 * view.attention.queries)
    for sample in range(5):
        assert kept(select(4, view), sample) == kept(select(4, changed), sample)
