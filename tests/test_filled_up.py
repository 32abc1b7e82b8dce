"""An oracle among copies of a background token: what the copies are, and that it runs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import filled_up
from benchmarks.filled_up import Filled, filled
from catp_jax.pruning.oracle import Oracle
from catp_jax.struct import replace
from tests.pruning.views import random_view, run
from tests.shallow import shallow


def test_the_needed_stay_and_one_background_token_takes_all_other_places():
    view = random_view()
    view = replace(view, valid=jnp.ones_like(view.valid), sees=jnp.ones_like(view.sees))
    rng, tokens = np.random.default_rng(1), np.asarray(view.tokens)
    needed = rng.random(view.valid.shape) * (rng.random(view.valid.shape) < 0.4)
    needed = needed.astype(np.float32)
    pruner = Filled(keep=13, kept=2, needed=jnp.asarray(needed))
    keep = run(pruner, view)[0].tokens
    assert np.asarray(keep.valid).all()
    for row, indices in enumerate(np.asarray(keep.indices)):
        assert {*indices[:2].tolist()} == {*np.argsort(-needed[row])[:2].tolist()}
        others = np.flatnonzero(needed[row] == 0)
        mean = tokens[row, others].mean(axis=0)
        copy = others[np.argmin(((tokens[row, others] - mean) ** 2).sum(axis=1))]
        assert {*indices[2:].tolist()} == {int(copy)}


def test_budgets_of_their_own_are_refused():
    oracle = Oracle(keep=2, needed=jnp.ones((2, 6)), limit=jnp.array([2, 1]))
    with pytest.raises(ValueError, match="as many visual tokens each"):
        filled(oracle, 6)


def test_it_runs(capsys):
    filled_up.main([str(shallow("mini-llama-vision")), "--scenes", "2", "--shares", "100%", "6%"])
    (found,) = json.loads(capsys.readouterr().out.splitlines()[-1])["models"].values()
    for family in found["families"].values():
        assert family["filled, 100%"]["accuracy"] == family["unpruned"]["accuracy"]
    assert {"leaning", "to oracle"} < {*found["families"]["count"]["filled, 6%"]}
