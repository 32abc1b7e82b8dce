"""What design.md promises, for every method, through generation on a tiny model.

One batch has it all: text before the image, an image in front, none, three images, two tiles.
Differences are relative to the largest logit: a full budget may differ by 1e-6 (observed: not at
all), batches and references by 1e-5 (observed: 6e-7). Where a test compares many shapes, methods
run on the views of one compiled program and share the rest; `test_generate_is_its_parts` ties both
together.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax import pruning
from catp_jax.contract import Keep, run_pruners
from catp_jax.generation import generate as programs
from catp_jax.generation.inputs import Packed, locate, pack
from catp_jax.generation.sampling import sampling
from catp_jax.models.cross_decoder import CrossLayer, CrossMask
from catp_jax.models.frozen import freeze
from catp_jax.models.mllama import Inputs, Mllama
from catp_jax.pruning import FastV, KNorm, Random, TrimmedLlama
from catp_jax.struct import replace
from tests.pruning import oracles
from tests.random_mllama import (
    AVAILABLE,
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

NEW = 6  # tokens to generate
BUDGET = 7  # visual tokens to keep: fewer than any image has

METHODS = {
    "trimmed_llama": lambda keep: TrimmedLlama(keep=keep),
    "trimmed_llama, union": lambda keep: TrimmedLlama(keep=keep, per_head=max(keep // 3, 2)),
    "trimmed_llama, ratio": lambda keep: TrimmedLlama(keep=keep, k_ratio=0.1),
    "fastv": lambda keep: FastV(keep=keep),
    "k_norm": lambda keep: KNorm(keep=keep),
    "random": lambda keep: Random(keep=keep, seed=3),
}
FULL = {
    **{name: METHODS[name](ROOM) for name in ("trimmed_llama", "fastv", "k_norm", "random")},
    "trimmed_llama, union": TrimmedLlama(keep=ROOM, per_head=ROOM),
    "trimmed_llama, ratio": TrimmedLlama(keep=ROOM, k_ratio=1.0),
}
CASES = [
    *((method, "meta") for method in METHODS),
    *((method, "hf") for method in ("trimmed_llama, union", "k_norm")),
]


def test_every_method_of_the_registry_is_tested_here():
    assert {type(make(8)) for make in METHODS.values()} == set(pruning.METHODS.values())


def generate(
    pruners: tuple[Any, ...], batch: Packed, mode: str = "meta", new: int = NEW, **choice: Any
) -> programs.Generated:
    return programs.generate(
        random_mllama(),
        pruners,
        batch.inputs,
        sampling(len(batch.available), **choice),
        NEVER,
        PAD,
        mode=mode,
        max_new_tokens=new,
    )


@functools.cache
def mixed(method: str | None, mode: str = "meta") -> programs.Generated:
    """The mixed batch, generated once for all tests."""
    return generate(() if method is None else (METHODS[method](BUDGET),), packed(mode=mode), mode)


def difference(one: Any, other: Any) -> float:
    """max |Δ| over the largest magnitude."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert one.shape == other.shape
    return float(np.abs(one - other).max() / np.abs(other).max())


def kept_places(out_kept: Keep, batch: Packed, row: int) -> list[tuple[int, ...]]:
    """(image, tile, row, column) of each visual token that a prompt keeps."""
    numbers = np.asarray(out_kept.indices[row])[np.asarray(out_kept.valid[row])]
    places = locate(numbers, batch.tiles[row], CONFIG)
    return list(zip(places.image, places.tile, places.row, places.column, strict=True))


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
    unpruned = generate((), batch, "hf")
    full = generate((TrimmedLlama(keep=4 * PER_TILE),), batch, "hf")
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
    front = model.front(inputs, "meta")
    keeps = {name: run_pruners((pruner,), front.view)[0] for name, pruner in pruners.items()}
    return replace(front, view=None), keeps


def all_methods(batch: Packed, pruners: dict[str, Any]) -> dict[str, programs.Generated]:
    """What `generate` gives for each method, by few programs: the selections differ in numbers,
    not in shapes.
    """
    front, keeps = choose(random_mllama(), batch.inputs, pruners)
    return {
        name: programs.go_on(
            random_mllama(),
            front,
            keep,
            programs.Selection(kept=keep, states=()),
            sampling(len(batch.available)),
            NEVER,
            PAD,
            mode="meta",
            max_new_tokens=NEW,
        )
        for name, keep in keeps.items()
    }


PRUNERS = {name: method(BUDGET) for name, method in METHODS.items()}


@functools.cache
def whole() -> dict[str, programs.Generated]:
    return all_methods(packed(), PRUNERS)


def assert_same_sample(batch: Packed, place: int, sample: int) -> None:
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
    together, alone = mixed(None, "hf"), generate((), packed([0], "hf"), "hf")
    assert difference(alone.logits[0], together.logits[0]) > 1e-4

    # Prompt 1 begins with its image: there the modes agree, and hf is independent too.
    alone = generate((), packed([1], "hf"), "hf")
    assert difference(alone.logits[0], together.logits[1]) <= 1e-5
    assert difference(mixed(None).logits[1], together.logits[1]) <= 1e-5
    assert difference(mixed(None).logits[0], together.logits[0]) > 1e-4


# --- padding ----------------------------------------------------------------------------------


def test_dropping_padding_tiles_is_exact():
    # "hf" packs all four tiles of every image, and blank images; "meta" masks them.
    dropped, carried = mixed(None), generate((), packed(mode="hf"), "meta")
    assert packed(mode="hf").inputs.images.tile_valid.shape[1] == 12
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
    hidden = replace(images, tile_seen=images.tile_seen.at[1, :, 2].set(False))
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


prune = jax.jit(run_pruners)


@functools.partial(jax.jit, static_argnames="mode")
def view_of(model: Mllama, inputs: Inputs, mode: str = "meta") -> Any:
    return model.front(inputs, mode).view


# --- pruned = a slow reference ----------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="mode")
def masked_model(
    model: Mllama, inputs: Inputs, allowed: jax.Array, prompt: jax.Array, mode: str
) -> jax.Array:
    """Logits of every row, computed layer by layer over all visual tokens.

    Columns that are not `allowed` [b, n] are masked: for rows of the prompt in all cross-attention
    layers but the first, for later rows in all.
    """
    decoder, visual = model.language_model, model.encode(inputs.images)
    batch, length = inputs.tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    causal = jnp.tril(jnp.ones((length, length), bool))[None] & inputs.token_valid[:, None, :]
    real = visual.slots.valid[:, None, :]
    everywhere = visual.sees & real
    x = decoder.embed_tokens(inputs.tokens)
    is_first = True
    for layer in decoder.layers:
        if not isinstance(layer, CrossLayer):
            x, _ = layer(x, decoder._rope(positions), causal)
            continue
        left = allowed[:, None, :] | (prompt[:, :, None] & is_first)
        mask, fallback = everywhere & left, real & left
        some = mask.any(axis=2)
        if mode == "hf":
            mask = jnp.where(some[:, :, None], mask, fallback)
        rows = CrossMask(mask=mask, attends=mask.any(axis=2), feeds=some)
        x = layer(x, layer.cross_attn.project(visual.features), rows)
        is_first = False
    return model.lm_head(decoder.norm(x))


def oracle_columns(method: str, mode: str) -> np.ndarray:
    """The visual tokens [b, n] that the paper's selection keeps, from slow loops."""
    view = view_of(random_mllama(), packed(mode=mode).inputs, mode)
    allowed = np.zeros(view.valid.shape, bool)
    for row in range(5):
        queries, keys, sees = (np.asarray(a[row]) for a in (view.queries, view.keys, view.sees))
        if method == "fastv":
            own = oracles.fastv(queries, keys, sees, keep=BUDGET)
        elif method == "k_norm":
            own = oracles.k_norm(keys, sees, keep=BUDGET)
        elif method == "random":  # nothing to derive: any selection will do
            kept = mixed(method, mode).selection.kept
            own = np.asarray(kept.indices[row])[np.asarray(kept.valid[row])].tolist()
        else:
            options = {
                "trimmed_llama": {},
                "trimmed_llama, union": {"per_head": 2},
                "trimmed_llama, ratio": {"k_ratio": "0.1"},
            }[method]
            own = oracles.trimmed_llama(queries, keys, sees, capacity=BUDGET, **options).kept
        allowed[row, own] = True
    return allowed


def last_rows(logits: jax.Array, inputs: Inputs) -> np.ndarray:
    last = np.asarray(inputs.token_valid).sum(axis=1) - 1
    return np.asarray(logits)[np.arange(len(last)), last]


@pytest.mark.parametrize(("method", "mode"), CASES)
def test_pruned_is_the_papers_selection_and_a_mask_in_all_later_layers(method: str, mode: str):
    inputs, allowed = packed(mode=mode).inputs, oracle_columns(method, mode)
    out = mixed(method, mode)
    for row in range(5):
        own = np.asarray(out.selection.kept.indices[row])[np.asarray(out.selection.kept.valid[row])]
        assert own.tolist() == np.flatnonzero(allowed[row]).tolist()
    reference = masked_model(
        random_mllama(), inputs, jnp.asarray(allowed), inputs.token_valid, mode
    )
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
            masked_model(random_mllama(), inputs, jnp.asarray(allowed), prompt.token_valid, mode),
            inputs,
        )
        expected = logits.argmax(axis=1)
        assert out.tokens[:, step].tolist() == expected.tolist()
        for tokens, token in zip(grown, out.tokens[:, step].tolist(), strict=True):
            tokens.append(token)


def test_prefill_and_steps_give_what_generate_gives():
    model, pruners, batch = random_mllama(), (KNorm(keep=BUDGET),), packed()
    reference = mixed("k_norm")
    start = programs.prefill(model, pruners, batch.inputs, mode="meta", new_slots=NEW)
    assert difference(start.logits, reference.logits) <= 1e-6
    logits, cache, tokens = start.logits, start.cache, []
    for _ in range(NEW):
        tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache = programs.step(model, tokens[-1], cache, mode="meta")
    np.testing.assert_array_equal(jnp.stack(tokens, axis=1), reference.tokens)
    assert cache.next_slot == batch.inputs.tokens.shape[1] + NEW
    lengths = [len(tokens) + NEW for tokens in PROMPTS]
    assert cache.next_position.tolist() == lengths
    assert cache.text.valid.sum(axis=1).tolist() == lengths


def test_step_reuses_the_memory_of_the_cache():
    model, batch = random_mllama(), packed()
    start = programs.prefill(model, (KNorm(keep=BUDGET),), batch.inputs, mode="meta", new_slots=NEW)
    token = jnp.zeros(5, jnp.int32)
    text = programs.step.lower(model, token, start.cache, mode="meta").compile().as_text()
    header = next(line for line in text.splitlines() if "input_output_alias" in line)
    aliases = header.count("alias)")
    buffers = jax.tree.leaves(start.cache)
    assert aliases == len(buffers)

    programs.step(model, token, start.cache, mode="meta")
    assert all(buffer.is_deleted() for buffer in buffers)
    with pytest.raises(Exception, match="deleted"):
        start.cache.layers[0].keys + 1.0


def test_look_and_go_on_is_generate_at_a_capacity_that_holds_the_union():
    model, batch = random_mllama(), packed()
    uncut = TrimmedLlama(keep=None, k_ratio=0.01)
    front, keep, selection = programs.look(model, (uncut,), batch.inputs, mode="meta")
    wanted = int(keep.valid.sum(axis=1).max())
    assert keep.indices.shape == (5, ROOM)
    assert wanted == int(selection.states[0].union.max())
    assert 1 < wanted < BUDGET
    assert not selection.states[0].overflow.any()

    cut_keep, cut = programs.cut(keep, selection, BUDGET)
    out = programs.go_on(
        model,
        front,
        cut_keep,
        replace(cut, states=()),
        sampling(5),
        NEVER,
        PAD,
        mode="meta",
        max_new_tokens=NEW,
    )
    fixed = generate((TrimmedLlama(keep=BUDGET, k_ratio=0.01),), batch)
    np.testing.assert_array_equal(out.tokens, fixed.tokens)
    assert difference(out.logits, fixed.logits) <= 1e-6
    jax.tree.map(np.testing.assert_array_equal, selection.states, fixed.selection.states)
    for row in range(5):
        assert kept_places(cut.kept, batch, row) == kept_places(fixed.selection.kept, batch, row)


def test_a_frozen_model_gives_what_the_model_gives():
    out = programs.generate(
        freeze(random_mllama()),
        (METHODS["fastv"](BUDGET),),
        packed().inputs,
        sampling(5),
        NEVER,
        PAD,
        mode="meta",
        max_new_tokens=NEW,
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

    def run(keep: int, ratio: float, batch: Packed, **choice: Any) -> None:
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
    _front, _keep, _selection = programs.look(
        model, (TrimmedLlama(keep=None, k_ratio=0.1),), packed().inputs, mode="meta"
    )
    start = programs.prefill(
        model, (KNorm(keep=BUDGET),), packed().inputs, mode="meta", new_slots=NEW
    )
    programs.step(model, jnp.zeros(5, jnp.int32), start.cache, mode="meta")
    sizes = [f._cache_size() for f in (programs.look, programs.prefill, programs.step)]
    for order in ([3, 1, 1, 0, 2], [1, 3, 3, 4, 4]):
        other = packed(order)
        programs.look(model, (TrimmedLlama(keep=None, k_ratio=0.7),), other.inputs, mode="meta")
        cache = programs.prefill(
            model, (KNorm(keep=BUDGET),), other.inputs, mode="meta", new_slots=NEW
        ).cache
        for _ in range(3):
            _, cache = programs.step(model, jnp.ones(5, jnp.int32), cache, mode="meta")
    assert sizes == [f._cache_size() for f in (programs.look, programs.prefill, programs.step)]


# --- purity -----------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_result_and_leaves_its_inputs_alone():
    model, batch, pruners = random_mllama(), packed(), (METHODS["random"](BUDGET),)
    before = jax.tree.map(np.array, (model, pruners, batch.inputs))
    out = generate(pruners, batch)
    jax.tree.map(np.testing.assert_array_equal, out, mixed("random"))
    jax.tree.map(np.testing.assert_array_equal, (model, pruners, batch.inputs), before)
