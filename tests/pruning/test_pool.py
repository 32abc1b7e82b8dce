"""Pooling against slow loops and by hand; means in the contract; composition with other methods."""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Attention, Keep, Merge, Site, Tiles, View, chain, reduce_view
from catp_jax.pruning import CATP, FastV, KNorm, L2Norm, Pool, Random, TrimmedLlama
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import entry_view, kept, prune, random_view, run

TILES = 3


def tiled(rows: int, columns: int, others: int, gone: dict[int, list[int]] | None = None) -> View:
    """Two samples at the cross-attention, of three tiles each; `gone` tiles nobody sees."""
    per_tile = others + rows * columns
    number = TILES * per_tile
    rng = np.random.default_rng(rows)
    valid = np.ones((2, TILES, per_tile), bool)
    for sample, some in (gone or {}).items():
        valid[sample, some] = False
    valid = valid.reshape(2, number)
    return View(
        site=Site.CROSS,
        layer=1,
        num_visual=number,
        tokens=jnp.asarray(rng.normal(size=(2, number, 4)), jnp.float32),
        numbers=jnp.broadcast_to(jnp.arange(number, dtype=jnp.int32), (2, number)),
        valid=jnp.asarray(valid),
        sees=jnp.asarray(np.repeat(valid[:, None], 2, axis=1)),
        tiles=Tiles(rows=rows, columns=columns, others=others),
    )


def merge_of(view: View, keep: int, limit: list[int] | None = None, site: Site = Site.CROSS) -> Any:
    limits = None if limit is None else jnp.asarray(limit, jnp.int32)
    return run(Pool(keep=keep, site=site, limit=limits), view)[0].tokens


def groups_of(merge: Any, sample: int) -> list[list[int]]:
    """The members of a sample's groups, those that there are."""
    numbers = np.asarray(merge.groups[sample])
    valid = np.asarray(merge.valid[sample])
    found = [np.flatnonzero(numbers == group).tolist() for group in range(len(valid))]
    assert [bool(group) for group in found] == valid.tolist()
    return [group for group in found if group]


# --- which tokens go together -----------------------------------------------------------------


def test_a_tile_of_four_by_four_by_hand():
    view = replace(tiled(4, 4, 1, gone={0: [0, 2], 1: [0, 1, 2]}))
    four = groups_of(merge_of(view, 4), 0)  # the tile's class token is 17, its patches follow
    assert [[n - 18 for n in group] for group in four] == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
    five = groups_of(merge_of(view, 5), 0)
    assert [[n - 18 for n in group] for group in five] == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [8, 9],
        [10, 11],
        [12, 13],
        [14, 15],
    ]
    assert groups_of(merge_of(view, 16), 0) == [[n] for n in range(18, 34)]
    assert groups_of(merge_of(view, 17), 0) == [[n] for n in range(17, 34)]
    assert groups_of(merge_of(view, 17), 1) == []


@pytest.mark.parametrize(
    ("rows", "columns", "others"), [(4, 4, 1), (5, 5, 1), (2, 6, 0), (6, 1, 2), (1, 1, 1)]
)
def test_cells_are_those_of_slow_loops_at_every_budget(rows: int, columns: int, others: int):
    view = tiled(rows, columns, others, gone={1: [1]})
    whole = view.num_visual
    for keep in range(1, whole + 3):
        merge = merge_of(view, whole, limit=[keep] * 2)
        for sample, there in ((0, [0, 1, 2]), (1, [0, 2])):
            own = groups_of(merge, sample)
            assert own == oracles.pool_cells(rows, columns, others, there, keep)
            available = len(there) * (others + rows * columns)
            assert len(own) == min(keep, available) or others > 1


def test_cells_of_a_tile_are_even_and_near_to_squares():
    view = tiled(20, 20, 1, gone={0: [1, 2]})
    for keep in (9, 16, 30, 50, 100, 133, 399):
        cells = groups_of(merge_of(view, 400, limit=[keep] * 2), 0)
        assert len(cells) == keep
        assert sorted(itertools.chain(*cells)) == list(range(1, 401))
        heights = {len({(n - 1) // 20 for n in cell}) for cell in cells}
        widths = {len({(n - 1) % 20 for n in cell}) for cell in cells}
        assert max(heights) - min(heights) <= 1
        assert max(widths) <= 2.5 * min(widths)


def test_the_member_that_stands_for_a_cell_is_in_its_middle():
    view = tiled(9, 9, 1, gone={0: [0, 1], 1: [0, 1, 2]})
    merge = merge_of(view, 9)
    middles = [2 * 82 + 1 + 9 * row + column for row in (1, 4, 7) for column in (1, 4, 7)]
    assert kept(merge, 0) == middles
    four = kept(merge_of(view, 4), 0)
    for number, (row, column) in zip(four, itertools.product((2, 6.5), (2, 6.5)), strict=True):
        patch = number - 2 * 82 - 1
        assert abs(patch // 9 - row) <= 1
        assert abs(patch % 9 - column) <= 1


def test_neighbours_by_hand_and_at_every_budget():
    view = entry_view(0)  # seven queries
    assert groups_of(merge_of(view, 3, site=Site.ENTRY), 0) == [[0, 1, 2], [3, 4], [5, 6]]
    assert kept(merge_of(view, 3, site=Site.ENTRY), 0) == [1, 3, 5]
    for keep in range(1, 9):
        own = groups_of(merge_of(view, 7, [keep] * 3, Site.ENTRY), 2)
        assert own == oracles.parts(7, min(keep, 7))


def test_a_limit_is_each_samples_own():
    view = tiled(4, 4, 1)
    merge = merge_of(view, 12, limit=[6, 40])
    assert merge.indices.shape == (2, 12)
    assert groups_of(merge, 0) == groups_of(merge_of(view, 6), 0)
    assert groups_of(merge, 1) == groups_of(merge_of(view, 12), 1)


@pytest.mark.parametrize("keep", [-1, 0])
def test_a_budget_that_is_no_count_is_refused(keep: int):
    with pytest.raises(ValueError, match=f"keep at least 1 visual token, got keep={keep}"):
        merge_of(entry_view(), keep, site=Site.ENTRY)


# --- means ------------------------------------------------------------------------------------


def slow_mean(array: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """[b, n, …] to [b, size, …], zero where there is no member."""
    out = np.zeros((array.shape[0], size, *array.shape[2:]))
    for sample, group in itertools.product(range(array.shape[0]), range(size)):
        members = [array[sample, n] for n in np.flatnonzero(groups[sample] == group)]
        if members:
            out[sample, group] = np.sum(members, axis=0, dtype=np.float64) / len(members)
    return out


@functools.cache
def some_merge() -> Merge:
    """Five groups of thirteen entries in no order; one group is empty, some entries go nowhere."""
    rng = np.random.default_rng(5)
    groups = rng.choice([-1, 0, 1, 2, 4], size=(5, 13))
    far = jnp.asarray(rng.integers(0, 9, size=(5, 13)), jnp.int32)
    return Merge.of(jnp.asarray(groups, jnp.int32), far, 5)


@pytest.mark.parametrize("shape", [(5, 13), (5, 13, 2), (5, 13, 3, 4)])
def test_numbers_become_the_means_of_their_groups(shape: tuple[int, ...]):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = slow_mean(array, np.asarray(some_merge().groups), 5)
    np.testing.assert_allclose(some_merge().apply(jnp.asarray(array)), expected, atol=1e-6)


def test_a_mean_in_bfloat16_is_summed_in_float32():
    array = np.full((5, 13, 1), 1.0, np.float32)
    array[:, 0] = 512.0  # in bfloat16 512 + 1 is 512
    merge = Merge.of(jnp.zeros((5, 13), jnp.int32), jnp.zeros((5, 13), jnp.int32), 1)
    mean = merge.apply(jnp.asarray(array, jnp.bfloat16))
    assert mean.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean, jnp.full((5, 1, 1), 524 / 13, jnp.bfloat16))


def test_what_is_no_real_number_is_that_of_the_member_nearest_to_the_middle():
    merge, numbers = some_merge(), jnp.broadcast_to(jnp.arange(13, dtype=jnp.int32) * 7, (5, 13))
    rng = np.random.default_rng(5)
    groups, far = rng.choice([-1, 0, 1, 2, 4], size=(5, 13)), rng.integers(0, 9, size=(5, 13))
    taken = np.asarray(merge.apply(numbers))
    for sample, group in itertools.product(range(5), range(5)):
        members = [n for n in range(13) if groups[sample, n] == group]
        assert bool(merge.valid[sample, group]) == bool(members)
        if members:
            assert taken[sample, group] == 7 * min(members, key=lambda n: (far[sample, n], n))


def test_each_head_may_have_groups_of_its_own():
    rng = np.random.default_rng(6)
    groups = rng.integers(-1, 4, size=(2, 3, 9))
    far = jnp.zeros((2, 3, 9), jnp.int32)
    merge = Merge.of(jnp.asarray(groups, jnp.int32), far, 4)
    keys = rng.normal(size=(2, 9, 3, 5)).astype(np.float32)
    merged = merge.apply(jnp.asarray(keys))
    for head in range(3):
        expected = slow_mean(keys[:, :, head], groups[:, head], 4)
        np.testing.assert_allclose(merged[:, :, head], expected, atol=1e-6)
    numbers = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32), (2, 9))
    assert merge.apply(numbers).shape == (2, 3, 4)


def test_the_first_groups_are_those_of_the_whole():
    array = jnp.asarray(np.random.default_rng(0).normal(size=(5, 13, 2)), jnp.float32)
    fewer = some_merge().first(3)
    np.testing.assert_array_equal(fewer.apply(array), some_merge().apply(array)[:, :3])


# --- one after another ------------------------------------------------------------------------


def keep_of(seed: int, size: int, of: int) -> Keep:
    rng = np.random.default_rng(seed)
    chosen = np.sort([rng.permutation(of)[:size] for _ in range(5)], axis=1)
    return Keep(
        indices=jnp.asarray(chosen, jnp.int32), valid=jnp.asarray(rng.random((5, size)) < 0.8)
    )


def then_merge(seed: int, valid: Any) -> Merge:
    """Three groups of what is valid."""
    rng = np.random.default_rng(seed)
    groups = np.where(valid, rng.integers(0, 3, size=valid.shape), -1)
    return Merge.of(jnp.asarray(groups, jnp.int32), jnp.zeros(valid.shape, jnp.int32), 3)


@pytest.mark.parametrize("order", ["keep, merge", "merge, keep", "merge, merge"])
def test_chained_is_one_after_the_other(order: str):
    view = random_view(0)
    valid = np.asarray(view.valid)
    first = keep_of(1, 8, 13) if order == "keep, merge" else then_merge(2, valid)
    left = reduce_view(view, first)
    then = keep_of(3, 2, 3) if order == "merge, keep" else then_merge(4, np.asarray(left.valid))
    both = chain(first, then)
    assert both.merges
    reduced, expected = reduce_view(view, both), reduce_view(left, then)
    np.testing.assert_array_equal(reduced.valid, expected.valid)
    for sample in range(5):
        there = np.asarray(expected.valid[sample])
        for name in ("tokens", "values", "numbers"):
            one, other = getattr(reduced, name)[sample], getattr(expected, name)[sample]
            np.testing.assert_allclose(one[there], other[there], atol=1e-6)
        np.testing.assert_array_equal(reduced.sees[sample], expected.sees[sample])
    cut = both.first(1)
    np.testing.assert_array_equal(cut.apply(view.tokens), both.apply(view.tokens)[:, :1])


def test_pool_after_a_selection_is_of_what_that_left():
    view = entry_view(3)
    both, _ = prune((L2Norm(keep=4), Pool(keep=2, site=Site.ENTRY)), view)
    alone, _ = prune((L2Norm(keep=4),), view)
    for sample in range(3):
        left = kept(alone, sample)
        tokens = np.asarray(view.tokens[sample], np.float64)
        expected = [tokens[left[:2]].mean(axis=0), tokens[left[2:]].mean(axis=0)]
        np.testing.assert_allclose(both.apply(view.tokens)[sample], expected, atol=1e-6)
        assert kept(both, sample) == [left[0], left[2]]


def test_a_method_after_pool_ranks_the_means():
    view = entry_view(4)
    both, _ = prune((Pool(keep=4, site=Site.ENTRY), L2Norm(keep=2)), view)
    for sample in range(3):
        tokens = np.asarray(view.tokens[sample], np.float64)
        means = [tokens[part].mean(axis=0) for part in oracles.parts(7, 4)]
        longest = sorted(np.argsort([-np.linalg.norm(mean) for mean in means])[:2])
        np.testing.assert_allclose(
            both.apply(view.tokens)[sample], [means[n] for n in longest], atol=1e-6
        )


def test_catp_after_pool_votes_for_the_tokens_that_stand_for_the_means():
    view = entry_view(5)
    both, _ = prune((Pool(keep=4, site=Site.ENTRY), CATP(keep=1)), view)
    middle, _ = prune((Pool(keep=4, site=Site.ENTRY),), view)
    score = np.asarray(CATP(keep=1).score(view))
    for sample in range(3):
        there = kept(middle, sample)
        assert kept(both, sample) == [max(there, key=lambda n: score[sample, n])]


@pytest.mark.parametrize("other", [FastV(keep=8, site=Site.CROSS), KNorm(keep=8), Random(keep=8)])
def test_where_patches_have_lost_their_places_pool_is_refused_by_name(other: Any):
    with pytest.raises(ValueError, match="Pool wants all patches in their places"):
        prune((other, Pool(keep=2, site=Site.CROSS)), random_view())


@pytest.mark.parametrize(
    "other",
    [
        TrimmedLlama(keep=None, per_head=1),
        FastV(keep=100, site=Site.CROSS, limit=jnp.asarray([3, 3], jnp.int32)),
    ],
)
def test_a_selection_as_long_as_before_has_moved_patches_too(other: Any):
    attention = random_view(columns=12).attention
    view = replace(
        tiled(1, 3, 1),
        attention=Attention(queries=attention.queries[:2, :2], keys=attention.keys[:2]),
    )
    with pytest.raises(ValueError, match="Pool wants all patches in their places"):
        prune((other, Pool(keep=3, site=Site.CROSS)), view)
