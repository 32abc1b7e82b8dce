"""ThinK against slow loops, and by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Attention, Site, View
from catp_jax.pruning import make
from catp_jax.pruning.think import ThinK
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.pruning.views import cache_view, random_view, run, shown


def select(view: View, keep: int):
    return run(ThinK(keep=keep), view)[0].keys


VIEWS = {  # with the budgets that leave 4, 3, 2 and 1 of four channels
    "text too": (cache_view(1, visual=15, text=12), (15, 13, 11, 9)),
    "visual": (replace(random_view(2), site=Site.CACHE), (13, 11, 9, 8)),
}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [3, 8])
@pytest.mark.parametrize("of", VIEWS)
def test_each_head_keeps_the_oracles_channels(of: str, number: int, window: int):
    view, budgets = VIEWS[of]
    chosen = run(ThinK(keep=budgets[4 - number], window=window), view)[0].keys
    assert chosen.indices.shape[2] == number
    assert chosen.recent == min(window, view.valid.shape[1] - view.num_visual)
    for sample in range(view.valid.shape[0]):
        queries, keys, sees = shown(view, sample)
        valid = np.flatnonzero(view.valid[sample])
        for head in range(3):
            own = oracles.think(queries, keys[valid], sees, head=head, number=number, window=window)
            assert chosen.indices[sample, head].tolist() == own


def test_hand_made_a_channel_counts_by_both_its_queries_and_its_keys():
    #                       channels: 0    1    2    3
    queries, keys = [[3.0, 0.1, 1.0, 2.0]], [[0.1, 9.0, 2.0, 2.0]]  # products .3 .9 2 4
    view = View(
        site=Site.CACHE,
        layer=0,
        num_visual=4,
        attention=Attention(
            queries=jnp.asarray([queries])[:, :, None], keys=jnp.asarray([keys * 4])[:, :, None]
        ),
        values=jnp.zeros((1, 4, 1, 4)),
        numbers=jnp.arange(4, dtype=jnp.int32)[None],
        valid=jnp.ones((1, 4), bool),
        sees=jnp.ones((1, 1, 4), bool),
    )
    assert select(view, 4).indices[0, 0].tolist() == [0, 1, 2, 3]
    assert select(view, 3).indices[0, 0].tolist() == [2, 3]
    assert select(view, 1).indices[0, 0].tolist() == [3]  # no more can leave


def test_channels_leave_in_eights_and_never_more_than_the_budget_asks_for():
    """128 channels of 64 entries: 60 of 64 tokens are worth 16 channels, 61 of them 12."""
    method = {keep: ThinK(keep=keep).channels(128, 64) for keep in (33, 60, 61, 64, 100)}
    assert method == {33: 8, 60: 112, 61: 120, 64: 128, 100: 128}
    assert ThinK(keep=51).channels(128, 64) == 80  # the paper's λ = 0.4: 76.8
    assert ThinK(keep=5).channels(128, 64) == 8  # whatever less is asked for


def test_a_budget_is_a_share_of_what_there_is_and_not_of_the_room_for_it():
    """Three tokens in a layer with room for thirteen; all of them are all."""
    view = replace(random_view(2), site=Site.CACHE)
    method = make("think", 3, frozenset({Site.CACHE}), of=3)
    assert run(method, view)[0].keys.indices.shape[2] == 4


@pytest.mark.parametrize(
    ("options", "says"), [({"keep": 0}, "got keep=0"), ({"window": 0}, "at least 1, got 0")]
)
def test_what_cannot_be_is_refused(options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        ThinK(**{"keep": 3, **options})


def test_a_layer_that_reads_text_alone_is_left():
    assert run(ThinK(keep=3), replace(cache_view(), num_visual=0))[0].keys is None
