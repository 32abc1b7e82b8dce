"""CSP against slow loops, and by hand."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Attention, Site, View
from catp_jax.pruning.csp import CSP, n_softmax
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import cache_view, kept, random_view, run, shown


def select(view: View, keep: int, **options):
    return run(CSP(keep=keep, **options), view)[0].tokens


def visual_and_text(view: View, sample: int) -> tuple[list[int], list[int]]:
    numbers, valid = np.asarray(view.numbers[sample]), np.asarray(view.valid[sample])
    return (
        np.flatnonzero(valid & (numbers >= 0)).tolist(),
        np.flatnonzero(valid & (numbers < 0)).tolist(),
    )


@pytest.mark.parametrize("keep", [1, 4, 9])
@pytest.mark.parametrize("ratio", ["0", "0.5", "0.9", "1"])
def test_each_head_keeps_what_the_oracle_does(keep: int, ratio: str):
    for seed in range(2):
        view = cache_view(seed, text=22)
        chosen = select(view, keep, ratio=jnp.float32(ratio))
        for sample in range(3):
            visual, text = visual_and_text(view, sample)
            for head in range(3):
                assert kept(chosen, sample, head) == oracles.csp(
                    *shown(view, sample),
                    head=head,
                    visual=visual,
                    text=text,
                    rows_of_visual=9,
                    keep=keep,
                    ratio=Fraction(ratio),
                )


@pytest.mark.parametrize("keep", [1, 4])
def test_where_all_columns_are_visual_the_best_by_inter_stay(keep: int):
    view = replace(random_view(1), site=Site.CACHE)
    chosen = select(view, keep)
    for sample in range(5):
        visual = np.flatnonzero(view.valid[sample]).tolist()
        for head in range(3):
            expected = oracles.csp(
                *shown(view, sample),
                head=head,
                visual=visual,
                text=[],
                rows_of_visual=0,
                keep=keep,
                ratio=Fraction(1),  # there is no other list
            )
            assert kept(chosen, sample, head) == expected


def test_hand_made_text_may_go_for_what_is_seen():
    """Two visual tokens and three words of one head; the last word looks and stays. Of two others
    one goes to the best word, one to the best visual token; or all to words, or to what is seen.
    """
    #        visual     text
    weights = [3, 1, 2, 4, 1]
    n = len(weights)
    view = View(
        site=Site.CACHE,
        layer=0,
        num_visual=2,
        attention=Attention(
            queries=jnp.broadcast_to(jnp.log(jnp.asarray(weights, jnp.float32)), (1, n, 1, n)),
            keys=jnp.eye(n)[None, :, None],
        ),
        values=jnp.zeros((1, n, 1, n)),
        numbers=jnp.asarray([[0, 1, -1, -1, -1]], jnp.int32),
        valid=jnp.ones((1, n), bool),
        sees=jnp.tril(jnp.ones((n, n), bool))[None],
    )
    # keep 1 and three words: four entries, one of them the last word's
    assert kept(select(view, 1, ratio=0.34), 0, 0) == [0, 2, 3, 4]
    assert kept(select(view, 1, ratio=0.7), 0, 0) == [0, 1, 3, 4]
    limited = select(view, 2, ratio=0.34, limit=jnp.asarray([1], jnp.int32))
    assert kept(limited, 0, 0) == [0, 2, 3, 4]


def test_a_full_budget_keeps_everything_and_a_row_of_text_alone_is_left():
    view = cache_view()
    chosen = select(view, 100)
    for sample in range(3):
        visual, text = visual_and_text(view, sample)
        for head in range(3):
            assert kept(chosen, sample, head) == [*visual, *text]
    assert run(CSP(keep=3), replace(view, num_visual=0))[0].tokens is None


def test_an_n_softmax_leaves_a_part_to_nothing():
    logits = jnp.asarray([1.0, -2.0, 90.0]).reshape(1, 1, 1, 3)
    sees = jnp.asarray([True, True, False]).reshape(1, 1, 1, 3)
    total = 1 + math.exp(1) + math.exp(-2)
    expected = [math.exp(1) / total, math.exp(-2) / total, 0]
    np.testing.assert_allclose(n_softmax(logits, sees).ravel(), expected, rtol=1e-6)
    assert float(n_softmax(logits, sees | True).ravel()[2]) == 1  # no overflow


@pytest.mark.parametrize(
    ("options", "says"),
    [({"ratio": 1.5}, "a ratio between 0 and 1, got 1.5"), ({"keep": 0}, "got keep=0")],
)
def test_what_cannot_be_is_refused(options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        CSP(**{"keep": 3, **options})
