"""Means in whole models: against references that read the means NumPy made, and at every site."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Merge, Reduction, Site, View
from catp_jax.generation import generate as programs
from catp_jax.generation.generate import prefill_with
from catp_jax.models.cross_decoder import Branches, CrossLayer
from catp_jax.models.mllama import Inputs, Mllama
from catp_jax.pruning import Pool, TrimmedLlama
from catp_jax.readers.mllama_packing import pack
from catp_jax.struct import pytree, replace, static
from tests import mllama_methods as mllama
from tests.blip2_methods import AT_ENTRY, unpruned
from tests.blip2_methods import BUDGET as QUERIES_KEPT
from tests.blip2_methods import whole as at_entry
from tests.generation.test_cache_sites import inputs_of, model_of, prompts_of
from tests.pruning import oracles
from tests.random_blip2 import QUERIES, packed, random_blip2
from tests.random_mllama import CONFIG, PER_TILE, PICTURES, PROMPTS, random_mllama
from tests.random_mllama import packed as images

NEW, BUDGET = mllama.NEW, mllama.BUDGET
GRID = CONFIG.vision.grid


def pooling() -> np.ndarray:
    """The mean of each place, [b, places, visual tokens]."""
    room = images().inputs.images.tile_valid.shape[1] * PER_TILE
    matrix = np.zeros((5, BUDGET, room), np.float32)
    for row, tiles in enumerate(images().tiles):
        groups = oracles.pool_cells(GRID, GRID, 1, range(len(tiles)), BUDGET) if tiles else []
        for place, members in enumerate(groups):
            matrix[row, place, members] = 1 / len(members)
    return matrix


@jax.jit
def pooled_model(model: Mllama, inputs: Inputs, matrix: jax.Array, prompt: jax.Array) -> jax.Array:
    """Logits of every row: those of the prompt read all features in the first cross-attention
    layer, and means everywhere else.
    """
    decoder, visual = model.language_model, model.encode(inputs.images)
    batch, length = inputs.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    causal = jnp.tril(jnp.ones((length, length), bool))[None] & inputs.token_valid[:, None, :]
    sees = visual.sees & visual.slots.valid[:, None]
    seen = jnp.einsum("bsn,bkn->bsk", sees.astype(jnp.float32), matrix) > 0.99
    means = jnp.einsum("bkn,bnd->bkd", matrix, visual.features)
    x, is_first = decoder.embed_tokens(inputs.tokens), True

    def read(layer: Any, x: jax.Array, features: jax.Array, mask: jax.Array) -> jax.Array:
        some = mask.any(axis=2)
        branches = Branches(attends=some, feeds=some)
        return layer(x, layer.cross_attn.project(features), mask, branches)

    for layer in decoder.layers:
        if not isinstance(layer, CrossLayer):
            x, _, _ = layer(x, decoder._rope(positions), causal)
            continue
        of_means = read(layer, x, means, seen)
        whole = read(layer, x, visual.features, sees)
        x = jnp.where(prompt[:, :, None] & is_first, whole, of_means)
        is_first = False
    return model.lm_head(decoder.norm(x))


def test_llama_answers_as_one_that_reads_means_from_scratch():
    out, prompt = mllama.mixed("pool"), images().inputs
    assert mllama.difference(out.logits, mllama.mixed(None).logits) > 1e-3
    assert out.selection.merged
    matrix, grown = jnp.asarray(pooling()), [list(tokens) for tokens in PROMPTS]
    for step in range(NEW):
        inputs = pack(grown, PICTURES, CONFIG).inputs
        if step:
            assert inputs.tokens.shape == prompt.tokens.shape
        logits = pooled_model(random_mllama(), inputs, matrix, prompt.token_valid)
        last = mllama.last_rows(logits, inputs)
        if not step:
            assert mllama.difference(out.logits, last) <= 1e-5
        assert out.tokens[:, step].tolist() == last.argmax(axis=1).tolist()
        for tokens, token in zip(grown, out.tokens[:, step].tolist(), strict=True):
            tokens.append(token)


def test_opt_answers_as_one_that_reads_means():
    def logits(model: Any, inputs: Any, matrix: jax.Array) -> jax.Array:
        front = model.front(inputs)
        means = jnp.einsum("kn,bnd->bkd", matrix, front.visual)
        x, slots, _ = model.sequence(replace(front, visual=means), None)
        return model.language_model(x, slots)

    matrix = np.zeros((QUERIES_KEPT, QUERIES), np.float32)
    for place, members in enumerate(oracles.parts(QUERIES, QUERIES_KEPT)):
        matrix[place, members] = 1 / len(members)
    inputs = packed().inputs
    found = np.asarray(jax.jit(logits)(random_blip2("opt"), inputs, jnp.asarray(matrix)))
    last = QUERIES_KEPT + np.asarray(inputs.token_valid).sum(axis=1) - 1
    out = at_entry("opt")["pool"]
    assert "pool" in AT_ENTRY
    assert mllama.difference(out.logits, found[np.arange(4), last]) <= 2e-5
    assert mllama.difference(out.logits, unpruned("opt").logits) > 1e-3


def test_a_union_after_pool_is_cut_to_what_it_holds():
    pruners = (Pool(keep=12), TrimmedLlama(keep=None, per_head=1))
    front, keep, selection = programs.select_tokens(random_mllama(), pruners, images().inputs)
    wanted = int(keep.valid.sum(axis=1).max())
    assert 1 < wanted < 12
    starts = [
        programs.prefill_from(random_mllama(), pruners, front, *some, new_slots=1)
        for some in ((keep, selection), programs.truncate(keep, selection, wanted))
    ]
    assert starts[1].cache.cross[0].numbers.shape == (5, wanted)
    assert mllama.difference(starts[1].logits, starts[0].logits) <= 1e-5
    assert starts[1].selection.merged


@pytree
class Pairs:
    """Each head merges neighbours in pairs, the one head from the first on, the next from the
    second on; text stays.
    """

    sites = (Site.CACHE, Site.READ)
    site: Site = static(default=Site.CACHE)
    keep: int = static(default=0)

    def start(self, view: View) -> tuple[()]:
        return ()

    def __call__(self, view: View, state: tuple[()]) -> tuple[Reduction, tuple[()]]:
        if not view.num_visual:
            return Reduction(), state
        _, number, heads, _ = view.values.shape
        places = jnp.arange(number, dtype=jnp.int32)[None, None]
        shift = jnp.arange(heads, dtype=jnp.int32)[None, :, None] % 2
        half = view.num_visual // 2 + 1
        is_text = places >= view.num_visual
        groups = jnp.where(is_text, half + places - view.num_visual, (places + shift) // 2)
        groups = jnp.where(view.valid[:, None], groups, -1)
        size = half + number - view.num_visual
        return Reduction(tokens=Merge.of(groups, jnp.zeros_like(groups), size)), state


@pytest.mark.parametrize("kind", ["mllama", "opt"])
def test_a_cache_may_hold_means_that_each_head_makes_of_its_own(kind: str):
    def prefill(pruners: tuple[Any, ...]) -> Any:
        return jax.jit(prefill_with, static_argnums=3)(model_of(kind), pruners, inputs_of(kind), 2)

    start, whole = prefill((Pairs(),)), prefill(())
    np.testing.assert_array_equal(start.logits, whole.logits)  # the prompt itself saw everything
    (every,) = prompts_of(whole.cache)
    half, visual = every.num_visual // 2 + 1, every.num_visual
    assert start.selection.merged
    for part, block in zip(prompts_of(start.cache), every.blocks, strict=True):
        assert part.num_visual == half
        for row, head in np.ndindex(*block.keys.shape[:2]):
            valid = np.asarray(every.valid[row])
            for place in range(half):
                first = 2 * place - head % 2
                pair = [n for n in (first, first + 1) if 0 <= n < visual and valid[n]]
                assert bool(part.valid[row, head, place]) == bool(pair)
                if pair:
                    for name in ("keys", "values"):
                        found = getattr(part.blocks[0], name)[row, head, place]
                        expected = np.asarray(getattr(block, name)[row, head])[pair].mean(axis=0)
                        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_step_reads_cannot_be_merged():
    pruners, model = (Pairs(site=Site.READ, keep=1),), random_blip2("opt")
    start = programs.prefill(model, pruners, packed().inputs, new_slots=2)
    with pytest.raises(ValueError, match="Pairs merges tokens, which a step cannot"):
        programs.step(model, pruners, jnp.zeros(4, jnp.int32), start.cache, start.selection.states)
