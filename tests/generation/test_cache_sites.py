"""Methods that prune layers apart (CACHE) and choose what a step reads (READ), on both models."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import catp_jax
from catp_jax.contract import Keep, Reduction, Site, View
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models import blocks
from catp_jax.models.cache import Prompt
from catp_jax.pruning import KNorm, Random
from catp_jax.pruning.scores import Scored
from catp_jax.struct import pytree, replace, static
from catp_jax.targets.products import matrix_flops
from tests import random_blip2 as blip2
from tests import random_mllama as mllama
from tests.shallow import shallow

NEW, BUDGET = 5, 3
KINDS = ("mllama", "opt")


def model_of(kind: str) -> Any:
    return mllama.random_mllama() if kind == "mllama" else blip2.random_blip2("opt")


def inputs_of(kind: str) -> Any:
    return (mllama if kind == "mllama" else blip2).packed().inputs


def rows_of(kind: str) -> int:
    return inputs_of(kind).tokens.shape[0]


def best(score: Any, keep: int, is_member: Any, rest: Any) -> Keep:
    """The `keep` highest members along the last axis, in order, then all of `rest`."""
    order = jnp.argsort(jnp.where(is_member, -score, jnp.inf), axis=-1, stable=True)
    chosen = jnp.sort(order[..., :keep], axis=-1).astype(jnp.int32)
    valid = jnp.take_along_axis(jnp.broadcast_to(is_member, score.shape), chosen, axis=-1)
    shape = (*score.shape[:-1], rest.shape[-1])
    after = jnp.arange(rest.shape[-1], dtype=jnp.int32) + score.shape[-1]
    return Keep(
        indices=jnp.concatenate([chosen, jnp.broadcast_to(after, shape)], axis=-1),
        valid=jnp.concatenate([valid, jnp.broadcast_to(rest, shape)], axis=-1),
    )


def without_moving(keep: Keep, size: int) -> Keep:
    """The same selection of `size` entries as a mask over all of them."""
    kept = (jax.nn.one_hot(keep.indices, size, dtype=bool) & keep.valid[..., None]).any(axis=-2)
    places = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), kept.shape)
    return Keep(indices=places, valid=kept)


@pytree
class LongKeys:
    """Each head keeps the visual tokens with the longest keys; `masks`: without moving any."""

    sites = (Site.CACHE,)
    site: Site = static(default=Site.CACHE)
    keep: int = static(default=BUDGET)
    masks: bool = static(default=False)

    def start(self, view: View) -> Any:
        return ()

    def __call__(self, view: View, state: Any) -> tuple[Reduction, Any]:
        if not view.num_visual:
            return Reduction(), state
        visual, text = view.valid[:, : view.num_visual], view.valid[:, view.num_visual :]
        keys = view.attention.keys[:, : view.num_visual].astype(jnp.float32)
        length = jnp.swapaxes(jnp.linalg.norm(keys, axis=-1), 1, 2)
        keep = best(length, self.keep, visual[:, None], text[:, None])
        if self.masks:
            keep = without_moving(keep, view.valid.shape[1])
        return Reduction(tokens=keep), state


@pytree
class Looks:
    """Reads the visual tokens with the highest logits of a step; remembers how often it was asked
    and what it read last.
    """

    sites = (Site.READ,)
    site: Site = static(default=Site.READ)
    keep: int = static(default=BUDGET)
    masks: bool = static(default=False)

    def start(self, view: View) -> Any:
        batch = view.valid.shape[0]
        wide = min(self.keep, view.num_visual)
        return jnp.zeros(batch, jnp.int32), jnp.full((batch, wide), -2, jnp.int32)

    def __call__(self, view: View, state: Any) -> tuple[Reduction, Any]:
        asked, _ = state
        if not view.num_visual:
            return Reduction(), (asked + 1, state[1])
        visual, text = view.valid[:, : view.num_visual], view.valid[:, view.num_visual :]
        batch, rows, _, channels = view.attention.queries.shape
        keys = view.attention.keys[:, : view.num_visual].astype(jnp.float32)
        grouped = view.attention.queries.reshape(batch, rows, keys.shape[2], -1, channels)
        logits = jnp.einsum("brkgd,bnkd->brkgn", grouped, keys).max(axis=(1, 2, 3))
        keep = best(logits, self.keep, visual, text)
        numbers = keep.apply(view.numbers)[:, : state[1].shape[1]]
        after = asked + 1, jnp.where(keep.valid[:, : numbers.shape[1]], numbers, -1)
        if self.masks:
            keep = without_moving(keep, view.valid.shape[1])
        return Reduction(tokens=keep), after


@functools.cache
def generate(kind: str, pruners: tuple[Any, ...], num_beams: int = 0) -> programs.Generated:
    how = beams(num_beams) if num_beams else sampling(rows_of(kind))
    never = (mllama if kind == "mllama" else blip2).NEVER
    stop = Stop(ends=never, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)
    return programs.generate(model_of(kind), pruners, inputs_of(kind), how, stop)


def prompts_of(cache: Any) -> list[Prompt]:
    """The parts of a cache that hold visual tokens."""
    parts = (*cache.text, *cache.cross) if hasattr(cache, "text") else cache.prompts
    return [part for part in parts if part.num_visual]


@functools.cache
def steps(kind: str, pruners: tuple[Any, ...]) -> tuple[Any, Any]:
    """First logits and those after each greedy token, and the last states."""
    model = model_of(kind)
    start = programs.prefill(model, pruners, inputs_of(kind), new_slots=NEW)
    found, cache, states = [start.logits], start.cache, start.selection.states
    for _ in range(NEW - 1):
        token = found[-1].argmax(axis=1).astype(jnp.int32)
        logits, cache, states = programs.step(model, pruners, token, cache, states)
        found.append(logits)
    return jnp.stack(found, axis=1), states


@pytest.mark.parametrize("method", [LongKeys, Looks])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_as_if_it_were_masked(kind: str, method: Any):
    found, _ = steps(kind, (method(),))
    masked, _ = steps(kind, (method(masks=True),))
    np.testing.assert_allclose(found, masked, rtol=1e-5, atol=1e-5)
    whole, _ = steps(kind, ())
    assert float(jnp.abs(found[:, 1:] - whole[:, 1:]).max()) > 1e-3
    np.testing.assert_allclose(
        found[:, 0], whole[:, 0], rtol=1e-5, atol=1e-5
    )  # the prompt itself saw everything


@pytest.mark.parametrize("method", [LongKeys, Looks])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_budget_changes_nothing(kind: str, method: Any):
    found, _ = steps(kind, (method(keep=1000),))
    whole, _ = steps(kind, ())
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(axis=2), whole.argmax(axis=2))


@pytest.mark.parametrize("method", [LongKeys, Looks])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loop_gives_what_single_steps_give_and_carries_the_states(kind: str, method: Any):
    out = generate(kind, (method(),))
    logits, states = steps(kind, (method(),))
    np.testing.assert_array_equal(out.tokens, logits.argmax(axis=2))
    jax.tree.map(np.testing.assert_array_equal, out.selection.states, states)


def test_every_layer_has_a_state_of_its_own():
    out = generate("mllama", (Looks(),))
    (states,) = out.selection.states
    assert sorted(states) == list(range(len(model_of("mllama").language_model.layers)))
    cross = mllama.CONFIG.text.cross_attention_layers
    for layer, (asked, read) in states.items():
        assert asked.tolist() == [NEW - 1] * rows_of("mllama")
        assert read.shape == (rows_of("mllama"), BUDGET if layer in cross else 0)
    assert any((states[cross[0]][1] != states[layer][1]).any() for layer in cross[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_caches_pruned_by_head_are_smaller_and_say_what_they_hold(kind: str):
    start = programs.prefill(model_of(kind), (LongKeys(),), inputs_of(kind), new_slots=NEW)
    whole = programs.prefill(model_of(kind), (), inputs_of(kind), new_slots=NEW)
    (every,) = prompts_of(whole.cache)
    text = every.valid.shape[1] - every.num_visual
    pruned = prompts_of(start.cache)
    assert [part.layers for part in pruned] == [(layer,) for layer in every.layers]
    seen = []
    for part, block in zip(pruned, every.blocks, strict=True):
        (own,), heads = part.blocks, block.keys.shape[1]
        batch = block.keys.shape[0]
        assert own.keys.shape == (batch, heads, BUDGET + text, block.keys.shape[3])
        assert part.valid.shape == part.numbers.shape == (batch, heads, BUDGET + text)
        kept = start.selection.cached[part.layers[0]]
        norms = np.linalg.norm(np.asarray(block.keys, np.float64), axis=-1)
        for row in range(batch):
            visual = np.flatnonzero(np.asarray(every.valid[row, : every.num_visual]))
            for head in range(heads):
                longest = sorted(visual, key=lambda n: (-norms[row, head, n], n))[:BUDGET]
                is_kept = np.asarray(kept.valid[row, head])
                assert np.asarray(kept.indices[row, head])[is_kept].tolist() == sorted(longest)
                for slot, number in enumerate(sorted(longest)):
                    found, expected = own.keys[row, head, slot], block.keys[row, head, number]
                    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
                seen.append(tuple(longest))
    assert len({*seen}) > len(pruned)  # heads and layers differ


@pytest.mark.parametrize("method", [LongKeys, Looks])
def test_after_another_method_numbers_are_those_of_the_original_tokens(method: Any):
    first = Random(keep=6, site=Site.CROSS, seed=1)
    pruners = (first, method(keep=4))
    selection, alone = (
        programs.prefill(model_of("mllama"), some, inputs_of("mllama"), new_slots=NEW).selection
        for some in (pruners, (first,))
    )
    left = alone.kept
    np.testing.assert_array_equal(selection.kept.indices, left.indices)
    layer = mllama.CONFIG.text.cross_attention_layers[-1]
    if method is LongKeys:
        kept = selection.cached[layer]
        numbers = np.where(kept.valid, kept.indices, -1).reshape(rows_of("mllama"), -1)
    else:
        _, states = steps("mllama", pruners)
        numbers = np.asarray(states[1][layer][1])
    for row in range(rows_of("mllama")):
        own = {int(n) for n in np.asarray(left.indices[row])[np.asarray(left.valid[row])]}
        found = {int(n) for n in numbers[row]} - {-1}
        assert found <= own
        assert bool(found) == bool(own)


@pytest.mark.parametrize(("kind", "method"), [("mllama", LongKeys), ("opt", Looks)])
def test_beams_share_what_was_kept_for_their_prompt(kind: str, method: Any):
    out = generate(kind, (method(),), 3)
    np.testing.assert_array_equal(out.tokens, generate(kind, (method(masks=True),), 3).tokens)
    states = jax.tree.leaves(out.selection.states)
    assert {leaf.shape[0] for leaf in states} <= {rows_of(kind)}


@pytest.mark.parametrize("method", [LongKeys, Looks])
def test_a_prompt_keeps_the_same_alone_as_in_the_batch(method: Any):
    together = generate("opt", (method(),))
    for row in range(rows_of("opt")):
        alone = programs.generate(
            model_of("opt"),
            (method(),),
            inputs_of("opt").alone(row),
            sampling(1),
            Stop(ends=blip2.NEVER, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW),
        )
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_multiplies_with_what_it_reads_alone(kind: str):
    def flops(pruners: tuple[Any, ...]) -> float:
        model, inputs = model_of(kind), inputs_of(kind)
        start = jax.eval_shape(
            functools.partial(programs.prefill, new_slots=NEW), model, pruners, inputs
        )
        tokens = jax.ShapeDtypeStruct((rows_of(kind),), jnp.int32)
        states = start.selection.states
        return matrix_flops(programs.step.trace(model, pruners, tokens, start.cache, states))

    (prompt,) = prompts_of(
        jax.eval_shape(
            functools.partial(programs.prefill, new_slots=NEW), model_of(kind), (), inputs_of(kind)
        ).cache
    )
    batch, _, _, channels = prompt.blocks[0].keys.shape
    text = model_of(kind).config.text
    heads = text.num_attention_heads
    product = 2 * batch * heads * channels * len(prompt.blocks)  # of one slot, in all layers
    dropped = prompt.num_visual - BUDGET
    assert flops(()) - flops((LongKeys(),)) == 2 * product * dropped
    # its own product with all keys is what it costs to look
    assert flops(()) - flops((Looks(),)) == 2 * product * dropped - product * prompt.num_visual


@pytree
class Mass:
    """Reads everything, and sums for each slot what it was seen with, from the prompt on."""

    sites = (Site.READ,)
    site: Site = static(default=Site.READ)
    keep: int = static(default=1)

    def start(self, view: View) -> Any:
        return self._seen(view)

    def __call__(self, view: View, state: Any) -> tuple[Reduction, Any]:
        return Reduction(), state + self._seen(view)

    def _seen(self, view: View) -> Any:
        return view.sees.sum(axis=1, dtype=jnp.int32)


@pytest.mark.parametrize("long", [128, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_state_starts_from_is_what_steps_show(kind: str, long: int, monkeypatch):
    """Of a cache that was pruned, and with slots that hold no token."""
    monkeypatch.setattr(blocks, "LONG", long)
    jax.clear_caches()
    pruners = (Sums(keep=4), Mass())
    _, (_, states) = steps.__wrapped__(kind, pruners)
    start = programs.prefill(model_of(kind), pruners, inputs_of(kind), new_slots=NEW)
    tokens = np.asarray(inputs_of(kind).token_valid)
    for part in prompts_of(start.cache):
        for layer in part.layers:
            np.testing.assert_array_equal(np.asarray(states[layer])[~np.asarray(part.valid)], 0)
            assert states[layer].shape == part.valid.shape
            if kind == "opt":  # text sees all visual tokens before it, and so does every new one
                visual = np.asarray(states[layer])[:, :4]
                rows = tokens.sum(axis=1) + NEW - 1
                assert (visual >= rows[:, None])[np.asarray(part.valid[:, :4])].all()
    jax.clear_caches()


@pytree
class Sums(Scored):
    """Keeps in each layer the tokens with the largest keys, the same for all heads."""

    sites = (Site.CACHE,)
    site: Site = static(default=Site.CACHE)

    def score(self, view: View) -> Any:
        return jnp.abs(view.attention.keys.astype(jnp.float32)).sum(axis=(2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_scores_tokens_works_in_every_layer(kind: str):
    start = programs.prefill(model_of(kind), (Sums(keep=4),), inputs_of(kind), new_slots=NEW)
    for part in prompts_of(start.cache):
        assert part.num_visual == 4
        kept = start.selection.cached[part.layers[0]]
        assert kept.indices.shape == (rows_of(kind), 4)


def test_a_prompt_that_has_ended_keeps_its_state_whatever_its_neighbours_do():
    tokens = generate("opt", (Looks(),)).tokens
    stop = Stop(ends=tokens[0, 1:2], pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)
    model, inputs = model_of("opt"), inputs_of("opt")
    together = programs.generate(model, (Looks(),), inputs, sampling(4), stop)
    alone = programs.generate(model, (Looks(),), inputs.alone(0), sampling(1), stop)
    assert int(together.lengths.max()) > int(together.lengths[0]) == int(alone.lengths[0])
    jax.tree.map(
        lambda batch, own: np.testing.assert_array_equal(batch[0], own[0]),
        together.selection.states,
        alone.selection.states,
    )


@pytree
class TextToo:
    """Keeps the first entries, text or not."""

    sites = (Site.CACHE, Site.LAYER)
    site: Site = static(default=Site.CACHE)
    layer: int = static(default=1)
    keep: int | None = static(default=2)
    by_head: bool = static(default=False)

    def start(self, view: View) -> Any:
        return ()

    def __call__(self, view: View, state: Any) -> tuple[Reduction, Any]:
        keep = Keep(indices=view.numbers[:, :2] * 0, valid=view.valid[:, :2])
        if self.by_head:
            keep = jax.tree.map(lambda array: array[:, None], keep)
        return Reduction(tokens=keep), state


@pytest.mark.parametrize(
    ("pruners", "words"),
    [
        ((LongKeys(keep=5), LongKeys()), "LongKeys cannot follow a method that keeps other tokens"),
        ((LongKeys(keep=5), Looks()), "Looks works at READ, and cannot where another method"),
        ((Looks(), Looks()), "one method at most can choose what a step reads"),
        ((TextToo(),), r"TextToo drops text, which always stays \(site CACHE\)"),
        ((TextToo(site=Site.LAYER, by_head=True),), "for each head, which site LAYER cannot"),
        ((TextToo(keep=None),), "site CACHE cannot; give it a count to keep"),
    ],
)
def test_what_cannot_be_is_refused(pruners: tuple[Any, ...], words: str):
    with pytest.raises(ValueError, match=words):
        programs.prefill(model_of("opt"), pruners, inputs_of("opt"), new_slots=NEW)


def test_t5_has_no_such_sites():
    with pytest.raises(ValueError, match=r"CACHE.*which this model does not have; it has ENTRY"):
        programs.prefill(blip2.random_blip2("t5"), (LongKeys(),), inputs_of("opt"), new_slots=NEW)


def test_a_step_without_the_states_is_refused():
    model, token = model_of("opt"), jnp.zeros(4, jnp.int32)
    cache = jax.eval_shape(
        functools.partial(programs.prefill, new_slots=NEW), model, (), inputs_of("opt")
    ).cache
    with pytest.raises(ValueError, match=r"got 0 for 1; begin with the prefill's selection.states"):
        programs.step.trace(model, (Looks(),), token, cache)
    with pytest.raises(ValueError, match=r"Looks has no state; give step the selection.states of"):
        programs.step.trace(model, (Looks(),), token, cache, (None,))


def test_a_text_alone_has_nothing_to_prune():
    inputs = replace(inputs_of("mllama"), images=None)
    stop = Stop(ends=mllama.NEVER, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)

    def answer(pruners: tuple[Any, ...]) -> Any:
        how = sampling(rows_of("mllama"))
        return programs.generate(model_of("mllama"), pruners, inputs, how, stop)

    out = answer((KNorm(keep=3), LongKeys(), Looks()))
    np.testing.assert_array_equal(out.tokens, answer(()).tokens)
    assert out.selection.kept is None
    assert out.selection.cached == {}


def test_a_users_answer_says_what_each_layer_holds():
    model = catp_jax.load(shallow("mini-llama-vision"))
    image, prompt = Image.new("RGB", (64, 64), "red"), "what color is the shape?"
    answers = model.generate([image], [prompt], [LongKeys(keep=8)], max_new_tokens=2)
    layers = model.config.text.cross_attention_layers
    assert answers.kept is None
    assert sorted(answers.cached) == sorted(layers)
    for kept in answers.cached.values():
        assert kept.indices.shape == (1, model.config.text.num_key_value_heads, 8)
        assert kept.indices.max() < answers.available[0]
