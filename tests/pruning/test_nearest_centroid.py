"""Nearest centroids against slow loops, by hand, and at a full budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Keep, Site, View
from catp_jax.pruning import Uniform
from catp_jax.pruning.nearest_centroid import NearestCentroid
from catp_jax.struct import replace
from tests.pruning.groupings import alone, loud, view_of
from tests.pruning.test_vistog_in_models import prefill
from tests.pruning.views import entry_view, kept, random_view, run


def slow(view: View, centroids: Keep, sample: int) -> dict[int, list[int]]:
    """Each centroid's group."""
    tokens, sees = np.asarray(view.tokens[sample], np.float64), np.asarray(view.sees[sample])
    own, groups = kept(centroids, sample), {}
    for n in np.flatnonzero(view.valid[sample]).tolist():
        may = [c for c in own if (sees[:, c] == sees[:, n]).all()]
        if n in own:
            groups.setdefault(n, []).append(n)
        elif may:
            lengths = np.linalg.norm(tokens, axis=1)
            best = max(may, key=lambda c: tokens[c] @ tokens[n] / lengths[c] / lengths[n])
            groups.setdefault(best, []).append(n)
    return groups


def test_groups_by_hand():
    """Of six tokens the third and the last are centroids."""
    view = view_of([[1, 1], [-3, 0], [0, 2], [1, 9], [-9, 5], [-1, 0]])
    keep = run(NearestCentroid(keep=2), view)[0].tokens
    assert keep.groups.tolist() == [[0, 1, 0, 0, 1, 1]]
    np.testing.assert_allclose(keep.apply(view.tokens)[0], [[2 / 3, 4], [-13 / 3, 5 / 3]])
    assert kept(keep, 0) == [2, 5]


@pytest.mark.parametrize("limit", [None, [3, 1, 2, 2, 9]])
@pytest.mark.parametrize("seed", range(4))
def test_groups_are_those_of_slow_loops(seed: int, limit: list[int] | None):
    view, limits = loud(seed), None if limit is None else jnp.asarray(limit, jnp.int32)
    keep = run(NearestCentroid(keep=4, limit=limits), view)[0].tokens
    centroids = run(Uniform(keep=4, limit=limits), view)[0].tokens
    for sample in range(5):
        expected = slow(view, centroids, sample)
        groups = np.asarray(keep.groups[sample])
        assert np.asarray(keep.valid[sample]).sum() == len(expected)
        for place, centroid in enumerate(kept(centroids, sample)):
            assert np.flatnonzero(groups == place).tolist() == expected[centroid]
        assert (groups >= 0).sum() == sum(map(len, expected.values()))


@pytest.mark.parametrize("view", [random_view(1), entry_view(1)], ids=["cross", "entry"])
def test_a_full_budget_leaves_all_tokens_as_they_are(view: View):
    view = replace(view, tokens=view.tokens.at[:, 1].set(2 * view.tokens[:, 0]))  # of one direction
    keep = run(NearestCentroid(keep=50), view)[0].tokens
    for sample in range(view.valid.shape[0]):
        there = np.asarray(view.valid[sample])
        found = keep.apply(view.tokens)[sample][np.asarray(keep.valid[sample])]
        np.testing.assert_array_equal(found, view.tokens[sample][there])


def test_padding_is_never_read_and_a_sample_has_the_same_groups_alone():
    view = loud(2)
    together = run(NearestCentroid(keep=4), view)[0].tokens
    for sample in range(5):
        own = replace(alone(view, sample), tokens=random_view(2).tokens[sample : sample + 1])
        keep = run(NearestCentroid(keep=4), own)[0].tokens
        for array, same in zip(jax.tree.leaves(keep), jax.tree.leaves(together), strict=True):
            np.testing.assert_array_equal(array[0], same[sample])


@pytest.mark.parametrize(("kind", "site"), [("opt", Site.ENTRY), ("mllama", Site.CROSS)])
def test_a_full_budget_changes_no_answer(kind: str, site: Site):
    whole, same = (prefill(kind, some) for some in ((), (NearestCentroid(keep=99, site=site),)))
    np.testing.assert_allclose(same.logits, whole.logits, atol=1e-5)
    assert same.selection.merged
