"""VisToG's grouping against slow loops, by hand and in both models; other tokens at a site."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Keep, Merge, Replace, Site, View, chain, keep_columns, reduce_view
from catp_jax.generation import generate as programs
from catp_jax.pruning import FastV, KNorm, L2Norm, Pool, Random
from catp_jax.pruning.scores import rank
from catp_jax.pruning.vistog_grouping import Grouping, VisToGGrouping
from catp_jax.struct import replace
from tests.generation.test_cache_sites import generate, inputs_of, model_of, prompts_of
from tests.pruning.views import entry_view, kept, prune, random_view, run

WIDTH = 8  # of the views' tokens


def grouping_of(groups: int, width: int = WIDTH, seed: int = 0) -> Grouping:
    """One with all its arrays at random."""
    rng = np.random.default_rng(seed)

    def draw(rows: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(rows, width)) * 1.5 / width**0.5, jnp.float32)

    return Grouping(
        semantic=2 * draw(groups),
        w_q=draw(width),
        w_k=draw(width),
        w_v=draw(width),
        w_o=draw(width),
    )


def method_of(groups: int, limit: list[int] | None = None, **options: Any) -> VisToGGrouping:
    limits = None if limit is None else jnp.asarray(limit, jnp.int32)
    grouping = options.pop("grouping", None) or grouping_of(groups)
    return VisToGGrouping(keep=groups, grouping=grouping, limit=limits, **options)


def view_of(tokens: Sequence[Sequence[float]]) -> View:
    """One sample's tokens at the entry."""
    array = np.asarray(tokens, np.float32)[None]
    number = array.shape[1]
    return View(
        site=Site.ENTRY,
        layer=0,
        num_visual=number,
        tokens=jnp.asarray(array),
        numbers=jnp.arange(number, dtype=jnp.int32)[None],
        valid=jnp.ones((1, number), bool),
        sees=jnp.ones((1, 2, number), bool),
    )


def loud(seed: int) -> View:
    """A view of samples of every kind; padding holds large numbers."""
    view = random_view(seed)
    tokens = jnp.where(view.valid[..., None], view.tokens, 100 * view.tokens)
    return replace(view, tokens=tokens)


def alone(view: View, sample: int) -> View:
    return jax.tree.map(lambda array: array[sample : sample + 1], view)


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


# --- other tokens, in the contract --------------------------------------------------------------


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


# --- in whole models --------------------------------------------------------------------------


WIDTHS = {"opt": 15, "mllama": 24}  # of the tiny models' tokens
GROUPS = 5


def in_model(kind: str, groups: int = GROUPS) -> VisToGGrouping:
    return method_of(groups, grouping=grouping_of(groups, WIDTHS[kind]))


def prefill(kind: str, pruners: tuple[Any, ...]) -> programs.Prefilled:
    return programs.prefill(model_of(kind), pruners, inputs_of(kind), new_slots=2)


def test_opt_reads_the_new_tokens():
    """As if its queries had ended in them."""

    @jax.jit
    def logits(model: Any, inputs: Any, method: Any) -> tuple[jax.Array, Keep]:
        front = model.front(inputs)
        new = method(front.view, ())[0].tokens
        places = jnp.broadcast_to(jnp.arange(GROUPS, dtype=jnp.int32), new.indices.shape)
        own = Keep(indices=places, valid=new.valid)
        return model.rows(replace(front, visual=new.tokens), own), new

    expected, new = logits(model_of("opt"), inputs_of("opt"), in_model("opt"))
    last = GROUPS + np.asarray(inputs_of("opt").token_valid).sum(axis=1) - 1
    start = prefill("opt", (in_model("opt"),))
    np.testing.assert_allclose(start.logits, expected[np.arange(4), last], atol=1e-5, rtol=1e-5)
    assert float(jnp.abs(start.logits - prefill("opt", ()).logits).max()) > 1e-2
    np.testing.assert_array_equal(start.selection.kept.valid, new.valid)
    assert start.selection.merged


def test_llamas_layers_make_keys_and_values_of_the_new_tokens():
    start = prefill("mllama", (in_model("mllama"),))
    model, method = model_of("mllama"), in_model("mllama")
    view = jax.jit(lambda model, inputs: model.front(inputs).view)(model, inputs_of("mllama"))
    new = run(method, view)[0].tokens
    assert new.valid.any(axis=1).tolist() == [True, True, False, True, True]
    numbers = np.asarray(view.numbers)
    (part,) = start.cache.cross
    for block, layer in zip(part.blocks, (0, 2), strict=True):
        made = model.language_model.layers[layer].cross_attn.project(new.tokens)
        for row, group in np.argwhere(new.valid):
            stands = int(new.indices[row, group])
            assert int(part.numbers[row, group]) == numbers[row, stands]
            for name in ("keys", "values"):
                found = getattr(block, name)[row, :, group]
                np.testing.assert_allclose(found, getattr(made, name)[row, group], atol=1e-5)


@pytest.mark.parametrize("groups", [1, GROUPS, 90])  # 90: more than there are tokens
@pytest.mark.parametrize("kind", WIDTHS)
def test_the_cache_is_as_long_as_there_are_groups(kind: str, groups: int):
    start = prefill(kind, (in_model(kind, groups),))
    assert np.isfinite(start.logits).all()
    assert {part.num_visual for part in prompts_of(start.cache)} == {groups}


@pytest.mark.parametrize("kind", WIDTHS)
def test_beams_and_greedy_answers_are_finite(kind: str):
    for beams in (0, 3):
        out = generate.__wrapped__(kind, (in_model(kind),), beams)  # arrays have no hash
        assert out.is_finite.all()
        assert out.selection.kept.indices.shape[1] == GROUPS


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("mllama", (KNorm(keep=3), FastV(keep=2, site=Site.CROSS))),
        ("opt", (Pool(keep=3, site=Site.ENTRY), Random(keep=2, site=Site.ENTRY))),
    ],
)
def test_other_methods_go_on_with_the_groups(kind: str, others: tuple[Any, ...]):
    start = prefill(kind, (in_model(kind), *others))
    assert np.isfinite(start.logits).all()
    assert {part.num_visual for part in prompts_of(start.cache)} == {2}


@pytest.mark.parametrize("row", range(4))
def test_a_prompt_is_answered_alone_as_in_the_batch(row: int):
    together = prefill("opt", (in_model("opt"),))
    inputs = inputs_of("opt").alone(row)
    alone = programs.prefill(model_of("opt"), (in_model("opt"),), inputs, new_slots=2)
    np.testing.assert_allclose(alone.logits[0], together.logits[row], atol=1e-5)
