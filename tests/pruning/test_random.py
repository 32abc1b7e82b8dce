"""Random selection: reproducible, fair, and each sample's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site, View
from catp_jax.pruning.random import Random
from catp_jax.struct import replace
from tests.pruning.views import cache_view, kept, random_view, run, with_attention


def select(view: View, **options):
    return run(Random(**options), view)[0].tokens


def columns_only(view: View, order: list[int]) -> View:
    """The samples in this order."""
    index = jnp.asarray(order)
    return jax.tree.map(lambda array: array[index], view)


def test_same_seed_same_tokens_and_another_seed_others():
    view = random_view()
    first, again = select(view, keep=4, seed=3), select(view, keep=4, seed=3)
    np.testing.assert_array_equal(first.indices, again.indices)
    draws = {tuple(kept(select(view, keep=4, seed=seed), 0)) for seed in range(20)}
    assert len(draws) > 15


def test_keeps_exactly_the_count_in_order_and_only_seen_tokens():
    view = random_view()
    chosen = select(view, keep=8, seed=1)
    for sample, available in enumerate(view.valid.sum(axis=1).tolist()):
        own = kept(chosen, sample)
        assert len(own) == min(8, available)
        assert own == sorted(set(own))
        assert all(bool(view.valid[sample, column]) for column in own)


def test_a_sample_keeps_the_same_tokens_whoever_its_neighbours_are():
    view = random_view()
    whole = select(view, keep=4, seed=9)
    order = [3, 0, 4, 1, 2]
    shuffled = select(columns_only(view, order), keep=4, seed=9)
    for place, sample in enumerate(order):
        assert kept(shuffled, place) == kept(whole, sample)
        alone = select(columns_only(view, [sample]), keep=4, seed=9)
        assert kept(alone, 0) == kept(whole, sample)


def wider(array: jax.Array, axis: int = 1) -> jax.Array:
    """Six empty entries more."""
    return jnp.pad(array, [(0, 6 if number == axis else 0) for number in range(array.ndim)])


def test_padding_does_not_change_the_draw():
    view = random_view()
    columns = view.valid.shape[1]
    numbers = jnp.broadcast_to(jnp.arange(columns + 6, dtype=jnp.int32), (5, columns + 6))
    padded = replace(
        with_attention(view, keys=wider(view.attention.keys)),
        num_visual=columns + 6,
        tokens=wider(view.tokens),
        values=wider(view.values),
        numbers=numbers,
        valid=wider(view.valid),
        sees=wider(view.sees, axis=2),
    )
    narrow, wide_choice = select(view, keep=4, seed=2), select(padded, keep=4, seed=2)
    for sample in range(5):
        assert kept(narrow, sample) == kept(wide_choice, sample)


def test_a_smaller_budget_keeps_a_part_of_a_larger_one():
    view = random_view()
    small, large = select(view, keep=4, seed=4), select(view, keep=8, seed=4)
    for sample in range(5):
        assert set(kept(small, sample)) <= set(kept(large, sample))


def test_the_draw_goes_by_a_tokens_place_not_by_its_column():
    # after another pruner the columns are fewer but tokens keep their places
    view = random_view()
    whole = kept(select(view, keep=4, seed=6), 0)
    left = sorted({*whole, 1, 8, 12})
    index = jnp.asarray(left)
    rest = replace(
        with_attention(view, keys=view.attention.keys[:, index]),
        num_visual=len(left),
        tokens=view.tokens[:, index],
        values=view.values[:, index],
        numbers=view.numbers[:, index],
        valid=view.valid[:, index],
        sees=view.sees[:, :, index],
    )
    assert [left[column] for column in kept(select(rest, keep=4, seed=6), 0)] == whole


def test_every_token_is_kept_equally_often():
    view = columns_only(random_view(), [0])
    draw = jax.jit(jax.vmap(lambda seed: select(view, keep=4, seed=seed).indices[0]))
    runs = 2000
    counts = np.bincount(np.asarray(draw(jnp.arange(runs, dtype=jnp.uint32))).ravel(), minlength=13)
    share = 4 / 13
    # six standard deviations of a binomial count
    assert (np.abs(counts - runs * share) < 6 * np.sqrt(runs * share * (1 - share))).all()


def test_another_seed_reuses_the_program():
    fresh = jax.jit(lambda pruner, view: pruner(view, ())[0].tokens.indices)
    view = random_view()
    for seed in (0, 1, 2**31):
        fresh(Random(keep=4, seed=jnp.asarray(seed, jnp.uint32)), view)
    assert fresh._cache_size() == 1


@pytest.mark.parametrize("site", [Site.LAYER, Site.CACHE])
def test_behind_the_entry_the_same_visual_tokens_stay_and_all_text(site: Site):
    """In every layer: its keys do not matter, nor does its number."""
    first, other = (
        replace(cache_view(seed), site=site, layer=layer) for seed, layer in ((0, 1), (5, 4))
    )
    numbers = np.arange(first.num_visual)
    entry = replace(first, site=Site.ENTRY)
    for sample in range(first.valid.shape[0]):
        own = kept(select(first, keep=4, seed=3, site=site), sample)
        assert own == kept(select(entry, keep=4, seed=3, site=Site.ENTRY), sample)
        valid = np.flatnonzero(np.asarray(first.valid[sample]))
        text = [column for column in valid if column >= first.num_visual]
        assert own[-len(text) :] == text
        visual = [column for column in own if column < first.num_visual]
        assert len(visual) == min(4, len({*numbers} & {*valid}))
        assert own == kept(select(other, keep=4, seed=3, site=site), sample)


def test_a_layer_that_reads_text_alone_is_left_as_it_is():
    view = replace(cache_view(), num_visual=0, numbers=jnp.full_like(cache_view().numbers, -1))
    assert select(view, keep=4, site=Site.CACHE) is None


def test_a_layer_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="number of a layer from 1 on, got 0"):
        Random(keep=4, layer=0)
