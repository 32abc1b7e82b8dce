"""Trimmed Llama against the paper's selection in slow loops, and by hand."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site, View
from catp_jax.pruning.trimmed_llama import TrimmedLlama, TrimmedReport
from tests.pruning import oracles
from tests.pruning.views import kept, random_view, run, shown, view_of_weights, with_attention


def select(pruner: TrimmedLlama, view: View):
    reduction, report = run(pruner, view)
    return reduction.tokens, report


# Two rows, two heads, six columns; each row's weights sum to 1.
#
#            column   0    1    2    3    4    5
HAND = [
    [[0.40, 0.30, 0.10, 0.10, 0.05, 0.05], [0.05, 0.40, 0.10, 0.30, 0.10, 0.05]],
    [[0.50, 0.20, 0.10, 0.05, 0.05, 0.10], [0.10, 0.20, 0.10, 0.40, 0.05, 0.15]],
]
# received
#     head 0        .90  .50  .20  .15  .10  .15    best two: 0, 1
#     head 1        .15  .60  .20  .70  .15  .20    best two: 3, 1    union 0, 1, 3
#     both         1.05 1.10  .40  .85  .25  .35    of 4 (two rows, two heads)


def test_hand_made_union_of_two_heads():
    keep, report = select(TrimmedLlama(keep=4, per_head=2), view_of_weights(HAND))
    assert kept(keep, 0) == [0, 1, 3]
    assert keep.valid.tolist() == [[True, True, True, False]]
    assert report.union.tolist() == [3]
    assert report.overflow.tolist() == [0]
    np.testing.assert_allclose(report.mass, [(1.05 + 1.10 + 0.85) / 4], rtol=1e-6)


def test_hand_made_union_that_does_not_fit_goes_by_best_rank_then_by_all_heads():
    keep, report = select(TrimmedLlama(keep=2, per_head=2), view_of_weights(HAND))
    assert kept(keep, 0) == [0, 3]  # each a head's first; 1 is first of none, though it has most
    assert (report.union.tolist(), report.overflow.tolist()) == ([3], [1])
    np.testing.assert_allclose(report.mass, [(1.05 + 0.85) / 4], rtol=1e-6)

    keep, _ = select(TrimmedLlama(keep=1, per_head=2), view_of_weights(HAND))
    assert kept(keep, 0) == [0]  # 0 and 3 are both firsts; 0 has 1.05 in all, 3 has .85


def test_hand_made_fixed_count_takes_ranks_in_turn():
    # ranks: head 0 has 0 1 2 then 3 and 5 alike; head 1 has 3 1 then 2 and 5 alike
    keep, report = select(TrimmedLlama(keep=4), view_of_weights(HAND))
    assert kept(keep, 0) == [0, 1, 2, 3]
    assert (report.union.tolist(), report.overflow.tolist()) == ([4], [0])


def test_hand_made_k_ratio_rounds_up():
    # 6 columns: .34 asks for ⌈2.04⌉ = 3 a head, that is 0 1 2 and 3 1 2 (2 before 5, equal)
    keep, report = select(TrimmedLlama(keep=None, k_ratio=0.34), view_of_weights(HAND))
    assert kept(keep, 0) == [0, 1, 2, 3]
    assert keep.indices.shape == (1, 6)
    assert report.union.tolist() == [4]


FORMS = {
    "fixed": ({"keep": 4}, {"capacity": 4}),
    "fixed, more than there are": ({"keep": 12}, {"capacity": 12}),
    "union": ({"keep": 6, "per_head": 2}, {"capacity": 6, "per_head": 2}),
    "union, cut": ({"keep": 3, "per_head": 3}, {"capacity": 3, "per_head": 3}),
    "union, uncut": ({"keep": None, "per_head": 1}, {"capacity": None, "per_head": 1}),
    "ratio": ({"keep": None, "k_ratio": 0.25}, {"capacity": None, "k_ratio": "0.25"}),
    "ratio, cut": ({"keep": 4, "k_ratio": 0.3}, {"capacity": 4, "k_ratio": "0.3"}),
    "ratio of one": ({"keep": None, "k_ratio": 1.0}, {"capacity": None, "k_ratio": "1"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_selection_and_report_are_the_oracles(form: str, seed: int):
    options, expected = FORMS[form]
    view = random_view(seed)
    keep, report = select(TrimmedLlama(**options), view)
    for sample in range(5):
        oracle = oracles.trimmed_llama(*shown(view, sample), **expected)
        assert kept(keep, sample) == oracle.kept
        assert int(report.union[sample]) == oracle.union
        assert int(report.overflow[sample]) == oracle.overflow
        np.testing.assert_allclose(report.mass[sample], oracle.mass, atol=2e-6)


def test_a_sample_without_an_image_keeps_nothing_and_reports_zeros():
    keep, report = select(TrimmedLlama(keep=4), random_view())
    assert not keep.valid[2].any()
    assert (int(report.union[2]), int(report.overflow[2]), float(report.mass[2])) == (0, 0, 0.0)


def test_query_heads_read_the_key_head_of_their_group():
    # 4 query heads over 2 key heads, one row, 6 columns, one wish each. Group 0 (heads 0, 1)
    # reads keys e0 … e5, group 1 (heads 2, 3) the same keys in reverse order.
    eye = np.eye(6)
    queries = np.zeros((1, 1, 4, 6))
    for head, channel in enumerate([0, 2, 0, 2]):
        queries[0, 0, head, channel] = 5
    view = with_attention(
        view_of_weights([[[1.0] * 6]]),
        queries=jnp.asarray(queries, jnp.float32),
        keys=jnp.asarray(np.stack([eye, eye[::-1]], axis=1)[None], jnp.float32),
    )
    keep, _ = select(TrimmedLlama(keep=None, per_head=1), view)
    assert kept(keep, 0) == [0, 2, 3, 5]  # heads 0, 1 → 0, 2; heads 2, 3 → 5, 3


def test_rows_that_see_no_image_have_no_vote():
    view = random_view()
    other = jax.random.normal(jax.random.key(5), view.attention.queries.shape) * 3
    blind = ~view.sees.any(axis=2)[:, :, None, None]
    changed = with_attention(view, queries=jnp.where(blind, other, view.attention.queries))
    pruner = TrimmedLlama(keep=5, per_head=2)
    before, after = select(pruner, view), select(pruner, changed)
    jax.tree.map(np.testing.assert_array_equal, before, after)

    turned = with_attention(view, queries=jnp.where(blind, view.attention.queries, other))
    assert kept(select(pruner, turned)[0], 0) != kept(before[0], 0)


def test_k_ratio_counts_each_samples_own_tokens():
    view = random_view()
    keep, _ = select(TrimmedLlama(keep=None, k_ratio=0.5), view)
    available = view.valid.sum(axis=1).tolist()
    assert available == [13, 9, 0, 11, 6]
    for sample, count in enumerate(available):
        # with one distinct wish per rank the union holds at least k and at most h·k
        k = math.ceil(count / 2)
        assert k <= len(kept(keep, sample)) <= min(count, 6 * k)


@pytest.mark.parametrize("ratio", ["0.05", "0.1", "0.15", "0.25", "0.3", "0.35", "0.7", "1"])
def test_k_is_exactly_the_ceiling_of_ratio_times_count(ratio: str):
    # one head, so that the union is k itself; N up to five images of four full tiles
    counts = [1, 2, 3, 7, 10, 20, 40, 65, 100, 260, 1601, 3202, 6404, 12808, 19212, 25616, 32020]
    asked = jax.jit(
        jax.vmap(
            lambda valid: TrimmedLlama(keep=None, k_ratio=float(ratio))._per_head(_row(valid))[0],
        )
    )(jnp.arange(max(counts))[None] < jnp.asarray(counts)[:, None])
    assert asked.tolist() == [math.ceil(Fraction(ratio) * count) for count in counts]


def test_a_tiny_k_ratio_still_asks_for_one():
    view = random_view()
    _, report = select(TrimmedLlama(keep=None, k_ratio=1e-6), view)
    assert (np.asarray(report.union) >= np.asarray(view.valid.any(axis=1))).all()
    assert int(report.union[2]) == 0


def _row(valid: jax.Array) -> View:
    columns = valid.shape[0]
    return View(
        site=Site.CROSS,
        layer=0,
        num_visual=columns,
        tokens=jnp.zeros((1, columns, 1)),
        attention=None,
        values=None,
        evidence=None,
        numbers=jnp.zeros((1, columns), jnp.int32),
        valid=valid[None],
        sees=valid[None, None],
    )


def test_another_k_ratio_reuses_the_program():
    fresh = jax.jit(lambda pruner, view: pruner(view, pruner.start(view)))
    view = random_view()
    unions = [
        fresh(TrimmedLlama(keep=None, k_ratio=jnp.asarray(ratio)), view)[1].union.tolist()
        for ratio in (0.05, 0.1, 1.0)
    ]
    assert fresh._cache_size() == 1
    assert sum(unions[0]) < sum(unions[1]) < sum(unions[2])
    fresh(TrimmedLlama(keep=3, k_ratio=jnp.asarray(0.1)), view)
    assert fresh._cache_size() == 2


def test_report_and_selection_have_the_shapes_of_start():
    view = random_view()
    pruner = TrimmedLlama(keep=4)
    start, (_, end) = pruner.start(view), run(pruner, view)
    assert isinstance(end, TrimmedReport)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), start) == jax.tree.map(
        lambda a: (a.shape, a.dtype), end
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": None}, "per_head or k_ratio"),
        ({"keep": 4, "per_head": 2, "k_ratio": 0.5}, "not both"),
        ({"keep": 4, "per_head": 0}, "at least 1"),
        ({"keep": 4, "per_head": -3}, "at least 1"),
        ({"keep": 4, "k_ratio": 0.0}, "0 < k_ratio <= 1"),
        ({"keep": 4, "k_ratio": -0.5}, "0 < k_ratio <= 1"),
        ({"keep": 4, "k_ratio": 1.5}, "0 < k_ratio <= 1"),
        ({"keep": 4, "k_ratio": math.nan}, "0 < k_ratio <= 1"),
    ],
)
def test_impossible_forms_are_refused(options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        TrimmedLlama(**options)
