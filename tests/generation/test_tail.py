"""Caches that hold a fixed number of an answer's tokens, on all decoders, through Elastic Cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Room, Site
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.contrast import contrasted
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models import cross_decoder, decoder
from catp_jax.models.frozen import freeze
from catp_jax.pruning import ElasticCache, make
from catp_jax.sharding.mesh import make_mesh
from catp_jax.sharding.place import fetch, kv_heads, place_inputs, replicate
from tests.sharding.models import inputs, model, on_mesh

KINDS = ("opt", "vicuna", "mllama")
NEW, TAIL, POINT, ROWS = 9, 4, 1, 8
ALL = ElasticCache(keep=1000, tail=TAIL, point=POINT)  # nothing of the prompt is merged
ANSWERS = np.random.default_rng(5).integers(2, 70, (ROWS, NEW)).astype(np.int32)


def stop(new: int) -> Stop:
    never = jnp.asarray([79], jnp.int32)
    return Stop(ends=never, pad=jnp.asarray(0, jnp.int32), max_new_tokens=new)


def visible(step: int) -> list[int]:
    """Which new tokens there are once token number `step` has come."""
    there = []
    for token in range(step + 1):
        there.append(token)
        if len(there) > TAIL:
            del there[POINT]
    return there


@functools.cache
def frozen(kind: str) -> Any:
    return freeze(model(kind))


def forced(kind: str, pruner: Any, answers: np.ndarray, batch: Any) -> np.ndarray:
    """The logits after each token of given answers, one step after the other."""
    start = programs.prefill(frozen(kind), (pruner,), batch, new_slots=64)
    cache, found = start.cache, []
    if len(answers) > len(start.logits):
        cache = cache.spread(len(answers) // len(start.logits))
    for tokens in answers.T:
        logits, cache, _ = programs.step(frozen(kind), (pruner,), tokens, cache, ((),))
        found.append(logits)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_all_tokens_under_a_mask(kind: str, monkeypatch: pytest.MonkeyPatch):
    """Each token was computed from those that were there then, and so were they."""
    found = forced(kind, ALL, ANSWERS, inputs(kind))
    plain = forced(kind, ElasticCache(keep=1000), ANSWERS, inputs(kind))
    whole = inputs(kind, ANSWERS.tolist())

    def masked(rows: Any, columns: Any) -> jax.Array:
        valid = np.asarray(columns.valid)
        mask = np.tril(np.ones((valid.shape[1],) * 2, bool))[None] & valid[:, None]
        for row, real in enumerate(map(np.flatnonzero, valid)):
            prompt, answer = real[:-NEW], real[-NEW:]
            for step in range(NEW):
                mask[row, answer[step]] = False
                mask[row, answer[step], [*prompt, *answer[visible(step)]]] = True
        return jnp.asarray(mask)

    for module in (decoder, cross_decoder):
        monkeypatch.setattr(module, "causal_mask", masked)
    every = np.asarray(model(kind)(whole))
    text = np.asarray(whole.token_valid)
    before = every.shape[1] - text.shape[1]  # visual tokens in front
    expected = np.stack(
        [row[before + np.flatnonzero(valid)[-NEW:]] for row, valid in zip(every, text, strict=True)]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[:, :TAIL], plain[:, :TAIL], rtol=1e-5, atol=1e-5)
    assert np.abs(found[:, TAIL:] - plain[:, TAIL:]).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_do_not_grow_with_the_number_of_new_tokens(kind: str):
    pruner = ElasticCache(keep=3, tail=8)

    def made(new: int, pruner: Any = pruner) -> Any:
        def caches(network: Any, batch: Any) -> Any:
            cache = programs.prefill_with(network, (pruner,), batch, new).cache
            return cache, cache.spread(3)

        return jax.eval_shape(caches, frozen(kind), inputs(kind))

    assert made(64) == made(9)
    for cache, rows in zip(made(64), (1, 3), strict=True):
        for block in cache.tail.blocks:
            assert block.keys.shape[2] == block.values.shape[2] == 8 * rows
        assert cache.tail.seen.shape == (ROWS * rows, 8 * rows)
    assert made(64, ElasticCache(keep=3))[0].tail.seen.shape == (ROWS, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_as_long_as_the_answer_changes_nothing(kind: str):
    found, whole = (
        programs.generate(frozen(kind), (pruner,), inputs(kind), sampling(ROWS), stop(NEW))
        for pruner in (ElasticCache(keep=3, tail=NEW, point=2), ElasticCache(keep=3))
    )
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_array_equal(found.logits, whole.logits)
    assert Room.of((ElasticCache(keep=3, tail=NEW),), NEW).held == NEW


@pytest.mark.parametrize("kind", ["opt", "mllama"])
def test_rows_of_a_prompt_are_as_they_are_alone(kind: str):
    """Two answers to each prompt, in one tail."""
    pruner = ElasticCache(keep=3, tail=TAIL, point=POINT)
    other = np.random.default_rng(6).integers(2, 70, ANSWERS.shape).astype(np.int32)
    both = np.stack([ANSWERS, other], axis=1).reshape(-1, NEW)
    found = forced(kind, pruner, both, inputs(kind)).reshape(ROWS, 2, NEW, -1)
    for number, answers in enumerate((ANSWERS, other)):
        alone = forced(kind, pruner, answers, inputs(kind))
        np.testing.assert_allclose(found[:, number], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["opt", "mllama"])
def test_a_beam_goes_on_from_another_ones_tokens(kind: str):
    """Log-probabilities of the best answers are those of the same tokens one after the other."""
    pruner = ElasticCache(keep=3, tail=TAIL, point=POINT)
    how = beams(3, logprobs=0)
    out = programs.generate(frozen(kind), (pruner,), inputs(kind), how, stop(NEW))
    answers = np.asarray(out.tokens)
    logits = np.concatenate(
        [np.asarray(out.logits)[:, None], forced(kind, pruner, answers, inputs(kind))[:, :-1]],
        axis=1,
    )
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], axis=2)[..., 0]
    is_written = np.arange(NEW) < np.asarray(out.lengths)[:, None]
    np.testing.assert_allclose(
        np.asarray(out.written.logprobs)[is_written],
        np.asarray(expected)[is_written],
        rtol=1e-4,
        atol=1e-4,
    )
    assert (out.lengths > TAIL + 1).any()
    assert len({tuple(row) for row in answers.tolist()}) > 1


def test_steps_beyond_the_room_are_the_same_program():
    batch, pruner = inputs("opt"), ElasticCache(keep=3, tail=2)
    forced("opt", pruner, ANSWERS[:, :1], batch)
    compiled = programs.step._cache_size()
    forced("opt", pruner, ANSWERS, batch)
    assert programs.step._cache_size() == compiled


def test_with_less_room_than_stays_the_last_slot_is_taken_anew():
    pruner = ElasticCache(keep=3, tail=64, point=40)
    start = programs.prefill(frozen("opt"), (pruner,), inputs("opt"), new_slots=3)
    tail = start.cache.tail
    assert (tail.held, tail.point) == (3, 2)
    for _ in range(5):
        tail = tail.opened()
        assert int(tail.next_slot.max()) < 3
        tail = tail.closed(tail.blocks)


def test_drawn_answers_and_a_mesh_give_the_tokens_of_one_device():
    mesh = make_mesh("data=2,fsdp=2,tensor=2", kv_heads(model("opt")), jax.devices())
    pruner = ElasticCache(keep=3, tail=TAIL, point=POINT)
    choice = sampling(ROWS, temperature=0.8, seed=3, answers=2)
    alone = programs.generate(frozen("opt"), (pruner,), inputs("opt"), choice, stop(NEW))
    own = replicate(((pruner,), choice, stop(NEW)), mesh)
    batch = place_inputs(inputs("opt"), mesh)
    found = fetch(programs.generate(on_mesh("opt", mesh), own[0], batch, *own[1:]))
    np.testing.assert_array_equal(found.tokens, alone.tokens)
    assert len({tuple(row) for row in np.asarray(alone.tokens).tolist()}) > ROWS


def test_a_prompts_own_last_token_stays():
    """Read late, it is in the tail as well, in front of the answer."""
    batch = inputs("opt")
    places = np.arange(batch.tokens.shape[1])[None]
    last = np.where(batch.token_valid, places, -1).max(axis=1, keepdims=True)
    tokens = np.take_along_axis(np.asarray(batch.tokens), last, axis=1)[:, 0]
    late = programs.Late(inputs=batch.before(jnp.asarray(last)), last=jnp.asarray(tokens))
    np.testing.assert_allclose(
        forced("opt", ALL, ANSWERS, late), forced("opt", ALL, ANSWERS, batch), rtol=1e-4, atol=1e-4
    )


def test_a_contrast_forgets_in_its_pruned_view_alone():
    network = contrasted(frozen("opt"))
    cache = jax.eval_shape(
        functools.partial(programs.prefill, new_slots=64), network, (ALL,), inputs("opt")
    ).cache
    assert cache.masked.tail.blocks[0].keys.shape[2] == TAIL
    assert cache.full.tail.blocks[0].keys.shape[2] == 64


def test_by_name_and_what_cannot_be():
    sites = frozenset({Site.CACHE})
    made = make("elastic_cache:tail=8:point=2", 3, sites)
    assert (made.tail, made.point) == (8, 2)
    for options, says in (
        ("tail=0", "a tail of at least 1 and a point from 0 to below it, got tail 0 and point 0"),
        ("tail=4:point=4", "got tail 4 and point 4"),
        ("tail=4:point=-1", "got tail 4 and point -1"),
        ("point=1", "give tail, too"),
    ):
        with pytest.raises(ValueError, match=says):
            make(f"elastic_cache:{options}", 3, sites)
    with pytest.raises(ValueError, match="ElasticCache and ElasticCache both say how many"):
        Room.of((ALL, ALL), 64)
    with pytest.raises(ValueError, match=r"ElasticCache prunes .* which this model does not have"):
        programs.prefill(freeze(model("t5")), (ALL,), inputs("t5"), new_slots=NEW)
