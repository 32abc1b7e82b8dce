"""Eigen Attention in both models: what is left of a cache, and as if all lay in few directions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models import one_row
from catp_jax.models.blocks import Read
from catp_jax.pruning import ElasticCache, KNorm, ThinK
from catp_jax.pruning.eigen import Directions, EigenAttention, Gather
from catp_jax.struct import replace
from tests import random_blip2 as blip2
from tests import random_mllama as mllama
from tests.generation.test_cache_methods import with_blocks
from tests.generation.test_cache_sites import (
    KINDS,
    NEW,
    Looks,
    inputs_of,
    model_of,
    prompts_of,
    rows_of,
    steps,
)
from tests.pruning.test_eigen import CHANNELS


def layers_of(kind: str) -> list[int]:
    if kind == "mllama":
        return [*mllama.CONFIG.text.cross_attention_layers]
    return [*range(blip2.OPT.num_hidden_layers)]


@functools.cache
def prefilled(kind: str, pruners: Any = ()) -> programs.Prefilled:
    return programs.prefill(model_of(kind), pruners, inputs_of(kind), new_slots=NEW)


@functools.cache
def directions(kind: str) -> Directions:
    (states,) = programs.prefill(
        model_of(kind), (Gather(),), inputs_of(kind), new_slots=1
    ).selection.states
    grams = {
        layer: (np.asarray(gram.keys).sum(axis=0), np.asarray(gram.values).sum(axis=0))
        for layer, gram in states.items()
    }
    seen = {layer: pair for layer, pair in grams.items() if pair[0].any()}
    assert [*seen] == layers_of(kind)
    return Directions.learned(seen)


@functools.cache
def method_of(kind: str, *ranks: tuple[int, int]) -> EigenAttention:
    """Of these ranks, the next of them in the next layer."""
    layers = layers_of(kind)
    given = {layer: ranks[number % len(ranks)] for number, layer in enumerate(layers)}
    return EigenAttention(keep=1, bases=directions(kind).bases(given))


THIN = ((2, 3), (3, 1), (1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_all_directions_change_nothing(kind: str):
    found, _ = steps.__wrapped__(kind, (method_of(kind, (4, 4)),))
    whole, _ = steps(kind, ())
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)


def projected(part: Any, method: EigenAttention) -> tuple[Any, ...]:
    """The blocks of a part with keys and values put into their directions and back, in NumPy."""
    blocks = []
    for layer, block in zip(part.layers, part.blocks, strict=True):
        made = {}
        for name, basis in zip(("keys", "values"), method.bases[layer], strict=True):
            array, matrix = np.asarray(getattr(block, name)), np.asarray(basis.matrix)
            made[name] = np.empty_like(array)
            for row, head in np.ndindex(array.shape[:2]):
                made[name][row, head] = array[row, head] @ matrix[head] @ matrix[head].T
        blocks.append(replace(block, **{name: jnp.asarray(some) for name, some in made.items()}))
    return tuple(blocks)


def reference(kind: str, method: EigenAttention, others: tuple[Any, ...] = ()) -> Any:
    """What `others` leave, and its cache as if it had been put down in directions."""
    start = programs.prefill(model_of(kind), others, inputs_of(kind), new_slots=NEW)
    cache = start.cache
    for part in prompts_of(cache):
        cache = with_blocks(cache, part, projected(part, method))
    return replace(start, cache=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_leave_the_arrays_and_it_is_as_if_all_lay_in_few_directions(kind: str):
    """New tokens have all channels; the prompt itself has seen everything."""
    model, method = model_of(kind), method_of(kind, *THIN)
    whole, thin = (
        prefilled(kind),
        programs.prefill(model, (method,), inputs_of(kind), new_slots=NEW),
    )
    np.testing.assert_allclose(thin.logits, whole.logits, rtol=1e-5, atol=1e-5)
    (every,) = prompts_of(whole.cache)
    parts = {part.layers[0]: part for part in prompts_of(thin.cache)}
    assert [*parts] == layers_of(kind)
    size, whole_size = 0, 0
    for number, (layer, block) in enumerate(zip(every.layers, every.blocks, strict=True)):
        (own,), (keys, values) = parts[layer].blocks, THIN[number % 3]
        assert own.keys.shape == (*block.keys.shape[:3], keys)
        assert own.values.shape == (*block.values.shape[:3], values)
        np.testing.assert_array_equal(parts[layer].valid, every.valid)
        size += own.keys.nbytes + own.values.nbytes
        whole_size += block.keys.nbytes + block.values.nbytes
    ranks = {layer: THIN[number % 3] for number, layer in enumerate(every.layers)}
    assert size == whole_size * directions(kind).left(ranks)
    for block in thin.cache.tail.blocks:
        assert block.keys.shape[3] == block.values.shape[3] == CHANNELS

    token = whole.logits.argmax(axis=1).astype(jnp.int32)
    like = reference(kind, method).cache
    states, cache, expected = thin.selection.states, thin.cache, whole.logits
    for _ in range(2):
        expected, like, _ = programs.step(model, (), token, like)
        found, cache, states = programs.step(model, (method,), token, cache, states)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        token = expected.argmax(axis=1).astype(jnp.int32)
    plain, _ = steps(kind, ())
    assert float(jnp.abs(expected - plain[:, 2]).max()) > 1e-3


def test_layers_of_llama_that_read_text_alone_keep_all_channels():
    thin = programs.prefill(
        model_of("mllama"), (method_of("mllama", *THIN),), inputs_of("mllama"), new_slots=NEW
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        thin.cache.text,
        prefilled("mllama").cache.text,
    )
    assert thin.cache.text[0].blocks[0].keys.shape[3] == CHANNELS


DECODINGS: dict[str, Callable[[str], Any]] = {
    "mllama": lambda kind: beams(3),
    "opt": lambda kind: sampling(rows_of(kind), temperature=0.7, answers=2, seed=3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_prompt_read_the_same_directions(kind: str):
    model, method = model_of(kind), method_of(kind, *THIN)
    never, how = (mllama if kind == "mllama" else blip2).NEVER, DECODINGS[kind](kind)
    stop = Stop(ends=never, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)
    found = programs.generate(model, (method,), inputs_of(kind), how, stop)
    expected = jax.jit(programs.decode)(model, (), reference(kind, method), how, stop)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


TOGETHER = {
    "k_norm": ("opt", KNorm(keep=4, site=Site.CACHE), False),
    "elastic_cache": ("mllama", ElasticCache(keep=6), False),
    "elastic_cache first": ("mllama", ElasticCache(keep=6), True),
}


@pytest.mark.parametrize(("kind", "other", "is_first"), TOGETHER.values(), ids=TOGETHER)
def test_directions_go_with_a_selection_of_tokens_in_the_same_cache(
    kind: str, other: Any, is_first: bool
):
    model, method = model_of(kind), method_of(kind, *THIN)
    pruners = (other, method) if is_first else (method, other)
    start = programs.prefill(model, pruners, inputs_of(kind), new_slots=NEW)
    like = reference(kind, method, (other,))
    for part, whole in zip(prompts_of(start.cache), prompts_of(like.cache), strict=True):
        (block,), (old,) = part.blocks, whole.blocks
        keys, values = THIN[layers_of(kind).index(part.layers[0]) % 3]
        assert block.keys.shape == (*old.keys.shape[:3], keys)
        assert block.values.shape == (*old.keys.shape[:3], values)
        np.testing.assert_array_equal(part.valid, whole.valid)
    token = like.logits.argmax(axis=1).astype(jnp.int32)
    expected, _, _ = programs.step(model, (other,), token, like.cache, like.selection.states)
    found, _, _ = programs.step(model, pruners, token, start.cache, start.selection.states)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("others", "place", "says"),
    [
        ((ThinK(keep=6),), 1, "EigenAttention chooses channels, as a method before it does"),
        ((ThinK(keep=6),), 0, "ThinK chooses channels, as a method before it does"),
        ((Looks(),), 0, "Looks works at READ, and cannot where another method leaves out channels"),
        (
            (KNorm(keep=6, site=Site.CACHE),),
            1,
            "EigenAttention cannot follow a method that keeps other tokens for each head",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(others: tuple[Any, ...], place: int, says: str):
    method = method_of("opt", *THIN)
    pruners = (method, *others) if place == 0 else (*others, method)
    with pytest.raises(ValueError, match=says):
        programs.prefill(model_of("opt"), pruners, inputs_of("opt"), new_slots=NEW)


def test_the_kernel_for_one_row_leaves_it_to_others():
    start = programs.prefill(
        model_of("opt"), (method_of("opt", *THIN),), inputs_of("opt"), new_slots=NEW
    )
    part = prompts_of(start.cache)[0]
    read = Read(block=part.blocks[0], seen=part.valid)
    says = one_row.refuses(jnp.zeros((rows_of("opt"), 1, 4, CHANNELS)), [read])
    assert says in ("it reads all channels", "USE_KERNEL is False")
