"""What design.md promises, for every method, on the tiny Llama Vision.

Differences are relative to the largest logit: a full budget may differ by 1e-6 (observed: not at
all), batches and references by 1e-5 (observed: 6e-7). Where a test compares many shapes, methods
run on the views of one compiled program and share the rest; `test_generate_is_its_parts` ties both
together.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax import pruning
from catp_jax.contract import Keep, Site, run_pruners
from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models.mllama import Inputs, Mllama
from catp_jax.pruning import TrimmedLlama
from catp_jax.readers.mllama_packing import MllamaPacked, pack
from catp_jax.struct import replace
from tests.mllama_methods import (
    BUDGET,
    CASES,
    FULL,
    METHODS,
    NEW,
    difference,
    generate,
    kept_places,
    mixed,
    view_of,
)
from tests.pruning.views import prune
from tests.random_mllama import (
    AVAILABLE,
    CONFIG,
    IMAGE,
    NEVER,
    PAD,
    PER_TILE,
    PICTURES,
    PROMPTS,
    packed,
    picture,
    random_mllama,
)


def test_every_method_for_cross_attention_is_tested_here():
    fitting = pruning.methods_for(frozenset({Site.CROSS}))
    wanted = {pruning.METHODS[name] for name in fitting}
    assert {type(make(8)) for make in METHODS.values()} == wanted


# --- the full budget is a no-op ---------------------------------------------------------------


@pytest.mark.parametrize("method", FULL)
def test_full_budget_changes_nothing(method: str):
    unpruned = mixed(None)
    full = all_methods(packed(), FULL)[method]
    np.testing.assert_array_equal(full.tokens, unpruned.tokens)
    assert difference(full.logits, unpruned.logits) <= 1e-6
    for row, available in enumerate(AVAILABLE):
        assert int(full.selection.kept.valid[row].sum()) == available


def test_full_budget_in_one_program_changes_nothing():
    unpruned, full = mixed(None), generate((FULL["trimmed_llama, union"],), packed())
    np.testing.assert_array_equal(full.tokens, unpruned.tokens)
    assert difference(full.logits, unpruned.logits) <= 1e-6


def test_full_budget_changes_nothing_in_mode_hf_where_nothing_attends_to_padding():
    # Rows without an image attend to padding tiles in "hf", and no method keeps those. So: text
    # before an image of four full tiles, and images with padding tiles where every row sees them.
    prompts = [(1, 2, IMAGE, 3, 4), (IMAGE, 5, 6), (9, IMAGE, 8)]
    batch = pack(prompts, [[picture(4, 20)], [picture(2, 21)], [picture(4, 22)]], CONFIG, "hf")
    unpruned = generate((), batch)
    full = generate((TrimmedLlama(keep=4 * PER_TILE),), batch)
    np.testing.assert_array_equal(full.tokens, unpruned.tokens)
    assert difference(full.logits, unpruned.logits) <= 1e-6


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_pruning_changes_the_answer(method: str, mode: str):
    # Else all of this would pass on a model that ignores its images.
    assert difference(mixed(method, mode).logits, mixed(None, mode).logits) > 1e-3


# --- batch independence -----------------------------------------------------------------------


@jax.jit
def choose(model: Mllama, inputs: Inputs, pruners: dict[str, Any]) -> tuple[Any, dict[str, Keep]]:
    """The prefill up to the selection, and every method's selection."""
    front = model.front(inputs)
    keeps = {name: run_pruners((pruner,), front.view)[0].tokens for name, pruner in pruners.items()}
    return replace(front, view=None), keeps


def all_methods(batch: MllamaPacked, pruners: dict[str, Any]) -> dict[str, programs.Generated]:
    """What `generate` gives for each method, by few programs: the selections differ in numbers,
    not in shapes.
    """
    front, keeps = choose(random_mllama(), batch.inputs, pruners)
    return {
        name: programs.generate_from(
            random_mllama(),
            (),
            front,
            keep,
            programs.Selection(
                kept=Keep(indices=keep.indices, valid=keep.valid), cached={}, states=()
            ),
            sampling(len(batch.available)),
            Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW),
        )
        for name, keep in keeps.items()
    }


PRUNERS = {name: method(BUDGET) for name, method in METHODS.items()}


@functools.cache
def whole() -> dict[str, programs.Generated]:
    return all_methods(packed(), PRUNERS)


def assert_same_sample(batch: MllamaPacked, place: int, sample: int) -> None:
    """Row `place` of `batch` answers as row `sample` of the mixed batch, whatever the method."""
    for name, out in all_methods(batch, PRUNERS).items():
        reference = whole()[name]
        scale = float(np.abs(reference.logits).max())
        np.testing.assert_array_equal(out.tokens[place], reference.tokens[sample])
        np.testing.assert_allclose(
            out.logits[place], reference.logits[sample], rtol=0, atol=1e-5 * scale
        )
        places = kept_places(out.selection.kept, batch, place)
        assert places == kept_places(reference.selection.kept, packed(), sample)
        assert len(places) <= min(BUDGET, AVAILABLE[sample])


@pytest.mark.parametrize("method", METHODS)
def test_generate_is_its_parts(method: str):
    reference, out = whole()[method], mixed(method)
    np.testing.assert_array_equal(out.tokens, reference.tokens)
    assert difference(out.logits, reference.logits) <= 1e-6
    jax.tree.map(np.testing.assert_array_equal, out.selection.kept, reference.selection.kept)


@pytest.mark.parametrize("sample", [0, 1, 3, 4])
def test_a_prompt_alone_answers_as_it_does_in_the_batch(sample: int):
    assert_same_sample(packed([sample]), 0, sample)


def test_a_prompt_without_an_image_alone_answers_as_it_does_in_the_batch():
    # Alone there is nothing to prune, nor a cross-attention cache.
    alone = generate((TrimmedLlama(keep=BUDGET),), packed([2]))
    assert alone.selection.kept is None
    for out in whole().values():
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[2])
        assert difference(alone.logits[0], out.logits[2]) <= 1e-5


def test_order_in_the_batch_does_not_matter():
    order = [3, 0, 4, 2, 1]
    for place, sample in enumerate(order):
        assert_same_sample(packed(order), place, sample)


def test_longer_and_larger_neighbours_do_not_matter():
    # 20 tokens of text instead of 9, 12 tiles instead of 7, and 10 images instead of 6
    long = (*(IMAGE,) * 4, *range(1, 17))
    pictures = [picture(tiles, 30 + tiles) for tiles in (4, 4, 3, 1)]
    batch = pack([*PROMPTS, long], [*PICTURES, pictures], CONFIG)
    assert batch.inputs.tokens.shape[1] > packed().inputs.tokens.shape[1]
    assert batch.inputs.images.tile_valid.shape[1] > packed().inputs.images.tile_valid.shape[1]
    for sample in range(5):
        assert_same_sample(batch, sample, sample)


def test_mode_hf_depends_on_neighbours_before_the_image_and_meta_does_not():
    # The documented exception. Prompt 0 has text in front of its one-tile image.
    together, alone = mixed(None, "hf"), generate((), packed([0], "hf"))
    assert difference(alone.logits[0], together.logits[0]) > 1e-4

    # Prompt 1 begins with its image: there the modes agree, and hf is independent too.
    alone = generate((), packed([1], "hf"))
    assert difference(alone.logits[0], together.logits[1]) <= 1e-5
    assert difference(mixed(None).logits[1], together.logits[1]) <= 1e-5
    assert difference(mixed(None).logits[0], together.logits[0]) > 1e-4


# --- padding ----------------------------------------------------------------------------------


def test_dropping_padding_tiles_is_exact():
    # "hf" packs all four tiles of every image, and blank images; "meta" masks them.
    all_tiles = packed(mode="hf")
    assert all_tiles.inputs.images.tile_valid.shape[1] == 12
    masked = dataclasses.replace(all_tiles, inputs=replace(all_tiles.inputs, mask_mode="meta"))
    dropped, carried = mixed(None), generate((), masked)
    np.testing.assert_array_equal(carried.tokens, dropped.tokens)
    assert difference(carried.logits, dropped.logits) <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_never_kept(method: str):
    # room for 30, of which prompt 0 has 10 and prompt 2 none
    keep, _ = prune((METHODS[method](30),), view_of(random_mllama(), packed().inputs))
    for row, available in enumerate(AVAILABLE):
        own = np.asarray(keep.indices[row])[np.asarray(keep.valid[row])]
        assert len(own) == len(set(own.tolist()))
        assert (own < available).all()
        if "ratio" not in method and "union" not in method:
            assert len(own) == min(30, available)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_no_row_sees_are_never_kept(method: str):
    inputs = packed().inputs
    images = inputs.images
    seen = images.tile_seen.copy()
    seen[1, :, 2] = False
    hidden = replace(images, tile_seen=seen)
    keep, _ = prune(
        (METHODS[method](30),), view_of(random_mllama(), replace(inputs, images=hidden))
    )
    own = np.asarray(keep.indices[1])[np.asarray(keep.valid[1])]
    assert len(own)
    assert not ((own >= 2 * PER_TILE) & (own < 3 * PER_TILE)).any()


@pytest.mark.parametrize("method", METHODS)
def test_a_limit_leaves_each_prompt_what_a_smaller_budget_would(method: str):
    view = view_of(random_mllama(), packed().inputs)
    limit = [1, 3, 2, BUDGET + 5, 3]
    pruner = replace(METHODS[method](BUDGET), limit=jnp.asarray(limit, jnp.int32))
    keep, _ = prune((pruner,), view)
    for row, own in enumerate(limit):
        budget = min(own, BUDGET)
        smaller, _ = prune((replace(METHODS[method](BUDGET), keep=budget),), view)
        expected, got = (
            np.asarray(k.indices[row])[np.asarray(k.valid[row])].tolist() for k in (smaller, keep)
        )
        assert got == expected
        assert len(got) <= min(budget, AVAILABLE[row])
