"""Eigen Attention's directions and ranks against NumPy's singular vectors, and by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Basis, Site, View
from catp_jax.pruning.eigen import Directions, EigenAttention, Gather
from catp_jax.pruning.learned import Learned
from catp_jax.struct import replace
from tests.pruning.views import cache_view, random_view, run, shown

HEADS, CHANNELS = 3, 4  # of keys, in every view and model
VIEWS = {
    "text too": cache_view(1, visual=15, text=12),
    "visual": replace(random_view(2), site=Site.CACHE),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def learned_of(*views: View) -> Directions:
    """What one layer learns from these views."""
    grams = [run(Gather(), view)[1] for view in views]

    def total(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(gram, name)) for gram in grams]).sum(axis=0)

    return Directions.learned({5: (total("keys"), total("values"))})


def values_of(view: View, sample: int) -> np.ndarray:
    if view.values is None:
        raise ValueError("this view shows no values")
    return np.asarray(view.values[sample], np.float64)


def stacked(view: View, head: int) -> tuple[np.ndarray, np.ndarray]:
    """The keys and queries that share a head, one below the other, and its values."""
    keys_and_queries, values = [], []
    for sample in range(len(view.valid)):
        queries, keys, sees = shown(view, sample)
        for column in np.flatnonzero(view.valid[sample]):
            keys_and_queries.append(keys[column, head])
            values.append(values_of(view, sample)[column, head])
        for row in range(len(sees)):
            for query_head in range(head * 2, head * 2 + 2):
                if any(sees[row]):
                    keys_and_queries.append(queries[row, query_head] * 2)  # the root of 4 channels
    return np.asarray(keys_and_queries, np.float64), np.asarray(values, np.float64)


@every_view
def test_directions_are_the_singular_vectors_of_keys_with_queries_and_of_values(view: View):
    found = learned_of(view)
    for head in range(HEADS):
        for name, matrix in zip(("keys", "values"), stacked(view, head), strict=True):
            _, strength, vectors = np.linalg.svd(matrix)
            np.testing.assert_allclose(
                found.arrays[f"5.{name}.strength"][head], strength, rtol=1e-4
            )
            alike = vectors @ found.arrays[f"5.{name}"][head]
            np.testing.assert_allclose(np.abs(alike), np.eye(CHANNELS), atol=2e-3)


def test_samples_of_several_batches_count_together():
    one, other = cache_view(1), cache_view(2)
    both = learned_of(one, other)
    for head in range(HEADS):
        pairs = zip(stacked(one, head), stacked(other, head), strict=True)
        for name, parts in zip(("keys", "values"), pairs, strict=True):
            strength = np.linalg.svd(np.concatenate(parts), compute_uv=False)
            np.testing.assert_allclose(both.arrays[f"5.{name}.strength"][head], strength, rtol=1e-4)


def test_a_layer_that_reads_text_alone_teaches_nothing():
    gram = run(Gather(), replace(cache_view(), num_visual=0))[1]
    assert not any(leaf.any() for leaf in jax.tree.leaves(gram))


@pytest.mark.parametrize(
    ("grams", "says"),
    [
        ({}, "no layer of the model reads visual tokens"),
        ({2: (np.ones((1, 2, 2)), np.full((1, 2, 2), np.nan))}, "layer 2 has values that are not"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(grams: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Directions.learned(grams)


def of_strengths(*layers: tuple[Any, Any]) -> Directions:
    """Directions of these strengths [kv, d] of keys and of values, along the axes."""
    arrays = {}
    for layer, pair in enumerate(layers):
        for name, strength in zip(("keys", "values"), pair, strict=True):
            kv, channels = np.shape(strength)
            arrays[f"{layer}.{name}"] = np.broadcast_to(np.eye(channels), (kv, channels, channels))
            arrays[f"{layer}.{name}.strength"] = np.asarray(strength, np.float32)
    return Directions(arrays)


@pytest.mark.parametrize(
    ("share", "keys", "values"),
    [
        *((0.0, 1, 1), (0.3, 1, 1), (0.45, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.75, 2, 2)),
        *((0.76, 2, 3), (0.95, 3, 3), (1.0, 3, 3), (2.0, 4, 4)),
    ],
)
def test_a_rank_is_how_many_directions_hold_less_in_the_head_that_needs_most(
    share: float, keys: int, values: int
):
    """Keys hold .4 .7 .9 1, and 1 1 1 1; values .25 .5 .75 1, and a head has none of any length."""
    found = of_strengths(([[4, 3, 2, 1], [10, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]))
    assert found.ranks(share) == {0: (keys, values)}


@pytest.mark.parametrize(
    ("channels", "counted", "rank"),
    [
        *((64, 0, 8), (64, 8, 8), (64, 9, 16), (64, 63, 64), (128, 57, 64)),
        *((68, 65, 68), (63, 9, 9), (63, 0, 1), (16, 5, 5)),
    ],
)
def test_ranks_are_whole_eights_where_a_head_is_wide(channels: int, counted: int, rank: int):
    even = of_strengths((np.ones((2, channels)), np.ones((2, channels))))
    assert even.ranks((counted + 0.5) / channels) == {0: (rank, rank)}


def slow_ranks(found: Directions, share: float) -> list[int]:
    """Of keys and of values of each layer in turn, in Python's own numbers."""
    unit = 8 if found.channels >= 64 else 1
    ranks = []
    for layer in found.layers:
        for name in ("keys", "values"):
            most = 0
            for strength in found.arrays[f"{layer}.{name}.strength"].astype(np.float64):
                held = np.cumsum(strength) / strength.sum()
                most = max(most, sum(1 for some in held.tolist() if some < share))
            while most % unit or most == 0:
                most += 1
            ranks.append(min(most, found.channels))
    return ranks


def random_directions(seed: int, channels: int = 6, layers: int = 3) -> Directions:
    rng = np.random.default_rng(seed)

    def strength() -> np.ndarray:
        return -np.sort(-(rng.uniform(size=(2, channels)) ** 3), axis=1)

    return of_strengths(*((strength(), strength()) for _ in range(layers)))


@pytest.mark.parametrize("channels", [6, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_within_a_share_it_takes_all_that_fits_and_the_next_does_not(seed: int, channels: int):
    found = random_directions(seed, channels)
    held = {
        float(some)
        for name, array in found.arrays.items()
        if name.endswith("strength")
        for row in array.astype(np.float64)
        for some in np.cumsum(row) / row.sum()
    }
    every = [slow_ranks(found, float(np.nextafter(some, 2.0))) for some in (0.0, *sorted(held))]
    sums = [sum(ranks) for ranks in every]
    assert sums == sorted(sums)
    smallest, before = sums[0], 0
    whole = 2 * 3 * channels
    for share in (1e-6, smallest / whole, 0.25, 0.4, 0.5, 0.77, 0.999, 1.0):
        ranks = [rank for pair in found.within(share).values() for rank in pair]
        fitting = [some for some in every if sum(some) <= share * whole + 1e-9]
        assert ranks == (fitting[-1] if fitting else every[0])
        assert found.left(found.within(share)) <= max(share, smallest / whole)
        assert sum(ranks) >= before
        before = sum(ranks)
    assert before == whole


def test_a_budget_of_tokens_is_one_of_bytes():
    found = random_directions(3)
    for keep, of, share in (
        (5, 10, 0.5),
        (7, 8, 0.875),
        (10, 10, 1.0),
        (20, 10, 1.0),
        (1, 99, 0.0),
    ):
        learned = Learned("eigen", {}, {}, found.arrays)
        bases = EigenAttention.from_learned(learned, keep, of)["bases"]
        ranks = {
            layer: tuple(found.channels if one is None else one.matrix.shape[2] for one in pair)
            for layer, pair in bases.items()
        }
        assert ranks == found.within(share)


def test_bases_are_the_first_directions():
    found = learned_of(cache_view())
    ((keys, values),) = found.bases({5: (1, 3)}).values()
    np.testing.assert_array_equal(keys.matrix, found.arrays["5.keys"][:, :, :1])
    np.testing.assert_array_equal(values.matrix, found.arrays["5.values"][:, :, :3])


def random_bases(ranks: tuple[int, int], seed: int = 0) -> tuple[Basis, Basis]:
    rng = np.random.default_rng(seed)

    def basis(rank: int) -> Basis:
        square = np.linalg.qr(rng.normal(size=(HEADS, CHANNELS, CHANNELS)))[0]
        return Basis(matrix=jnp.asarray(square[:, :, :rank], jnp.float32))

    return basis(ranks[0]), basis(ranks[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(2, HEADS, 5, CHANNELS), (2, HEADS, 2, 3, CHANNELS)])
def test_arrays_of_16_bits_are_put_into_directions_and_back(shape: tuple[int, ...], dtype: Any):
    """Keys or values, and a step's queries."""
    basis = random_bases((2, 2))[0]
    array = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    made = jax.jit(lambda basis, array: basis.apply(array))(basis, array)
    again = jax.jit(lambda basis, made: basis.back(made))(basis, made)
    assert made.dtype == again.dtype == dtype
    for head in range(HEADS):
        matrix = np.asarray(basis.matrix[head], np.float64)
        few = np.asarray(array[:, head], np.float64) @ matrix
        np.testing.assert_allclose(np.asarray(made[:, head], np.float64), few, atol=0.03)
        np.testing.assert_allclose(
            np.asarray(again[:, head], np.float64), few @ matrix.T, atol=0.06
        )


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="got keep=0"):
        EigenAttention(keep=0, bases={})


@pytest.mark.parametrize("view", [replace(cache_view(), num_visual=0), cache_view()])
def test_layers_of_text_and_layers_without_directions_are_left(view: View):
    layer = view.layer if not view.num_visual else view.layer + 1
    reduction, state = run(EigenAttention(keep=1, bases={layer: random_bases((1, 1))}), view)
    assert (reduction.tokens, reduction.keys, reduction.values, state) == (None, None, None, ())


def test_searched_ranks_are_those_that_were_kept():
    found, ranks = random_directions(5), {0: (2, 6), 1: (1, 1), 2: (6, 6)}
    learned = Learned("eigen", {}, {}, found.with_ranks(ranks).arrays)
    assert Directions(learned.arrays).searched() == ranks
    bases = EigenAttention.from_learned(learned, None, 1)["bases"]
    shapes = {
        layer: tuple(None if one is None else one.matrix.shape for one in pair)
        for layer, pair in bases.items()
    }
    assert shapes == {0: ((2, 6, 2), None), 1: ((2, 6, 1),) * 2, 2: (None, None)}
    for wrong in ((0, 3), (3, 7)):
        with pytest.raises(ValueError, match=r"layer 1 has ranks .* two of 1 to 6 are wanted"):
            found.with_ranks(ranks | {1: wrong}).searched()
    half = EigenAttention.from_learned(learned, 1, 2)["bases"]
    assert half.keys() == bases.keys()
    assert found.left(found.within(0.5)) == Directions(learned.arrays).left(found.within(0.5))
