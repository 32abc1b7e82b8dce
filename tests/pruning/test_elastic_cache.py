"""Elastic Cache against slow loops, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site, Tiles, View
from catp_jax.pruning.elastic_cache import ElasticCache
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import cache_view, kept, random_view, run, shown, view_of_weights


def select(view: View, keep: int, **options):
    return run(ElasticCache(keep=keep, **options), view)[0].tokens


def visual_of(view: View, sample: int) -> list[int]:
    valid = np.asarray(view.valid[sample] & (view.numbers[sample] >= 0))
    return np.flatnonzero(valid).tolist()


def check(view: View, keep: int, per_tile: int | None = None) -> None:
    """Anchors, buckets and means are the oracle's; text is what it was."""
    chosen = select(view, keep)
    keys = np.asarray(chosen.apply(view.attention.keys))
    for sample in range(view.valid.shape[0]):
        queries, own, sees = shown(view, sample)
        visual = visual_of(view, sample)
        buckets = oracles.elastic_cache(
            queries, own, sees, visual=visual, keep=keep, per_tile=per_tile
        )
        text = [n for n in np.flatnonzero(view.valid[sample]).tolist() if n not in visual]
        expected = [*buckets.values(), *([n] for n in text)]
        assert kept(chosen, sample) == [*buckets, *text]
        slots = np.flatnonzero(chosen.valid[sample])
        for slot, members in zip(slots, expected, strict=True):
            np.testing.assert_allclose(
                keys[sample, slot], own[members].mean(axis=0), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("keep", [1, 4, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_anchors_and_means_are_the_oracles(keep: int, seed: int):
    check(cache_view(seed), keep)
    check(replace(random_view(seed), site=Site.CACHE), keep)


@pytest.mark.parametrize("keep", [1, 3, 6])
def test_buckets_end_with_their_tile(keep: int):
    view = replace(random_view(2, columns=12), site=Site.CACHE)
    check(replace(view, tiles=Tiles(rows=1, columns=3, others=1)), keep, per_tile=4)


#       anchors     ▲              ▲
WEIGHTS = [[[0.1, 0.7, 0.2, 0.15, 0.12, 0.6, 0.1]]]


def test_hand_made_a_token_goes_to_the_nearest_anchor_and_between_two_to_the_earlier():
    chosen = select(view_of_weights(WEIGHTS), 2)
    assert kept(chosen, 0) == [1, 5]
    assert chosen.groups[0].tolist() == [0, 0, 0, 0, 1, 1, 1]  # 3 is as near to both


def test_eviction_drops_what_is_no_anchor():
    view = view_of_weights(WEIGHTS)
    assert kept(select(view, 2, evicts=True), 0) == [1, 5]
    np.testing.assert_array_equal(
        select(view, 2, evicts=True).apply(view.values), view.values[:, jnp.asarray([1, 5])]
    )


def test_fewer_anchors_for_a_sample_that_may_keep_fewer():
    chosen = select(view_of_weights(WEIGHTS), 3, limit=jnp.asarray([1], jnp.int32))
    assert kept(chosen, 0) == [1]
    assert chosen.groups[0].tolist() == [0] * 7


def test_a_full_budget_merges_nothing():
    view = cache_view()
    chosen = select(view, 100)
    for sample in range(3):
        assert kept(chosen, sample) == np.flatnonzero(view.valid[sample]).tolist()
    slots = np.asarray(chosen.valid)
    np.testing.assert_array_equal(
        np.asarray(chosen.apply(view.values))[slots], np.asarray(view.values)[view.valid]
    )
    assert run(ElasticCache(keep=3), replace(view, num_visual=0))[0].tokens is None
