"""A layer's attention over the prompt among some of its tokens: what it gives and what it saves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Keep, Reduction, Site, View, run_pruners
from catp_jax.generation import generate as programs
from catp_jax.models.attention import attend
from catp_jax.models.blocks import KeysValues
from catp_jax.models.caching import attend_prompt
from catp_jax.pruning import CSP, ElasticCache, ZipVL
from catp_jax.struct import pytree, static
from catp_jax.targets.products import matrix_flops
from tests.generation.test_cache_sites import inputs_of, model_of, prompts_of
from tests.pruning.views import cache_view

BATCH, SIZE, HEADS, KV_HEADS, CHANNELS = 2, 9, 6, 3, 4
KEEP = Keep(
    indices=jnp.asarray([[0, 3, 4, 8], [1, 2, 7, 0]]),
    valid=jnp.asarray([[True] * 4, [True, True, True, False]]),
)


def some_attention() -> tuple[Any, KeysValues, Any]:
    rng = np.random.default_rng(0)
    queries, keys, values = (
        jnp.asarray(rng.normal(size=(BATCH, SIZE, heads, CHANNELS)), jnp.float32)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    earlier = np.tril(np.ones((SIZE, SIZE), bool))
    return (
        queries,
        KeysValues(keys=keys, values=values),
        jnp.asarray(np.stack([earlier, earlier])),
    )


def test_who_is_among_them_attends_to_those_alone_and_the_others_get_nothing():
    queries, made, mask = some_attention()
    found = attend_prompt(queries, made, mask, lambda shown: KEEP)
    chosen = np.zeros((BATCH, SIZE), bool)
    chosen[0, [0, 3, 4, 8]] = chosen[1, [1, 2, 7]] = True
    full = attend(queries, made.keys, made.values, mask & jnp.asarray(chosen)[:, None])
    expected = np.where(chosen[:, :, None, None], full, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_no_choice_is_plain_attention():
    queries, made, mask = some_attention()
    whole = attend(queries, made.keys, made.values, mask)
    np.testing.assert_array_equal(attend_prompt(queries, made, mask, lambda shown: None), whole)
    np.testing.assert_array_equal(attend_prompt(queries, made, mask, None), whole)


@pytest.mark.parametrize("kind", ["mllama", "opt"])
def test_products_of_a_prefill_shrink_with_the_tokens_among_which_it_attends(kind: str):
    """Of the same method: what it reads off the probes is the same, so the rest is attention."""

    def flops(keep: int) -> float:
        def prefill(model: Any, inputs: Any) -> Any:
            return programs.prefill_with(model, (ZipVL(keep=keep),), inputs, 1).logits

        return matrix_flops(jax.jit(prefill).trace(model_of(kind), inputs_of(kind)))

    model, inputs = model_of(kind), inputs_of(kind)
    (part,) = prompts_of(programs.prefill(model, (), inputs, new_slots=1).cache)
    visual, text = part.num_visual, part.valid.shape[1] - part.num_visual
    batch, _, _, channels = part.blocks[0].keys.shape
    heads = model.config.text.num_attention_heads
    if kind == "opt":  # rows and columns, in every layer
        pairs = (visual + text) ** 2 - (2 + text) ** 2
        layers = model.config.text.num_hidden_layers
    else:  # columns, in all cross-attention layers but the first
        pairs = inputs.tokens.shape[1] * (visual - 2)
        layers = len(model.config.text.cross_attention_layers) - 1
    assert flops(visual) - flops(2) == layers * batch * heads * pairs * channels * 2 * 2


def test_layers_are_cached_with_what_each_wants():
    found = programs.prefill(
        model_of("opt"), (ZipVL(keep=4, tau=0.5),), inputs_of("opt"), new_slots=1
    )
    parts = prompts_of(found.cache)
    assert len(parts) == model_of("opt").config.text.num_hidden_layers
    for part in parts:
        assert part.num_visual == 4
        (state,) = found.selection.states
        wanted = np.asarray(state[part.layers[0]].wanted)
        there = np.asarray(part.valid[:, :4]).sum(axis=1)
        np.testing.assert_array_equal(there, np.minimum(wanted, 4))


def shrunk(*pruners: Any) -> Any:
    return run_pruners(pruners, cache_view())[0]


def test_a_method_after_it_prunes_the_cache_further_and_not_the_attention():
    reduction = shrunk(ZipVL(keep=6, tau=1.0), CSP(keep=3))
    alone = shrunk(ZipVL(keep=6, tau=1.0))
    np.testing.assert_array_equal(reduction.among.indices, alone.tokens.indices)
    assert reduction.tokens.is_by_head


def test_a_method_before_it_counts_too():
    first = ElasticCache(keep=5, evicts=True)
    reduction, before = shrunk(first, ZipVL(keep=3, tau=1.0)), shrunk(first)
    for sample in range(3):
        assert set(np.asarray(reduction.among.indices[sample])) <= set(
            np.asarray(before.tokens.indices[sample])
        )


def test_attention_among_means_is_refused():
    with pytest.raises(ValueError, match="ZipVL prunes a layer's attention over the prompt"):
        shrunk(ElasticCache(keep=5), ZipVL(keep=3))


@pytree
class Confines:
    sites = (Site.LAYER,)
    site: Site = static(default=Site.LAYER)
    keep: int = static(default=2)

    def start(self, view: View) -> Any:
        return ()

    def __call__(self, view: View, state: Any) -> tuple[Reduction, Any]:
        return Reduction(among=KEEP), state


def test_attention_can_be_confined_at_cache_alone():
    with pytest.raises(ValueError, match="it is at LAYER"):
        run_pruners((Confines(),), View(**{**vars(cache_view()), "site": Site.LAYER}))
