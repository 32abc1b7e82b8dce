"""Other tokens in the place of some: alone, chained, and with methods before and after."""

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Keep, Merge, Replace, Site, chain, keep_columns, reduce_view
from catp_jax.pruning import L2Norm
from catp_jax.pruning.scores import rank
from tests.pruning.groupings import WIDTH, method_of, view_of
from tests.pruning.views import entry_view, kept, prune, random_view, run


def some_replace(seed: int = 5, groups: int = 5) -> Replace:
    """For thirteen entries of five samples; group 3 is empty."""
    rng = np.random.default_rng(seed)
    numbers = jnp.asarray(rng.choice([-1, 0, 1, 2, 4], size=(5, 13)), jnp.int32)
    merge = Merge.of(numbers, rank(jnp.asarray(rng.normal(size=(5, 13)), jnp.float32)), groups)
    return Replace.merged(merge, jnp.asarray(rng.normal(size=(5, groups, WIDTH)), jnp.float32))


def test_tokens_are_replaced_keys_are_means_and_all_else_is_a_members():
    view, instead = random_view(0), some_replace()
    left = reduce_view(view, instead)
    means = Merge(indices=instead.indices, valid=instead.valid, groups=instead.groups)
    picked = Keep(indices=instead.indices, valid=instead.valid)
    np.testing.assert_array_equal(left.tokens, instead.tokens)
    np.testing.assert_array_equal(left.attention.keys, means.apply(view.attention.keys))
    np.testing.assert_array_equal(left.values, means.apply(view.values))
    np.testing.assert_array_equal(left.numbers, picked.apply(view.numbers))
    np.testing.assert_array_equal(left.sees, keep_columns(view.sees, picked))
    assert instead.merges
    assert left.num_visual == 5


def test_features_of_another_width_are_not_what_is_replaced():
    with pytest.raises(ValueError, match="width 8 cannot take the place of others of width 6"):
        some_replace().apply(jnp.zeros((5, 13, 6)))


def test_the_first_of_new_tokens():
    fewer = some_replace().first(2)
    view = random_view(0)
    assert isinstance(fewer, Replace)
    for array in (view.tokens, view.values, view.numbers):
        np.testing.assert_array_equal(fewer.apply(array), some_replace().apply(array)[:, :2])


@pytest.mark.parametrize("order", ["keep, replace", "replace, keep", "replace, merge"])
def test_chained_is_one_after_the_other(order: str):
    view = random_view(0)
    if order == "keep, replace":
        index = jnp.broadcast_to(jnp.asarray([0, 3, 4, 9], jnp.int32), (5, 4))
        first = Keep(indices=index, valid=index >= 0)
        groups = jnp.broadcast_to(jnp.asarray([1, 0, 1, 1], jnp.int32), (5, 4))
        merge = Merge.of(groups, jnp.zeros((5, 4), jnp.int32), 2)
        then = Replace.merged(merge, some_replace().tokens[:, :2])
    else:
        first = some_replace()
        index = jnp.broadcast_to(jnp.asarray([1, 4], jnp.int32), (5, 2))
        then = Keep(indices=index, valid=index >= 0)
        if order == "replace, merge":
            groups = jnp.broadcast_to(jnp.asarray([0, 1, 0, -1, 1], jnp.int32), (5, 5))
            then = Merge.of(groups, jnp.zeros((5, 5), jnp.int32), 2)
    both = chain(first, then)
    reduced, expected = reduce_view(view, both), reduce_view(reduce_view(view, first), then)
    assert both.merges
    np.testing.assert_array_equal(both.first(1).apply(view.tokens), expected.tokens[:, :1])
    for name in ("tokens", "values", "numbers", "valid", "sees"):
        np.testing.assert_array_equal(getattr(reduced, name), getattr(expected, name))


def test_a_method_after_it_ranks_the_new_tokens():
    view, method = entry_view(4), method_of(4, site=Site.ENTRY)
    both, _ = prune((method, L2Norm(keep=2)), view)
    new = run(method, view)[0].tokens
    for sample in range(3):
        there = np.flatnonzero(new.valid[sample])
        longest = np.argsort(-np.linalg.norm(new.tokens[sample][there], axis=1))[:2]
        expected = new.tokens[sample][there[np.sort(longest)]]
        np.testing.assert_allclose(both.apply(view.tokens)[sample], expected, atol=1e-6)


def test_it_groups_what_a_method_before_it_left():
    view, method = entry_view(4), method_of(2, site=Site.ENTRY)
    both, _ = prune((L2Norm(keep=4), method), view)
    left, _ = prune((L2Norm(keep=4),), view)
    for sample in range(3):
        some = kept(left, sample)
        own = run(method, view_of(np.asarray(view.tokens[sample])[some]))[0].tokens
        assert [some[n] for n in kept(own, 0)] == kept(both, sample)
        there = np.asarray(own.valid[0])
        found = both.apply(view.tokens)[sample]
        np.testing.assert_allclose(found[there], own.tokens[0][there], atol=1e-6)
