"""The papers' methods that prune each layer's cache, on both models: what holds for all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax import pruning
from catp_jax.contract import Site
from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.pruning import (
    CSP,
    AirCache,
    ElasticCache,
    KNorm,
    Random,
    ThinK,
    TrimmedLlama,
    ZipVL,
    methods_for,
)
from catp_jax.struct import replace
from tests import random_blip2 as blip2
from tests import random_mllama as mllama
from tests.generation.test_cache_sites import (
    BUDGET,
    KINDS,
    NEW,
    Looks,
    generate,
    inputs_of,
    model_of,
    prompts_of,
    rows_of,
    steps,
)

METHODS = {
    "k_norm": lambda keep: KNorm(keep=keep, site=Site.CACHE),
    "csp": lambda keep: CSP(keep=keep),
    "elastic_cache": lambda keep: ElasticCache(keep=keep),
    "aircache": lambda keep: AirCache(keep=keep),
    "random": lambda keep: Random(keep=keep, site=Site.CACHE),
    "elastic_cache, evicting": lambda keep: ElasticCache(keep=keep, evicts=True),
}
CROSS = len(mllama.CONFIG.text.cross_attention_layers)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
WITH_CHANNELS = METHODS | {
    "think": lambda keep: ThinK(keep=keep),
    "zipvl": lambda keep: ZipVL(keep=keep, tau=1.0),
}
with_channels = pytest.mark.parametrize("method", WITH_CHANNELS.values(), ids=WITH_CHANNELS)


def test_every_method_that_prunes_a_cache_is_tested_here():
    """Those that learn first have tests of their own."""
    tested = {type(method(3)) for method in WITH_CHANNELS.values()}
    there = methods_for(frozenset({Site.CACHE}))
    assert tested == {pruning.METHODS[name] for name in there}


@with_channels
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_budget_changes_nothing(kind: str, method: Any):
    found, _ = steps(kind, (method(1000),))
    whole, _ = steps(kind, ())
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_the_arrays_of_the_cache_are_smaller_and_the_prompt_has_seen_everything(
    kind: str, method: Any
):
    """Whatever stays, there is room for the budget and the text."""
    whole = programs.prefill(model_of(kind), (), inputs_of(kind), new_slots=NEW)
    pruned = programs.prefill(model_of(kind), (method(BUDGET),), inputs_of(kind), new_slots=NEW)
    np.testing.assert_allclose(pruned.logits, whole.logits, rtol=1e-5, atol=1e-5)
    (every,) = prompts_of(whole.cache)
    left = BUDGET + every.valid.shape[1] - every.num_visual
    blocks = [block for part in prompts_of(pruned.cache) for block in part.blocks]
    assert len(blocks) == len(every.blocks)
    for block, before in zip(blocks, every.blocks, strict=True):
        for array, old in zip(jax.tree.leaves(block), jax.tree.leaves(before), strict=True):
            assert array.shape == (*old.shape[:2], left, old.shape[3])
    later = steps(kind, (method(BUDGET),))[0][:, 1:]
    assert float(jnp.abs(later - steps(kind, ())[0][:, 1:]).max()) > 1e-3


@with_channels
def test_a_prompt_keeps_the_same_alone_as_in_the_batch(method: Any):
    together = generate("opt", (method(BUDGET),))
    for row in range(rows_of("opt")):
        alone = answer("opt", (method(BUDGET),), inputs_of("opt").alone(row))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_channels_do_not_depend_on_how_far_text_is_padded():
    inputs, method = inputs_of("opt"), ThinK(keep=6, window=8)
    wide = jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, 16))), inputs.tokens)
    there = jnp.pad(inputs.token_valid, ((0, 0), (0, 16)))
    padded = replace(inputs, tokens=wide, token_valid=there)
    model, found = model_of("opt"), []
    for some in (inputs, padded):
        start = programs.prefill(model, (method,), some, new_slots=NEW)
        token = start.logits.argmax(axis=1).astype(jnp.int32)
        found.append(programs.step(model, (method,), token, start.cache, start.selection.states)[0])
        blocks = [block for part in start.cache.prompts for block in part.blocks]
        assert {block.keys.shape[3] for block in blocks if block.keys_in is not None} == {3}
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "pruners",
    [
        (TrimmedLlama(keep=9, per_head=3), ElasticCache(keep=BUDGET)),
        (ElasticCache(keep=6), CSP(keep=BUDGET)),
        (TrimmedLlama(keep=9), ThinK(keep=7)),
    ],
    ids=["trimmed, elastic", "elastic, csp", "trimmed, think"],
)
def test_a_prompt_of_several_methods_is_the_same_alone_as_in_the_batch(pruners: tuple[Any, ...]):
    together = generate("mllama", pruners)
    for row in (0, 3):
        alone = answer("mllama", pruners, mllama.packed([row]).inputs)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (TrimmedLlama(keep=9, per_head=3), ElasticCache(keep=BUDGET)),
        (ElasticCache(keep=6), CSP(keep=BUDGET)),
    ],
    ids=["trimmed, elastic", "elastic, csp"],
)
def test_one_after_another_the_second_chooses_of_what_is_left(first: Any, then: Any):
    def left(*pruners: Any) -> list[list[set[int]]]:
        """By layer and row."""
        chosen = generate("mllama", pruners).selection
        layers = chosen.cached.values() if chosen.cached else [chosen.kept] * CROSS
        rows = range(rows_of("mllama"))
        arrays = [(np.asarray(keep.indices), np.asarray(keep.valid)) for keep in layers]
        return [[{*of[row][valid[row]].tolist()} for row in rows] for of, valid in arrays]

    before, after = left(first), left(first, then)
    assert len(before) == len(after) == CROSS
    for one, other in zip(before, after, strict=True):
        for mine, all_there in zip(other, one, strict=True):
            assert mine <= all_there
            assert bool(mine) == bool(all_there)
    assert after != before


def answer(kind: str, pruners: tuple[Any, ...], inputs: Any) -> programs.Generated:
    """One prompt's."""
    never = (mllama if kind == "mllama" else blip2).NEVER
    stop = Stop(ends=never, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)
    return programs.generate(model_of(kind), pruners, inputs, sampling(1), stop)


def test_a_head_may_spend_its_budget_on_text_or_on_what_is_seen():
    """CSP's selection says which visual tokens each head of each layer has left."""
    start = programs.prefill(model_of("opt"), (CSP(keep=BUDGET),), inputs_of("opt"), new_slots=NEW)
    left = set()
    for part in prompts_of(start.cache):
        (layer,) = part.layers
        kept, numbers = start.selection.cached[layer], np.asarray(part.numbers)
        own = np.where(np.asarray(kept.valid), np.asarray(kept.indices), -1)
        there = np.where(np.asarray(part.valid), numbers, -1)
        np.testing.assert_array_equal(own, there[..., : own.shape[-1]])
        left |= {int(count) for count in (own >= 0).sum(axis=2).ravel()}
    assert len(left) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_channels_leave_the_arrays_of_keys_and_it_is_as_if_they_were_zero(kind: str):
    """Keys of the last two words and of new tokens have all channels."""
    model, inputs = model_of(kind), inputs_of(kind)
    method = ThinK(keep=3 if kind == "opt" else 60, window=2)
    whole = programs.prefill(model, (), inputs, new_slots=NEW)
    thin = programs.prefill(model, (method,), inputs, new_slots=NEW)
    (every,) = prompts_of(whole.cache)
    older = {part.layers[0]: part for part in prompts_of(thin.cache)}
    zeroed = []
    for layer, block in zip(every.layers, every.blocks, strict=True):
        (own,) = older[layer].blocks
        batch, kv, slots, channels = block.keys.shape
        left = own.keys.shape[3]
        assert own.keys_in.indices.shape == (batch, kv, left)
        assert left < channels
        recent = 2 if kind == "opt" else 0
        assert own.keys.shape == (batch, kv, slots - recent, left)
        assert own.values.shape == (batch, kv, slots - recent, channels)
        stays = np.zeros((batch, kv, 1, channels), bool)
        np.put_along_axis(stays, np.asarray(own.keys_in.indices)[:, :, None], True, axis=3)
        is_text = np.asarray(every.valid) & (np.asarray(every.numbers) < 0)
        from_last = is_text[:, ::-1].cumsum(axis=1)[:, ::-1]
        is_recent = is_text & (from_last <= recent)
        stays = stays | is_recent[:, None, :, None]
        zeroed.append(replace(block, keys=jnp.where(stays, block.keys, 0)))
    reference = with_blocks(whole.cache, every, tuple(zeroed))
    token = whole.logits.argmax(axis=1).astype(jnp.int32)
    expected, _, _ = programs.step(model, (), token, reference)
    plain, _, _ = programs.step(
        model, (), token, programs.prefill(model, (), inputs, new_slots=NEW).cache
    )
    found, _, _ = programs.step(model, (method,), token, thin.cache, thin.selection.states)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(found - plain).max()) > 1e-4


def with_blocks(cache: Any, part: Any, blocks: tuple[Any, ...]) -> Any:
    """A cache in which the part with visual tokens has other blocks."""
    name = "cross" if hasattr(cache, "cross") else "prompts"
    parts = [replace(p, blocks=blocks) if p is part else p for p in getattr(cache, name)]
    return replace(cache, **{name: tuple(parts)})


def test_thinned_keys_go_with_a_selection_of_tokens_in_the_same_cache():
    """Each head keeps six of seven tokens, and two of four channels of their keys."""
    pruners = (ThinK(keep=5, window=2), KNorm(keep=6, site=Site.CACHE))
    model, inputs = model_of("opt"), inputs_of("opt")
    start = programs.prefill(model, pruners, inputs, new_slots=NEW)
    plain = programs.prefill(model, pruners[1:], inputs, new_slots=NEW)
    zeroed = []
    for part, whole in zip(prompts_of(start.cache), prompts_of(plain.cache), strict=True):
        (block,), (old,) = part.blocks, whole.blocks
        batch, kv, slots, channels = old.keys.shape
        assert block.keys.shape == (batch, kv, slots - 2, 2)
        assert block.values.shape == (batch, kv, slots - 2, channels)
        stays = np.zeros((batch, kv, 1, channels), bool)
        np.put_along_axis(stays, np.asarray(block.keys_in.indices)[:, :, None], True, axis=3)
        is_text = np.asarray(whole.valid) & (np.asarray(whole.numbers) < 0)
        from_last = is_text[..., ::-1].cumsum(axis=2)[..., ::-1]
        stays = stays | (is_text & (from_last <= 2))[..., None]
        zeroed.append(replace(whole, blocks=(replace(old, keys=jnp.where(stays, old.keys, 0)),)))
    token = plain.logits.argmax(axis=1).astype(jnp.int32)
    reference = replace(plain.cache, prompts=tuple(zeroed))
    states = plain.selection.states
    expected, _, _ = programs.step(model, pruners[1:], token, reference, states)
    found, _, _ = programs.step(model, pruners, token, start.cache, start.selection.states)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pruners", "says"),
    [
        (
            (ThinK(keep=6), ThinK(keep=5)),
            "ThinK chooses channels, as a method before it does",
        ),
        (
            (ThinK(keep=6), Looks()),
            "Looks works at READ, and cannot where another method leaves out",
        ),
        (
            (KNorm(keep=6, site=Site.CACHE), ThinK(keep=5)),
            "ThinK cannot follow a method that keeps",
        ),
    ],
)
def test_what_cannot_go_together_is_refused(pruners: tuple[Any, ...], says: str):
    with pytest.raises(ValueError, match=says):
        programs.prefill(model_of("opt"), pruners, inputs_of("opt"), new_slots=NEW)
