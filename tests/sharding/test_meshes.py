"""The same tokens on every mesh of up to eight devices, pruned and not, as on one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Basis
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models.frozen import freeze
from catp_jax.pruning import AttentionPredictor, EigenAttention, make
from catp_jax.pruning.attention_predictor import Network
from catp_jax.sharding.mesh import make_mesh
from catp_jax.sharding.place import fetch, kv_heads, place_inputs, replicate
from tests.sharding.cases import CASES, SITES, SIZES, name_of
from tests.sharding.models import CONFIGS, inputs, model, on_mesh

NEW = 3
STOP = Stop(ends=jnp.asarray([79], jnp.int32), pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)


def pruners_of(kind, method):
    return () if method is None else (make(method, 4, SITES[kind]),)


def run(network, batch, kind, method, mesh):
    """Greedy tokens, first logits and kept numbers."""
    pruners, choice, stop = replicate((pruners_of(kind, method), sampling(8), STOP), mesh)
    return fetch(programs.generate(network, pruners, batch, choice, stop))


@jax.jit
def run_all(network, every, batch):
    """The same for several methods, as one program: they share what comes before."""
    return [programs.generate(network, pruners, batch, sampling(8), STOP) for pruners in every]


@functools.cache
def alone(kind):
    """What one device makes of each method."""
    methods = [method for own, method in CASES if own == kind]
    every = tuple(pruners_of(kind, method) for method in methods)
    return dict(zip(methods, run_all(freeze(model(kind)), every, inputs(kind)), strict=True))


def same(ours, alone):
    np.testing.assert_array_equal(ours.tokens, alone.tokens)
    scale = np.abs(alone.logits).max()
    np.testing.assert_allclose(ours.logits, alone.logits, atol=1e-4 * scale)
    if alone.selection.kept is not None:
        np.testing.assert_array_equal(ours.selection.kept.indices, alone.selection.kept.indices)


STRIDE = next(step for step in (5, 7, 11) if math.gcd(step, len(CASES)) == 1)
# Each mesh meets a case and each case a mesh; `benchmarks/mesh_matrix.py` has them all.
SOME = [
    (SIZES[number % len(SIZES)], CASES[STRIDE * number % len(CASES)])
    for number in range(max(len(SIZES), len(CASES)))
]


@pytest.mark.parametrize(
    ("sizes", "case"), SOME, ids=[f"{name_of(s)}-{k}-{m}" for s, (k, m) in SOME]
)
def test_tokens_are_those_of_one_device(sizes, case):
    kind, method = case
    mesh = make_mesh(name_of(sizes), kv_heads(model(kind)), jax.devices()[: math.prod(sizes)])
    ours = run(on_mesh(kind, mesh), place_inputs(inputs(kind), mesh), kind, method, mesh)
    same(ours, alone(kind)[method])


def learned_methods(kind):
    """Methods that learn first, with arrays of no meaning: by layer, by step, at the entry."""
    config = CONFIGS[kind].text
    kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    channels = config.hidden_size // config.num_attention_heads
    layers = getattr(config, "cross_attention_layers", range(config.num_hidden_layers))
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(kv, channels, channels)))[0].astype(np.float32)
    basis = Basis(matrix=jnp.asarray(turned[:, :, : channels // 2]))
    network = Network.start(jax.random.key(0))
    return {
        "eigen": EigenAttention(keep=4, bases=dict.fromkeys(layers, (basis, basis))),
        "attention_predictor": AttentionPredictor(keep=4, network=network, block=2, rows=8),
    }


@pytest.mark.parametrize("method", ["eigen", "attention_predictor"])
@pytest.mark.parametrize(
    ("kind", "sizes"), [("mllama", "data=2,fsdp=2,tensor=2"), ("opt", "data=4,tensor=2")]
)
def test_methods_that_learn_first_too(kind, sizes, method):
    pruners = (learned_methods(kind)[method],)
    mesh = make_mesh(sizes, kv_heads(model(kind)))
    pruned = replicate(pruners, mesh)
    how = replicate((sampling(8), STOP), mesh)
    batch = place_inputs(inputs(kind), mesh)
    ours = fetch(programs.generate(on_mesh(kind, mesh), pruned, batch, *how))
    alone = programs.generate(freeze(model(kind)), pruners, inputs(kind), sampling(8), STOP)
    same(ours, fetch(alone))


def test_every_case_is_among_them():
    assert {case for _, case in SOME} == {*CASES}
    assert {sizes for sizes, _ in SOME} == {*SIZES}


@pytest.mark.parametrize("kind", CONFIGS)
def test_beam_search_too(kind):
    def search(network, batch, mesh=None):
        rest = (beams(3), STOP)
        how, stop = rest if mesh is None else replicate(rest, mesh)
        return fetch(programs.generate(network, (), batch, how, stop))

    mesh = make_mesh("data=2,tensor=4", kv_heads(model(kind)))
    ours = search(on_mesh(kind, mesh), place_inputs(inputs(kind), mesh), mesh)
    np.testing.assert_array_equal(ours.tokens, search(freeze(model(kind)), inputs(kind)).tokens)
