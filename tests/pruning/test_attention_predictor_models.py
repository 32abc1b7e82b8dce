"""AttentionPredictor in both models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.pruning.attention_predictor import AttentionPredictor, State
from tests import random_blip2 as blip2
from tests import random_mllama as mllama
from tests.generation.test_cache_sites import (
    KINDS,
    NEW,
    generate,
    inputs_of,
    model_of,
    rows_of,
    steps,
)
from tests.pruning.test_attention_predictor import method_of, network

SIZES = {"mllama": {"keep": 8, "block": 4}, "opt": {"keep": 4, "block": 2}}


def predictor(kind: str, **options: Any) -> AttentionPredictor:
    return method_of(**{**SIZES[kind], "refresh": 2, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_reads_less_and_its_state_counts_the_steps(kind: str):
    method = predictor(kind)
    found, (states,) = steps.__wrapped__(kind, (method,))
    whole, _ = steps(kind, ())
    assert bool(jnp.isfinite(found).all())
    np.testing.assert_allclose(found[:, 0], whole[:, 0], rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(found[:, 1:] - whole[:, 1:]).max()) > 1e-3
    assert len(states) == 3
    for layer, state in states.items():
        assert isinstance(state, State)
        if kind == "mllama" and layer not in mllama.CONFIG.text.cross_attention_layers:
            assert state.history.shape[3] == 0
            continue
        assert state.steps.tolist() == [NEW - 1] * rows_of(kind)
        blocks = (np.asarray(state.history[:, :, -4:]) > 0).sum(axis=3)
        assert blocks[:, :, [0, 2]].max() <= 2
        assert (blocks[:, :, [1, 3]].max(axis=(0, 1)) > 2).all()  # of all tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_full_budget_gives_the_same_tokens(kind: str):
    found, _ = steps.__wrapped__(kind, (predictor(kind, keep=400),))
    whole, _ = steps(kind, ())
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(axis=2), whole.argmax(axis=2))


def test_beams_share_the_state_of_their_prompt():
    out = generate.__wrapped__("opt", (predictor("opt"),), 3)
    assert bool(out.is_finite.all())
    assert {leaf.shape[0] for leaf in jax.tree.leaves(out.selection.states)} == {rows_of("opt")}
    full = generate.__wrapped__("mllama", (predictor("mllama", keep=400),), 3)
    np.testing.assert_array_equal(full.tokens, generate("mllama", (), 3).tokens)


def test_other_arrays_of_the_network_compile_nothing_anew():
    generate.__wrapped__("opt", (predictor("opt"),))
    before = programs.generate._cache_size()
    out = generate.__wrapped__("opt", (predictor("opt", network=network(5)),))
    assert programs.generate._cache_size() == before
    assert bool(out.is_finite.all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_answers_the_same_alone_as_in_the_batch(kind: str):
    method = predictor(kind)
    together = generate.__wrapped__(kind, (method,))
    never = (mllama if kind == "mllama" else blip2).NEVER
    stop = Stop(ends=never, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)
    row = 3
    inputs = mllama.packed([row]).inputs if kind == "mllama" else inputs_of("opt").alone(row)
    own = programs.generate(model_of(kind), (method,), inputs, sampling(1), stop)
    np.testing.assert_array_equal(own.tokens[0], together.tokens[row])
