"""VisToG's grouping against slow loops and by hand, and its gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Merge, View, keep_columns
from catp_jax.pruning.vistog_grouping import Grouping, VisToGGrouping
from catp_jax.struct import replace
from tests.pruning.groupings import WIDTH, alone, grouping_of, loud, method_of, view_of
from tests.pruning.views import entry_view, run


def slow(view: View, grouping: Grouping, sample: int, limit: int) -> dict[int, Any]:
    """Of each group that has any, its members, the one that stands for it, and its token."""
    arrays = {name: np.asarray(array, np.float64) for name, array in vars(grouping).items()}
    semantic, tokens = arrays["semantic"], np.asarray(view.tokens[sample], np.float64)
    sees, there = np.asarray(view.sees[sample]), np.flatnonzero(view.valid[sample])
    drawn = {
        (m, n): (semantic[m] @ arrays["w_q"]) @ (tokens[n] @ arrays["w_k"]) / WIDTH**0.5
        for m in range(len(semantic))
        for n in there
    }
    seen_by = {n: sees[:, n].tolist() for n in there}
    members: dict[int, list[int]] = {}
    for n in there:
        own = []
        for m in range(limit):
            best = max(there, key=lambda other: drawn[m, other])
            if seen_by[best] == seen_by[n]:
                own.append(m)
        if own:
            members.setdefault(max(own, key=lambda m: drawn[m, n]), []).append(n)
    return {
        m: (
            some,
            max(some, key=lambda n: drawn[m, n]),
            semantic[m] + np.mean([tokens[n] @ arrays["w_v"] for n in some], 0) @ arrays["w_o"],
        )
        for m, some in members.items()
    }


# --- groups -----------------------------------------------------------------------------------


def test_groups_by_hand():
    """Of three semantic tokens one points right, one up, one left, where there is nothing."""
    one = jnp.eye(2)
    semantic = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    grouping = Grouping(semantic=semantic, w_q=one, w_k=one, w_v=2 * one, w_o=-one)
    view = view_of([[5, 1], [1, 3], [3, 1], [0, 1], [2, -1]])
    keep = run(method_of(3, grouping=grouping), view)[0].tokens
    assert keep.groups.tolist() == [[0, 1, 0, 1, 0]]
    assert keep.valid.tolist() == [[True, True, False]]
    assert keep.indices[0, :2].tolist() == [0, 1]  # the ones that are drawn there most
    expected = [[1 - 2 * 10 / 3, -2 * 1 / 3], [-2 * 0.5, 1 - 2 * 2]]
    np.testing.assert_allclose(keep.apply(view.tokens)[0, :2], expected, rtol=1e-6)


@pytest.mark.parametrize("limit", [None, [4, 1, 3, 2, 9]])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_those_of_slow_loops(seed: int, limit: list[int] | None):
    view, method = loud(seed), method_of(4, limit)
    keep = run(method, view)[0].tokens
    tokens, several = keep.apply(view.tokens), 0
    for sample in range(5):
        most = min(4 if limit is None else limit[sample], 4)
        expected = slow(view, method.grouping, sample, most)
        assert np.flatnonzero(keep.valid[sample]).tolist() == sorted(expected)
        groups = np.asarray(keep.groups[sample])
        assert (groups >= 0).sum() == sum(len(members) for members, _, _ in expected.values())
        for group, (members, stands, token) in expected.items():
            assert np.flatnonzero(groups == group).tolist() == members
            assert int(keep.indices[sample, group]) == stands
            np.testing.assert_allclose(tokens[sample, group], token, atol=2e-5)
            several += len(members) > 1
    assert several > 3


@pytest.mark.parametrize("seed", range(3))
def test_at_the_entry_every_token_is_in_one_group(seed: int):
    keep = run(method_of(3), entry_view(seed))[0].tokens
    assert (np.asarray(keep.groups) >= 0).all()


def test_padding_is_never_read():
    view, method = loud(1), method_of(4)
    other = replace(view, tokens=jnp.where(view.valid[..., None], view.tokens, -7.0))
    one, two = (run(method, some)[0].tokens for some in (view, other))
    for array, same in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(array, same)
    assert not one.valid[2].any()  # no image
    assert (np.asarray(one.groups)[~np.asarray(view.valid)] == -1).all()


def test_a_row_reads_nothing_of_what_it_does_not_see():
    """The sample of two images: whoever sees a group sees all its members."""
    view = loud(2)
    keep = run(method_of(4), view)[0].tokens
    columns = np.asarray(keep_columns(view.sees, keep)[3])
    seen = {tuple(column) for column in np.asarray(view.sees[3]).T if column.any()}
    assert len(seen) == 2
    for group in np.flatnonzero(keep.valid[3]):
        for member in np.flatnonzero(np.asarray(keep.groups[3]) == group):
            np.testing.assert_array_equal(columns[:, group], view.sees[3, :, member])


def test_a_sample_has_the_same_groups_alone():
    view, method = loud(3), method_of(4)
    together = run(method, view)[0].tokens
    for sample in range(5):
        own = run(method, alone(view, sample))[0].tokens
        for name in ("groups", "indices", "valid"):
            np.testing.assert_array_equal(getattr(own, name)[0], getattr(together, name)[sample])
        there = np.asarray(own.valid[0])
        np.testing.assert_allclose(own.tokens[0][there], together.tokens[sample][there], atol=1e-6)


def test_other_arrays_reuse_the_program():
    program = jax.jit(lambda method, view: method(view, ())[0].tokens.tokens)
    first, other = (method_of(4, grouping=grouping_of(4, seed=n)) for n in range(2))
    assert (program(first, loud(0)) != program(other, loud(0))).any()
    assert program._cache_size() == 1
    program(method_of(3), loud(0))
    assert program._cache_size() == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_new_tokens_have_the_number_type_of_the_old(dtype: Any):
    view = entry_view(0)
    view = replace(view, tokens=view.tokens.astype(dtype))
    keep = run(method_of(3), view)[0].tokens
    assert keep.tokens.dtype == jnp.float32
    assert keep.apply(view.tokens).dtype == dtype


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        (3, "made for keep=4, its number of semantic tokens; got keep=3"),
        (0, "keep at least 1 visual token, got keep=0"),
    ],
)
def test_a_budget_that_the_grouping_was_not_made_for_is_refused(keep: int, error: str):
    with pytest.raises(ValueError, match=error):
        VisToGGrouping(keep=keep, grouping=grouping_of(4))


def test_tokens_of_another_width_are_refused():
    with pytest.raises(ValueError, match="for tokens of width 6; the model shows some of width 8"):
        run(method_of(2, grouping=grouping_of(2, width=6)), entry_view())


def test_before_any_training_a_group_is_nearly_the_mean_of_its_tokens():
    view = entry_view(1)
    method = method_of(
        3, grouping=Grouping.around(jax.random.normal(jax.random.key(0), (3, WIDTH)))
    )
    keep = run(method, view)[0].tokens
    means = Merge.apply(keep, view.tokens)
    there = np.asarray(keep.valid)
    apart = np.asarray(keep.tokens - means)[there]
    own = np.asarray(jnp.broadcast_to(method.grouping.semantic, means.shape))[there]
    np.testing.assert_allclose(apart, own, atol=1e-6)
    np.testing.assert_allclose(np.sqrt((own**2).mean(axis=1)), 0.2, rtol=1e-5)  # of about 1
    assert len({tuple(row) for row in np.asarray(keep.groups)}) > 1


# --- training ---------------------------------------------------------------------------------


@jax.jit
def measured(grouping: Grouping, view: View, noise: jax.Array | None) -> jax.Array:
    """Some number that depends on all groups."""
    tokens = method_of(4, grouping=grouping).grouped(view, noise).tokens
    weights = jnp.sin(jnp.arange(tokens[0].size, dtype=jnp.float32)).reshape(tokens.shape[1:])
    return (tokens * weights[None]).sum()


def test_with_noise_the_gradient_reaches_every_array():
    view, grouping = entry_view(2), grouping_of(4)
    for noise, reached in ((None, False), (jax.random.key(1), True)):
        gradient = jax.grad(measured)(grouping, view, noise)
        for name, leaf in vars(gradient).items():
            assert np.isfinite(leaf).all()
            assert bool(leaf.any()) == (reached or name not in ("w_q", "w_k"))


def test_padding_leaves_the_gradient_finite():
    gradient = jax.grad(measured)(grouping_of(4), loud(0), jax.random.key(1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_gradient_is_that_of_a_softmax_at_the_hard_groups():
    """By a difference quotient: hard choices, which move with the softmax of what they came by."""
    view, grouping, key = entry_view(3), grouping_of(4), jax.random.key(5)
    noise = np.asarray(jax.random.gumbel(key, (3, 4, 7)), np.float64)
    tokens = np.asarray(view.tokens, np.float64)
    arrays = {name: np.asarray(array, np.float64) for name, array in vars(grouping).items()}
    weights = np.sin(np.arange(4 * WIDTH)).reshape(4, WIDTH)

    def soft(semantic: np.ndarray) -> np.ndarray:
        logits = (semantic @ arrays["w_q"]) @ np.swapaxes(tokens @ arrays["w_k"], 1, 2)
        powers = np.exp(logits / WIDTH**0.5 + noise)
        return powers / powers.sum(axis=1, keepdims=True)

    before = soft(arrays["semantic"])
    hard = (before == before.max(axis=1, keepdims=True)).astype(np.float64)

    def number(semantic: np.ndarray) -> float:
        joins = hard + soft(semantic) - before
        count = joins.sum(axis=2, keepdims=True)
        mean = joins @ tokens / np.where(count > 0.5, count, 1)
        return float(((semantic + mean @ arrays["w_v"] @ arrays["w_o"]) * weights).sum())

    np.testing.assert_allclose(measured(grouping, view, key), number(arrays["semantic"]), rtol=1e-4)
    gradient = jax.grad(measured)(grouping, view, key).semantic
    for place in ((0, 0), (1, 3), (2, 7), (3, 4)):
        step = np.zeros_like(arrays["semantic"])
        step[place] = 1e-5
        up, down = (number(arrays["semantic"] + sign * step) for sign in (1, -1))
        np.testing.assert_allclose(gradient[place], (up - down) / 2e-5, rtol=1e-3, atol=1e-4)
