"""K-norm against slow loops, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Attention, Site, View
from catp_jax.pruning.k_norm import KNorm
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import (
    cache_view,
    kept,
    random_view,
    run,
    shown,
    view_of_weights,
    with_attention,
)


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


@pytest.mark.parametrize("keep", [1, 4, 12])
def test_in_a_cache_each_head_keeps_its_own(keep: int):
    view = cache_view(1)
    chosen = run(KNorm(keep=keep, site=Site.CACHE), view)[0].tokens
    for sample in range(3):
        _, keys, _ = shown(view, sample)
        valid, numbers = np.asarray(view.valid[sample]), np.asarray(view.numbers[sample])
        visual = np.flatnonzero(valid & (numbers >= 0)).tolist()
        text = np.flatnonzero(valid & (numbers < 0)).tolist()
        for head in range(3):
            own = oracles.k_norm_of_head(keys, visual, head=head, keep=keep)
            assert kept(chosen, sample, head) == [*own, *text]


def test_in_a_cache_a_sample_may_keep_fewer():
    limit = jnp.asarray([1, 2, 9], jnp.int32)
    chosen = run(KNorm(keep=4, site=Site.CACHE, limit=limit), cache_view())[0].tokens
    text = np.asarray(cache_view().valid)[:, 9:].sum(axis=1)
    assert (chosen.valid.sum(axis=2) - text[:, None]).tolist() == [[1] * 3, [2] * 3, [4] * 3]
