"""Eigen Attention against NumPy's singular vectors and slow loops, by hand, and in both models."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Basis, Site, View
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models import one_row
from catp_jax.models.blocks import Read
from catp_jax.pruning import ElasticCache, KNorm, ThinK
from catp_jax.pruning.eigen import Directions, EigenAttention, Gather, Near, search
from catp_jax.pruning.learned import Learned
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
from tests.pruning.oracles import attention_row
from tests.pruning.views import cache_view, random_view, run, shown

HEADS, CHANNELS = 3, 4  # of keys, in every view and model
VIEWS = {
    "text too": cache_view(1, visual=15, text=12),
    "visual": replace(random_view(2), site=Site.CACHE),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


def learned_of(*views: View) -> Directions:
    """What one layer learns from these views."""
    grams = [run(Gather(), view)[1] for view in views]

    def total(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(getattr(gram, name)) for gram in grams]).sum(axis=0)

    return Directions.learned({5: (total("keys"), total("values"))})


def values_of(view: View, sample: int) -> np.ndarray:
    if view.values is None:
        raise ValueError("this view shows no values")
    return np.asarray(view.values[sample], np.float64)


def stacked(view: View, head: int) -> tuple[np.ndarray, np.ndarray]:
    """The keys and queries that share a head, one below the other, and its values."""
    keys_and_queries, values = [], []
    for sample in range(len(view.valid)):
        queries, keys, sees = shown(view, sample)
        for column in np.flatnonzero(view.valid[sample]):
            keys_and_queries.append(keys[column, head])
            values.append(values_of(view, sample)[column, head])
        for row in range(len(sees)):
            for query_head in range(head * 2, head * 2 + 2):
                if any(sees[row]):
                    keys_and_queries.append(queries[row, query_head] * 2)  # the root of 4 channels
    return np.asarray(keys_and_queries, np.float64), np.asarray(values, np.float64)


@every_view
def test_directions_are_the_singular_vectors_of_keys_with_queries_and_of_values(view: View):
    found = learned_of(view)
    for head in range(HEADS):
        for name, matrix in zip(("keys", "values"), stacked(view, head), strict=True):
            _, strength, vectors = np.linalg.svd(matrix)
            np.testing.assert_allclose(
                found.arrays[f"5.{name}.strength"][head], strength, rtol=1e-4
            )
            alike = vectors @ found.arrays[f"5.{name}"][head]
            np.testing.assert_allclose(np.abs(alike), np.eye(CHANNELS), atol=2e-3)


def test_samples_of_several_batches_count_together():
    one, other = cache_view(1), cache_view(2)
    both = learned_of(one, other)
    for head in range(HEADS):
        pairs = zip(stacked(one, head), stacked(other, head), strict=True)
        for name, parts in zip(("keys", "values"), pairs, strict=True):
            strength = np.linalg.svd(np.concatenate(parts), compute_uv=False)
            np.testing.assert_allclose(both.arrays[f"5.{name}.strength"][head], strength, rtol=1e-4)


def test_a_layer_that_reads_text_alone_teaches_nothing():
    gram = run(Gather(), replace(cache_view(), num_visual=0))[1]
    assert not any(leaf.any() for leaf in jax.tree.leaves(gram))


@pytest.mark.parametrize(
    ("grams", "says"),
    [
        ({}, "no layer of the model reads visual tokens"),
        ({2: (np.ones((1, 2, 2)), np.full((1, 2, 2), np.nan))}, "layer 2 has values that are not"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(grams: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Directions.learned(grams)


def of_strengths(*layers: tuple[Any, Any]) -> Directions:
    """Directions of these strengths [kv, d] of keys and of values, along the axes."""
    arrays = {}
    for layer, pair in enumerate(layers):
        for name, strength in zip(("keys", "values"), pair, strict=True):
            kv, channels = np.shape(strength)
            arrays[f"{layer}.{name}"] = np.broadcast_to(np.eye(channels), (kv, channels, channels))
            arrays[f"{layer}.{name}.strength"] = np.asarray(strength, np.float32)
    return Directions(arrays)


@pytest.mark.parametrize(
    ("share", "keys", "values"),
    [
        *((0.0, 1, 1), (0.3, 1, 1), (0.45, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.75, 2, 2)),
        *((0.76, 2, 3), (0.95, 3, 3), (1.0, 3, 3), (2.0, 4, 4)),
    ],
)
def test_a_rank_is_how_many_directions_hold_less_in_the_head_that_needs_most(
    share: float, keys: int, values: int
):
    """Keys hold .4 .7 .9 1, and 1 1 1 1; values .25 .5 .75 1, and a head has none of any length."""
    found = of_strengths(([[4, 3, 2, 1], [10, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]))
    assert found.ranks(share) == {0: (keys, values)}


@pytest.mark.parametrize(
    ("channels", "counted", "rank"),
    [
        *((64, 0, 8), (64, 8, 8), (64, 9, 16), (64, 63, 64), (128, 57, 64)),
        *((68, 65, 68), (63, 9, 9), (63, 0, 1), (16, 5, 5)),
    ],
)
def test_ranks_are_whole_eights_where_a_head_is_wide(channels: int, counted: int, rank: int):
    even = of_strengths((np.ones((2, channels)), np.ones((2, channels))))
    assert even.ranks((counted + 0.5) / channels) == {0: (rank, rank)}


def slow_ranks(found: Directions, share: float) -> list[int]:
    """Of keys and of values of each layer in turn, in Python's own numbers."""
    unit = 8 if found.channels >= 64 else 1
    ranks = []
    for layer in found.layers:
        for name in ("keys", "values"):
            most = 0
            for strength in found.arrays[f"{layer}.{name}.strength"].astype(np.float64):
                held = np.cumsum(strength) / strength.sum()
                most = max(most, sum(1 for some in held.tolist() if some < share))
            while most % unit or most == 0:
                most += 1
            ranks.append(min(most, found.channels))
    return ranks


def random_directions(seed: int, channels: int = 6, layers: int = 3) -> Directions:
    rng = np.random.default_rng(seed)

    def strength() -> np.ndarray:
        return -np.sort(-(rng.uniform(size=(2, channels)) ** 3), axis=1)

    return of_strengths(*((strength(), strength()) for _ in range(layers)))


@pytest.mark.parametrize("channels", [6, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_within_a_share_it_takes_all_that_fits_and_the_next_does_not(seed: int, channels: int):
    found = random_directions(seed, channels)
    held = {
        float(some)
        for name, array in found.arrays.items()
        if name.endswith("strength")
        for row in array.astype(np.float64)
        for some in np.cumsum(row) / row.sum()
    }
    every = [slow_ranks(found, float(np.nextafter(some, 2.0))) for some in (0.0, *sorted(held))]
    sums = [sum(ranks) for ranks in every]
    assert sums == sorted(sums)
    smallest, before = sums[0], 0
    whole = 2 * 3 * channels
    for share in (1e-6, smallest / whole, 0.25, 0.4, 0.5, 0.77, 0.999, 1.0):
        ranks = [rank for pair in found.within(share).values() for rank in pair]
        fitting = [some for some in every if sum(some) <= share * whole + 1e-9]
        assert ranks == (fitting[-1] if fitting else every[0])
        assert found.left(found.within(share)) <= max(share, smallest / whole)
        assert sum(ranks) >= before
        before = sum(ranks)
    assert before == whole


def test_a_budget_of_tokens_is_one_of_bytes():
    found = random_directions(3)
    for keep, of, share in (
        (5, 10, 0.5),
        (7, 8, 0.875),
        (10, 10, 1.0),
        (20, 10, 1.0),
        (1, 99, 0.0),
    ):
        learned = Learned("eigen", {}, {}, found.arrays)
        bases = EigenAttention.from_learned(learned, keep, of)["bases"]
        ranks = {
            layer: tuple(found.channels if one is None else one.matrix.shape[2] for one in pair)
            for layer, pair in bases.items()
        }
        assert ranks == found.within(share)


def test_bases_are_the_first_directions():
    found = learned_of(cache_view())
    ((keys, values),) = found.bases({5: (1, 3)}).values()
    np.testing.assert_array_equal(keys.matrix, found.arrays["5.keys"][:, :, :1])
    np.testing.assert_array_equal(values.matrix, found.arrays["5.values"][:, :, :3])


def random_bases(ranks: tuple[int, int], seed: int = 0) -> tuple[Basis, Basis]:
    rng = np.random.default_rng(seed)

    def basis(rank: int) -> Basis:
        square = np.linalg.qr(rng.normal(size=(HEADS, CHANNELS, CHANNELS)))[0]
        return Basis(matrix=jnp.asarray(square[:, :, :rank], jnp.float32))

    return basis(ranks[0]), basis(ranks[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(2, HEADS, 5, CHANNELS), (2, HEADS, 2, 3, CHANNELS)])
def test_arrays_of_16_bits_are_put_into_directions_and_back(shape: tuple[int, ...], dtype: Any):
    """Keys or values, and a step's queries."""
    basis = random_bases((2, 2))[0]
    array = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    made = jax.jit(lambda basis, array: basis.apply(array))(basis, array)
    again = jax.jit(lambda basis, made: basis.back(made))(basis, made)
    assert made.dtype == again.dtype == dtype
    for head in range(HEADS):
        matrix = np.asarray(basis.matrix[head], np.float64)
        few = np.asarray(array[:, head], np.float64) @ matrix
        np.testing.assert_allclose(np.asarray(made[:, head], np.float64), few, atol=0.03)
        np.testing.assert_allclose(
            np.asarray(again[:, head], np.float64), few @ matrix.T, atol=0.06
        )


@every_view
@pytest.mark.parametrize("ranks", [(2, 3), (4, 1), (1, 4), (4, 4)])
def test_how_near_a_layer_stays_is_what_loops_give(view: View, ranks: tuple[int, int]):
    keys_in, values_in = random_bases(ranks)
    projections = [
        np.asarray(basis.matrix, np.float64) @ np.asarray(basis.matrix, np.float64).swapaxes(1, 2)
        for basis in (keys_in, values_in)
    ]
    found = run(Near(bases={view.layer: (keys_in, values_in)}), view)[1]
    for sample in range(len(view.valid)):
        queries, keys, sees = shown(view, sample)
        values = values_of(view, sample)
        off = [
            np.einsum("nkd,kde->nke", array, by)
            for array, by in zip((keys, values), projections, strict=True)
        ]
        output = error = 0.0
        for row, head in np.ndindex(len(sees), queries.shape[1]):
            own = head // 2
            whole = attention_row(queries, keys, sees, row, head) @ values[:, own]
            mine = attention_row(queries, off[0], sees, row, head) @ off[1][:, own]
            output += (whole**2).sum()
            error += ((mine - whole) ** 2).sum()
        np.testing.assert_allclose(found.output[sample], output, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.error[sample], error, rtol=1e-3, atol=1e-6)


def test_how_near_a_layer_stays_is_not_asked_of_other_layers():
    found = run(Near(bases={9: random_bases((1, 1))}), cache_view())[1]
    assert not found.output.any()
    assert not found.error.any()


def counts_of(bases: dict[int, tuple[Basis, Basis]]) -> dict[int, tuple[int, ...]]:
    """How many directions are not zero, of arrays that are always whole."""
    for pair in bases.values():
        assert {basis.matrix.shape for basis in pair} == {(2, 6, 6)}
    return {
        layer: tuple(int(basis.matrix.any(axis=(0, 1)).sum()) for basis in pair)
        for layer, pair in bases.items()
    }


def test_a_search_ends_a_step_before_a_layer_is_off_by_more():
    found = random_directions(4)
    limits, asked = {0: 8, 1: 0, 2: 11}, []

    def errors(bases: Any) -> dict[int, float]:
        counts = counts_of(bases)
        asked.append(counts)
        return {
            layer: 0.0249 if sum(counts[layer]) >= limits[layer] else 0.025
            for layer in found.layers
        }

    chosen = search(found, errors)
    shares = [1 - 0.02 * number for number in range(len(asked))]
    for layer, limit in limits.items():
        expected = (6, 6)
        for share in shares:
            number = 2 * layer
            ranks = tuple(slow_ranks(found, share)[number : number + 2])
            if sum(ranks) < limit:
                break
            expected = ranks
        assert chosen[layer] == expected
    assert chosen[1] == (1, 1)  # it was never off
    assert sum(chosen[0]) == min(sum(some[0]) for some in asked if sum(some[0]) >= 8) < 12


def test_a_search_leaves_all_where_every_step_is_too_much():
    found = random_directions(4)
    calls = []

    def errors(bases: Any) -> dict[int, float]:
        calls.append(bases)
        return dict.fromkeys(found.layers, 0.5)

    assert search(found, errors) == dict.fromkeys(found.layers, (6, 6))
    assert len(calls) == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="got keep=0"):
        EigenAttention(keep=0, bases={})


@pytest.mark.parametrize("view", [replace(cache_view(), num_visual=0), cache_view()])
def test_layers_of_text_and_layers_without_directions_are_left(view: View):
    layer = view.layer if not view.num_visual else view.layer + 1
    reduction, state = run(EigenAttention(keep=1, bases={layer: random_bases((1, 1))}), view)
    assert (reduction.tokens, reduction.keys, reduction.values, state) == (None, None, None, ())


# In models


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
