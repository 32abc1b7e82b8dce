"""ZipVL against slow loops, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site, View
from catp_jax.pruning.zipvl import ZipVL
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import cache_view, kept, random_view, run, shown, view_of_weights


def visual_of(view: View, sample: int) -> list[int]:
    valid = np.asarray(view.valid[sample] & (view.numbers[sample] >= 0))
    return np.flatnonzero(valid).tolist()


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.975])
@pytest.mark.parametrize("keep", [1, 4, 9])
def test_as_many_stay_as_the_oracle_wants_and_has_room_for(keep: int, tau: float):
    for seed in range(3):
        for view in (cache_view(seed), replace(random_view(seed), site=Site.CACHE)):
            reduction, found = run(ZipVL(keep=keep, tau=tau), view)
            for sample in range(len(view.valid)):
                visual = visual_of(view, sample)
                if not visual:
                    continue
                wanted, expected = oracles.zipvl(
                    *shown(view, sample), visual=visual, tau=tau, room=keep
                )
                text = set(np.flatnonzero(view.valid[sample])) - set(visual)
                assert kept(reduction.tokens, sample) == sorted({*expected, *text})
                assert int(found.wanted[sample]) == wanted
                assert int(found.overflow[sample]) == max(wanted - keep, 0)


#         running sum .5  .7  .85 .95 1
WEIGHTS = [[[0.15, 0.5, 0.05, 0.2, 0.1]]]


@pytest.mark.parametrize(
    ("tau", "expected"), [(0.4, [1]), (0.6, [1, 3]), (0.8, [0, 1, 3]), (0.9, [0, 1, 3, 4])]
)
def test_hand_made_the_fewest_tokens_that_hold_the_share(tau: float, expected: list[int]):
    view = replace(view_of_weights(WEIGHTS), site=Site.CACHE)
    reduction, found = run(ZipVL(keep=5, tau=tau), view)
    assert kept(reduction.tokens, 0) == expected
    assert int(found.wanted[0]) == len(expected)
    assert int(found.overflow[0]) == 0


def test_hand_made_a_token_that_few_rows_can_see_is_judged_by_those():
    """The first token has most attention in sum, 1.3 of 2, but of two rows; the second has .7 of
    the only row that sees it.
    """
    view = replace(view_of_weights([[[1.0, 1e-9]], [[0.3, 0.7]]]), site=Site.CACHE)
    view = replace(view, sees=jnp.asarray([[[True, False], [True, True]]]))
    reduction, _ = run(ZipVL(keep=2, tau=0.6), view)
    assert kept(reduction.tokens, 0) == [1]


def test_a_limit_leaves_a_sample_fewer_and_counts_as_missing_room():
    view = cache_view()
    reduction, found = run(ZipVL(keep=9, tau=1.0, limit=jnp.asarray([2, 3, 9])), view)
    left = [len(set(kept(reduction.tokens, sample)) & set(range(9))) for sample in range(3)]
    assert left == [2, 3, 9]
    np.testing.assert_array_equal(found.overflow, [7, 3, 0])


def test_probes_are_the_last_rows_and_as_many_others():
    view = cache_view(visual=9, text=30)
    method = ZipVL(keep=9, probes=5)
    rows = np.asarray(method.rows(view))
    assert rows.shape == (3, 10)
    for sample, some in enumerate(rows):
        there = np.flatnonzero(np.asarray(view.sees[sample]).any(axis=1))
        assert set(there[-5:]) < set(some) <= set(there)
        assert len(set(some)) == 10
    others = {tuple(np.asarray(replace(method, seed=seed).rows(view))[0]) for seed in range(5)}
    assert len(others) == 5


def test_a_draw_depends_on_no_padding():
    view = cache_view(visual=9, text=30)
    longer = replace(view, sees=jnp.pad(view.sees, ((0, 0), (0, 4), (0, 0))))
    np.testing.assert_array_equal(
        ZipVL(keep=9, probes=5).rows(view), ZipVL(keep=9, probes=5).rows(longer)
    )


def test_attention_over_the_prompt_is_among_what_stays():
    reduction, _ = run(ZipVL(keep=4), cache_view())
    np.testing.assert_array_equal(reduction.among.indices, reduction.tokens.indices)
    np.testing.assert_array_equal(reduction.among.valid, reduction.tokens.valid)


@pytest.mark.parametrize("tau", [0.0, 1.5, -1.0])
def test_a_share_that_is_none_is_refused(tau: float):
    with pytest.raises(ValueError, match="tau above 0 and at most 1"):
        ZipVL(keep=3, tau=tau)


def test_no_probe_is_refused():
    with pytest.raises(ValueError, match="at least 1 probe"):
        ZipVL(keep=3, probes=0)
