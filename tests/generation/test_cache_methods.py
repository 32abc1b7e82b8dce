"""The papers' methods that prune each layer's cache, on both models: what holds for all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Site
from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.pruning import CSP, ElasticCache, KNorm
from tests import random_blip2 as blip2
from tests.generation.test_cache_sites import (
    BUDGET,
    KINDS,
    NEW,
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
    "elastic_cache, evicting": lambda keep: ElasticCache(keep=keep, merges=False),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
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


@every_method
def test_a_prompt_keeps_the_same_alone_as_in_the_batch(method: Any):
    together = generate("opt", (method(BUDGET),))
    for row in range(rows_of("opt")):
        alone = programs.generate(
            model_of("opt"),
            (method(BUDGET),),
            inputs_of("opt").alone(row),
            sampling(1),
            Stop(ends=blip2.NEVER, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW),
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


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
