"""The contract between models and methods: selections, views, pruners in order, pytrees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import (
    Keep,
    Reduction,
    Site,
    View,
    chain,
    keep_columns,
    reduce_view,
    run_pruners,
    settle,
)
from catp_jax.pruning import FastV, KNorm, Random, TrimmedLlama
from catp_jax.struct import pytree, replace, static
from tests.pruning.views import kept, prune, random_view

INDICES = np.array([[4, 0, 0], [1, 2, 3], [0, 0, 0], [12, 5, 7], [6, 6, 2]])
VALID = np.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 0, 0]], bool)


REDUCED = ("tokens", "values", "numbers")


@pytest.fixture(scope="module")
def view() -> View:
    return random_view()


@pytest.fixture(scope="module")
def keep() -> Keep:
    return Keep(indices=jnp.asarray(INDICES, jnp.int32), valid=jnp.asarray(VALID))


@pytest.mark.parametrize("shape", [(5, 13), (5, 13, 2), (5, 13, 3, 4), (5, 13, 2, 1, 2)])
def test_keep_takes_entries_of_the_second_axis_whatever_follows(keep: Keep, shape):
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = np.stack([array[b][INDICES[b]] for b in range(5)])
    np.testing.assert_array_equal(keep.apply(jnp.asarray(array)), expected)


def test_kept_columns_of_a_mask_are_false_where_the_entry_is_empty(view: View, keep: Keep):
    columns = np.asarray(keep_columns(view.sees, keep))
    sees = np.asarray(view.sees)
    for b in range(5):
        for row in range(sees.shape[1]):
            for k in range(3):
                assert columns[b, row, k] == (VALID[b, k] and sees[b, row, INDICES[b, k]])


def test_a_reduced_view_holds_the_kept_tokens_and_all_rows(view: View, keep: Keep):
    reduced = reduce_view(view, keep)
    pairs = [(getattr(view, name), getattr(reduced, name)) for name in REDUCED]
    for whole, part in [*pairs, (view.attention.keys, reduced.attention.keys)]:
        whole, part = np.asarray(whole), np.asarray(part)
        for b in range(5):
            np.testing.assert_array_equal(part[b], whole[b][INDICES[b]])
    np.testing.assert_array_equal(reduced.attention.queries, view.attention.queries)
    assert (reduced.site, reduced.layer) == (view.site, view.layer)
    assert reduced.num_visual == 3
    valid = np.stack([np.asarray(view.valid)[b][INDICES[b]] for b in range(5)]) & VALID
    np.testing.assert_array_equal(reduced.valid, valid)
    np.testing.assert_array_equal(reduced.sees, keep_columns(view.sees, keep))


def test_two_selections_chained_do_what_one_after_the_other_does(view: View, keep: Keep):
    then = Keep(
        indices=jnp.asarray([[2, 0], [0, 2], [1, 0], [2, 1], [0, 1]], jnp.int32),
        valid=jnp.asarray([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1]], bool),
    )
    both = chain(keep, then)
    np.testing.assert_array_equal(both.apply(view.tokens), then.apply(keep.apply(view.tokens)))
    for b in range(5):
        for k, inner in enumerate(np.asarray(then.indices[b])):
            assert both.indices[b, k] == INDICES[b, inner]
            assert both.valid[b, k] == (VALID[b, inner] and bool(then.valid[b, k]))
    jax.tree.map(
        np.testing.assert_array_equal,
        reduce_view(view, both),
        reduce_view(reduce_view(view, keep), then),
    )


def test_pruners_run_in_order_each_on_what_the_one_before_left(view: View):
    first, second = Random(keep=8, seed=3), TrimmedLlama(keep=4, per_head=1)
    both, (nothing, report) = prune((first, second), view)
    assert nothing == ()

    keep, _ = prune((first,), view)
    left = reduce_view(view, keep)
    inner, _ = prune((second,), left)
    for sample in range(5):
        # the second's choice, told in terms of the view that the first one saw
        survivors = np.asarray(keep.indices[sample])
        expected = [int(survivors[index]) for index in kept(inner, sample)]
        assert kept(both, sample) == expected
        assert set(expected) <= set(kept(keep, sample))
        assert int(report.union[sample]) <= min(6, len(kept(keep, sample)))


def test_the_order_of_pruners_matters(view: View):
    one, other = FastV(keep=6), KNorm(keep=3)
    keep, _ = prune((one, other), view)
    reverse, _ = prune((other, one), view)
    assert kept(keep, 0) != kept(reverse, 0)
    assert set(kept(keep, 0)) <= set(kept(prune((one,), view)[0], 0))
    assert set(kept(reverse, 0)) <= set(kept(prune((other,), view)[0], 0))


def test_no_pruners_keep_everything(view: View):
    assert run_pruners((), view) == (Reduction(), ())


@pytree
class Watcher:
    """Prunes nothing and reports what it saw."""

    sites = (Site.CROSS,)
    site: Site = static(default=Site.CROSS)

    def start(self, view: View):
        return jnp.zeros(())

    def __call__(self, view: View, state):
        return Reduction(), state + view.tokens.shape[1]


def test_a_pruner_may_leave_everything_and_still_report(view: View):
    keep, states = prune((Watcher(),), view)
    assert keep is None
    assert float(states[0]) == 13
    keep, states = prune((KNorm(keep=3), Watcher()), view)
    assert keep.indices.shape == (5, 3)
    assert float(states[1]) == 3


@pytree
class Entrance:
    """A pruner for another place."""

    sites = (Site.ENTRY,)
    site: Site = static(default=Site.ENTRY)


def test_a_pruner_for_a_site_the_model_lacks_is_refused_by_name():
    first = KNorm(keep=3, site=Site.CROSS)
    assert settle((KNorm(keep=3),), frozenset({Site.CROSS})) == (first,)
    assert settle((), frozenset()) == ()
    with pytest.raises(ValueError, match="Entrance") as error:
        settle((KNorm(keep=3), Entrance()), frozenset({Site.CROSS, Site.CACHE}))
    message = str(error.value)
    assert "this model does not have" in message
    assert "ENTRY" in message
    assert "CACHE, CROSS" in message


def test_a_pruner_at_a_site_that_it_cannot_work_at_is_refused():
    with pytest.raises(ValueError, match="KNorm cannot work at site LAYER; it can at CROSS"):
        settle((KNorm(keep=3, site=Site.LAYER),), frozenset(Site))


def test_a_pruner_without_a_site_takes_the_first_that_the_model_has():
    (fastv, draw, norm) = settle(
        (FastV(keep=3), Random(keep=2), KNorm(keep=1)), frozenset({Site.CROSS})
    )
    assert (fastv.site, draw.site, norm.site) == (Site.CROSS,) * 3
    both = frozenset({Site.ENTRY, Site.LAYER})
    assert [pruner.site for pruner in settle((FastV(keep=3), Random(keep=2)), both)] == [
        Site.LAYER,
        Site.ENTRY,
    ]
    assert settle((Random(keep=2, site=Site.CROSS),), frozenset(Site))[0].site is Site.CROSS
    with pytest.raises(ValueError, match=r"FastV prunes .*LAYER.* it has ENTRY"):
        settle((FastV(keep=3),), frozenset({Site.ENTRY}))


@pytree
class Pair:
    array: Any
    other: Any = None
    size: int = static(default=2)
    name: str = static(default="a")


def test_a_pytree_is_frozen_and_takes_keywords_only():
    pair = Pair(array=jnp.ones(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.size = 3
    with pytest.raises(TypeError):
        Pair(jnp.ones(3))
    assert replace(pair, size=5).size == 5
    assert pair.size == 2


def test_arrays_are_leaves_and_static_fields_are_not():
    pair = Pair(array=jnp.ones(3), other=jnp.zeros(3), size=7)
    leaves = jax.tree.leaves_with_path(pair)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".array", ".other"]
    assert len(jax.tree.leaves(Pair(array=jnp.ones(3)))) == 1
    assert jax.tree.structure(pair) != jax.tree.structure(replace(pair, size=8))
    assert jax.tree.structure(pair) == jax.tree.structure(replace(pair, array=jnp.ones(4)))


def test_a_static_field_compiles_in_and_an_array_does_not():
    traced = []

    @jax.jit
    def scale(pair: Pair):
        traced.append((pair.size, pair.name))
        return pair.array * float(pair.size)

    pair = Pair(array=jnp.ones(3), size=2)
    np.testing.assert_array_equal(scale(pair), [2, 2, 2])
    np.testing.assert_array_equal(scale(replace(pair, array=jnp.zeros(3))), [0, 0, 0])
    np.testing.assert_array_equal(scale(replace(pair, size=3)), [3, 3, 3])
    assert traced == [(2, "a"), (3, "a")]


def test_a_pytree_survives_jaxs_placeholders():
    # fields are filled with things that no check of their types would pass
    pair = Pair(array=jnp.ones(3), other=jnp.zeros(3), size=7)
    emptied = jax.tree.map(lambda _: None, pair)
    assert (emptied.array, emptied.other, emptied.size) == (None, None, 7)
    assert jax.tree.map(lambda _: "x", pair).array == "x"

    shapes = jax.eval_shape(lambda p: replace(p, array=p.array[:2]), pair)
    assert isinstance(shapes, Pair)
    assert shapes.array.shape == (2,)

    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), pair)
    mapped = jax.vmap(lambda p: replace(p, array=p.array + p.other))(stacked)
    assert mapped.array.shape == (2, 3)
    axes = jax.tree.map(lambda _: 0, pair)
    assert jax.vmap(lambda p: p.array.sum(), in_axes=(axes,))(stacked).tolist() == [3.0, 6.0]

    def double(carry: Pair, _):
        return replace(carry, array=carry.array * 2), None

    assert jax.lax.scan(double, pair, length=3)[0].array.tolist() == [8.0, 8.0, 8.0]
    gradient = jax.grad(lambda p: (p.array**2).sum())(Pair(array=jnp.ones(3)))
    assert gradient.array.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "pruner",
    [
        TrimmedLlama(keep=None, k_ratio=0.5),
        TrimmedLlama(keep=3, per_head=2),
        Random(keep=3),
        FastV(keep=3),
    ],
)
def test_pruners_are_pytrees_that_any_transformation_can_carry(pruner):
    emptied = jax.tree.map(lambda _: None, pruner)
    assert emptied.keep == pruner.keep
    assert jax.tree.structure(pruner) == jax.tree.structure(jax.eval_shape(lambda p: p, pruner))
    assert hash(jax.tree.structure(pruner)) == hash(jax.tree.structure(pruner))
    assert jax.jit(lambda p: p)(pruner).keep == pruner.keep


def test_a_pruner_can_be_mapped_over_learned_values(view: View):
    each = [TrimmedLlama(keep=None, k_ratio=jnp.asarray(ratio)) for ratio in (0.05, 1.0)]
    ratios = jax.tree.map(lambda *values: jnp.stack(values), *each)
    unions = jax.vmap(lambda p: p(view, p.start(view))[1].union)(ratios)
    assert unions.shape == (2, 5)
    assert unions[1].tolist() == view.valid.sum(axis=1).tolist()
    assert int(unions[0].sum()) < int(unions[1].sum())
