"""How near a layer's output stays in few directions, against slow loops, and Eigen Attention's
search for the fewest.
"""

from typing import Any

import numpy as np
import pytest

from catp_jax.contract import Basis, View
from catp_jax.pruning.eigen import Near, search
from tests.pruning.oracles import attention_row
from tests.pruning.test_eigen import (
    every_view,
    random_bases,
    random_directions,
    slow_ranks,
    values_of,
)
from tests.pruning.views import cache_view, run, shown


@every_view
@pytest.mark.parametrize("ranks", [(2, 3), (4, 1), (1, 4), (4, 4)])
def test_how_near_a_layer_stays_is_what_loops_give(view: View, ranks: tuple[int, int]):
    keys_in, values_in = random_bases(ranks)
    projections = [
        np.asarray(basis.matrix, np.float64) @ np.asarray(basis.matrix, np.float64).swapaxes(1, 2)
        for basis in (keys_in, values_in)
    ]
    found = run(Near(bases={view.layer: (keys_in, values_in)}), view)[1]
    for sample in range(len(view.valid)):
        queries, keys, sees = shown(view, sample)
        values = values_of(view, sample)
        off = [
            np.einsum("nkd,kde->nke", array, by)
            for array, by in zip((keys, values), projections, strict=True)
        ]
        output = error = 0.0
        for row, head in np.ndindex(len(sees), queries.shape[1]):
            own = head // 2
            whole = attention_row(queries, keys, sees, row, head) @ values[:, own]
            mine = attention_row(queries, off[0], sees, row, head) @ off[1][:, own]
            output += (whole**2).sum()
            error += ((mine - whole) ** 2).sum()
        np.testing.assert_allclose(found.output[sample], output, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.error[sample], error, rtol=1e-3, atol=1e-6)


def test_how_near_a_layer_stays_is_not_asked_of_other_layers():
    found = run(Near(bases={9: random_bases((1, 1))}), cache_view())[1]
    assert not found.output.any()
    assert not found.error.any()


def counts_of(bases: dict[int, tuple[Basis, Basis]]) -> dict[int, tuple[int, ...]]:
    """How many directions are not zero, of arrays that are always whole."""
    for pair in bases.values():
        assert {basis.matrix.shape for basis in pair} == {(2, 6, 6)}
    return {
        layer: tuple(int(basis.matrix.any(axis=(0, 1)).sum()) for basis in pair)
        for layer, pair in bases.items()
    }


def test_a_search_ends_a_step_before_a_layer_is_off_by_more():
    found = random_directions(4)
    limits, asked = {0: 8, 1: 0, 2: 11}, []

    def errors(bases: Any) -> dict[int, float]:
        counts = counts_of(bases)
        asked.append(counts)
        return {
            layer: 0.0249 if sum(counts[layer]) >= limits[layer] else 0.025
            for layer in found.layers
        }

    chosen = search(found, errors)
    shares = [1 - 0.02 * number for number in range(len(asked))]
    for layer, limit in limits.items():
        expected = (6, 6)
        for share in shares:
            number = 2 * layer
            ranks = tuple(slow_ranks(found, share)[number : number + 2])
            if sum(ranks) < limit:
                break
            expected = ranks
        assert chosen[layer] == expected
    assert chosen[1] == (1, 1)  # it was never off
    assert sum(chosen[0]) == min(sum(some[0]) for some in asked if sum(some[0]) >= 8) < 12


def test_a_search_leaves_all_where_every_step_is_too_much():
    found = random_directions(4)
    calls = []

    def errors(bases: Any) -> dict[int, float]:
        calls.append(bases)
        return dict.fromkeys(found.layers, 0.5)

    assert search(found, errors) == dict.fromkeys(found.layers, (6, 6))
    assert len(calls) == 1
