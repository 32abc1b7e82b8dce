"""Compiled programs with pruning on the tiny Llama Vision: against slow references, step by step
against whole, and how often they compile.

Differences are relative to the largest logit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models.frozen import freeze
from catp_jax.pruning import KNorm, Random, TrimmedLlama
from catp_jax.readers.mllama_packing import MllamaPacked, pack
from catp_jax.struct import replace
from tests.mllama_methods import (
    BUDGET,
    CASES,
    METHODS,
    NEW,
    difference,
    generate,
    kept_places,
    last_rows,
    masked_model,
    mixed,
    oracle_columns,
)
from tests.random_mllama import (
    CONFIG,
    IMAGE,
    NEVER,
    PAD,
    PER_TILE,
    PICTURES,
    PROMPTS,
    ROOM,
    packed,
    picture,
    random_mllama,
)


def same(one: Any, other: Any) -> None:
    """Of two programs: tokens, places and counts equal, numbers but for float32's rounding."""

    def leaf(x: jax.Array, y: jax.Array) -> None:
        if jnp.issubdtype(y.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=5e-6, atol=5e-6)
        else:
            np.testing.assert_array_equal(x, y)

    jax.tree.map(leaf, one, other)


# --- pruned = a slow reference ----------------------------------------------------------------


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_pruned_is_the_papers_selection_and_a_mask_in_all_later_layers(method: str, mode: str):
    inputs, allowed = packed(mode=mode).inputs, oracle_columns(method, mode)
    out = mixed(method, mode)
    for row in range(5):
        own = np.asarray(out.selection.kept.indices[row])[np.asarray(out.selection.kept.valid[row])]
        assert own.tolist() == np.flatnonzero(allowed[row]).tolist()
    reference = masked_model(random_mllama(), inputs, jnp.asarray(allowed), inputs.token_valid)
    assert difference(out.logits, last_rows(reference, inputs)) <= 1e-5


def test_model_with_a_selection_is_the_prefill_with_it():
    inputs = packed().inputs
    kept = mixed("trimmed_llama").selection.kept
    logits = jax.jit(lambda model, *given: model(*given))(random_mllama(), inputs, kept)
    assert difference(last_rows(logits, inputs), mixed("trimmed_llama").logits) <= 1e-6


# --- cached = uncached ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["meta", "hf"])
@pytest.mark.parametrize("method", [None, "trimmed_llama, union", "k_norm"])
def test_cached_decoding_is_reading_the_grown_text_from_scratch(method: str | None, mode: str):
    out = mixed(method, mode)
    prompt = packed(mode=mode).inputs
    room = prompt.images.tile_valid.shape[1] * PER_TILE
    allowed = np.ones((5, room), bool)
    if method is not None:
        allowed = oracle_columns(method, mode)
    grown = [list(tokens) for tokens in PROMPTS]
    for step in range(NEW):
        inputs = pack(grown, PICTURES, CONFIG, mode).inputs
        logits = last_rows(
            masked_model(random_mllama(), inputs, jnp.asarray(allowed), prompt.token_valid),
            inputs,
        )
        expected = logits.argmax(axis=1)
        assert out.tokens[:, step].tolist() == expected.tolist()
        for tokens, token in zip(grown, out.tokens[:, step].tolist(), strict=True):
            tokens.append(token)


def test_prefill_and_steps_give_what_generate_gives():
    model, pruners, batch = random_mllama(), (KNorm(keep=BUDGET),), packed()
    reference = mixed("k_norm")
    start = programs.prefill(model, pruners, batch.inputs, new_slots=NEW)
    assert difference(start.logits, reference.logits) <= 1e-6
    logits, cache, tokens = start.logits, start.cache, []
    for _ in range(NEW):
        tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache, _ = programs.step(model, (), tokens[-1], cache)
    np.testing.assert_array_equal(jnp.stack(tokens, axis=1), reference.tokens)
    assert cache.tail.next_slot.tolist() == [NEW] * 5
    lengths = [len(tokens) + NEW for tokens in PROMPTS]
    assert cache.tail.next_position.tolist() == lengths
    assert cache.text[0].valid.sum(axis=1).tolist() == [len(tokens) for tokens in PROMPTS]


def test_step_reuses_the_memory_of_the_cache():
    model, batch = random_mllama(), packed()
    start = programs.prefill(model, (KNorm(keep=BUDGET),), batch.inputs, new_slots=NEW)
    token = jnp.zeros(5, jnp.int32)
    text = programs.step.lower(model, (), token, start.cache).compile().as_text()
    header = next(line for line in text.splitlines() if "input_output_alias" in line)
    aliases = header.count("alias)")
    buffers = jax.tree.leaves(start.cache)
    assert aliases == len(buffers)

    programs.step(model, (), token, start.cache)
    assert all(buffer.is_deleted() for buffer in buffers)
    with pytest.raises(Exception, match="deleted"):
        start.cache.tail.blocks[0].keys + 1.0


def test_look_and_go_on_is_generate_at_a_capacity_that_holds_the_union():
    model, batch = random_mllama(), packed()
    uncut = TrimmedLlama(keep=None, k_ratio=0.01)
    front, keep, selection = programs.select_tokens(model, (uncut,), batch.inputs)
    wanted = int(keep.valid.sum(axis=1).max())
    assert keep.indices.shape == (5, ROOM)
    assert wanted == int(selection.states[0].union.max())
    assert 1 < wanted < BUDGET
    assert not selection.states[0].overflow.any()

    cut_keep, cut = programs.truncate(keep, selection, BUDGET)
    out = programs.generate_from(
        model,
        (),
        front,
        cut_keep,
        replace(cut, states=()),
        sampling(5),
        Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW),
    )
    fixed = generate((TrimmedLlama(keep=BUDGET, k_ratio=0.01),), batch)
    np.testing.assert_array_equal(out.tokens, fixed.tokens)
    assert difference(out.logits, fixed.logits) <= 1e-6
    same(selection.states, fixed.selection.states)
    for row in range(5):
        assert kept_places(cut.kept, batch, row) == kept_places(fixed.selection.kept, batch, row)


def test_a_fixed_budget_after_a_union_is_kept_in_the_cut_prefill_too():
    model, batch = random_mllama(), packed()
    pruners = (TrimmedLlama(keep=None, k_ratio=0.01), Random(keep=2))
    whole = generate(pruners, batch)
    front, keep, selection = programs.select_tokens(model, pruners, batch.inputs)
    out = programs.generate_from(
        model,
        pruners,
        front,
        keep,
        selection,
        sampling(5),
        Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW),
    )
    np.testing.assert_array_equal(out.tokens, whole.tokens)
    assert difference(out.logits, whole.logits) <= 1e-6
    same(out.selection, whole.selection)
    assert out.selection.kept.indices.shape == (5, 2)


def test_several_samples_of_a_prompt_share_its_cache_and_are_those_of_as_many_prompts():
    model, batch, stop = random_mllama(), packed(), Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW)
    pruners = (METHODS["k_norm"](BUDGET),)
    choice = {"temperature": 2.0, "top_k": 40}
    out = programs.generate(model, pruners, batch.inputs, sampling(5, answers=3, **choice), stop)
    assert out.tokens.shape == (15, NEW)
    assert out.logits.shape[0] == 5
    for sample in range(3):
        seeds = [3 * row + sample for row in range(5)]
        alone = programs.generate(
            model, pruners, batch.inputs, sampling(5, seed=seeds, **choice), stop
        )
        np.testing.assert_array_equal(out.tokens[sample::3], alone.tokens)
    assert len({*map(tuple, out.tokens.tolist())}) > 10
    carry = jax.eval_shape(
        lambda: programs.begin(
            programs.prefill(model, pruners, batch.inputs, new_slots=NEW),
            sampling(5, answers=3, **choice),
            stop,
        )
    )
    assert carry.last.shape == (15,)
    assert {
        block.keys.shape[0]
        for block in (
            *carry.cache.cross[0].blocks,
            *carry.cache.text[0].blocks,
            *carry.cache.tail.blocks,
        )
    } == {5}


def test_a_frozen_model_gives_what_the_model_gives():
    out = programs.generate(
        freeze(random_mllama()),
        (METHODS["fastv"](BUDGET),),
        packed().inputs,
        sampling(5),
        Stop(ends=NEVER, pad=PAD, max_new_tokens=NEW),
    )
    jax.tree.map(np.testing.assert_array_equal, out, mixed("fastv"))


# --- no compilation in the steady state -------------------------------------------------------


def test_steady_state_compiles_nothing_and_a_new_budget_one_program():
    # four prompts that fall into the mixed batch's buckets: 16 tokens, 8 tiles, 6 images
    batches = [
        pack(
            [
                (IMAGE, *range(1, length)),
                (1, IMAGE, IMAGE, *range(2, 15 - length)),
                (IMAGE, IMAGE, IMAGE, 4),
                (5, 6),
                tuple(range(1, length + 3)),
            ],
            [
                [picture(4, 40)],
                [picture(one, 41), picture(4, 42)],
                [picture(2, 43), picture(2, 44), picture(3, 45)],
                [],
                [],
            ],
            CONFIG,
        )
        for length, one in [(4, 1), (9, 2), (2, 3), (11, 4)]
    ]

    def run(keep: int, ratio: float, batch: MllamaPacked, **choice: Any) -> None:
        generate((TrimmedLlama(keep=keep, k_ratio=ratio),), batch, **choice)

    run(BUDGET, 0.5, packed())
    run(BUDGET, 0.5, packed(), temperature=0.5, top_k=3, top_p=0.9)
    compiled = programs.generate._cache_size()
    for number, batch in enumerate(batches):
        run(BUDGET, 0.1 + number / 5, batch)
        run(
            BUDGET,
            0.1 + number / 5,
            batch,
            temperature=0.7 + number,
            top_k=number + 1,
            top_p=1 - number / 10,
            seed=100 * number,
        )
    assert programs.generate._cache_size() == compiled
    run(BUDGET + 1, 0.5, batches[0])
    run(BUDGET + 1, 0.9, batches[1])
    assert programs.generate._cache_size() == compiled + 1


def test_steady_state_of_prefill_step_and_look_compiles_nothing():
    model = random_mllama()
    _front, _keep, _selection = programs.select_tokens(
        model, (TrimmedLlama(keep=None, k_ratio=0.1),), packed().inputs
    )
    start = programs.prefill(model, (KNorm(keep=BUDGET),), packed().inputs, new_slots=NEW)
    programs.step(model, (), jnp.zeros(5, jnp.int32), start.cache)
    sizes = [f._cache_size() for f in (programs.select_tokens, programs.prefill, programs.step)]
    for order in ([3, 1, 1, 0, 2], [1, 3, 3, 4, 4]):
        other = packed(order)
        programs.select_tokens(model, (TrimmedLlama(keep=None, k_ratio=0.7),), other.inputs)
        cache = programs.prefill(model, (KNorm(keep=BUDGET),), other.inputs, new_slots=NEW).cache
        for _ in range(3):
            _, cache, _ = programs.step(model, (), jnp.ones(5, jnp.int32), cache)
    assert sizes == [
        f._cache_size() for f in (programs.select_tokens, programs.prefill, programs.step)
    ]


# --- purity -----------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_result_and_leaves_its_inputs_alone():
    model, batch, pruners = random_mllama(), packed(), (METHODS["random"](BUDGET),)
    before = jax.tree.map(np.array, (model, pruners, batch.inputs))
    out = generate(pruners, batch)
    jax.tree.map(np.testing.assert_array_equal, out, mixed("random"))
    jax.tree.map(np.testing.assert_array_equal, (model, pruners, batch.inputs), before)
