"""SGL: what a watched model's visual tokens received, and keeping the ones with most of it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Keep, Site, View
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models.cross_decoder import cross_mask
from catp_jax.pruning import Random
from catp_jax.pruning.sgl import SGL, Watch, Watched, behind_images, received
from catp_jax.readers.mllama_packing import pack
from catp_jax.struct import replace
from tests import random_blip2 as blip2
from tests import random_mllama as mllama
from tests.pruning.views import cache_view, kept, prune, random_view, run, shown, with_attention

NEW = 4
KINDS = ("opt", "mllama")
MODELS = {"opt": lambda: blip2.random_blip2("opt"), "mllama": mllama.random_mllama}
BATCHES: dict[str, Any] = {"opt": blip2, "mllama": mllama}
SIZES = {"opt": blip2.QUERIES, "mllama": mllama.ROOM}  # visual tokens there is room for


def weights_received(
    queries: np.ndarray, keys: np.ndarray, sees: np.ndarray, rows: Sequence[int]
) -> np.ndarray:
    """Attention weights of these rows, summed over rows and heads, by column; scaled queries."""
    heads, kv_heads = queries.shape[1], keys.shape[1]
    total = np.zeros(len(keys))
    for row in rows:
        columns = np.flatnonzero(sees[row])
        for head in range(heads):
            own = keys[columns, head // (heads // kv_heads)].astype(np.float64)
            logits = own @ queries[row, head].astype(np.float64)
            weights = np.exp(logits - logits.max())
            total[columns] += weights / weights.sum()
    return total


def rows_of(view: View, sample: int) -> list[int]:
    """In a decoder the last visual token's row and those of text; else all that see an image."""
    sees = np.asarray(view.sees[sample])
    first = 0
    if view.num_visual < view.valid.shape[1]:
        first = np.flatnonzero(np.asarray(view.numbers[sample]) >= 0).max()
    return [int(row) for row in np.flatnonzero(sees.any(axis=1)) if row >= first]


VIEWS = {
    "visual tokens and text": replace(cache_view(3), site=Site.READ),
    "visual tokens": replace(random_view(4), site=Site.READ),
}
on_views = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
start = jax.jit(lambda view: Watch().start(view))


@on_views
def test_a_prompt_gives_what_slow_loops_give(view: View):
    found = start(view)
    assert found.received.shape == found.numbers.shape == (len(view.valid), view.num_visual)
    for sample in range(len(view.valid)):
        expected = weights_received(*shown(view, sample), rows=rows_of(view, sample))
        np.testing.assert_allclose(found.received[sample], expected[: view.num_visual], atol=1e-5)
    assert float(found.received.max()) > 0.1


@on_views
def test_a_step_adds_the_rows_of_all_answers_and_reads_everything(view: View):
    rng = np.random.default_rng(7)
    batch = len(view.valid)
    queries = jnp.asarray(rng.normal(size=(batch, 2, 6, 4)), jnp.float32)
    sees = jnp.repeat(view.valid[:, None], 2, axis=1)
    step = with_attention(replace(view, sees=sees), queries=queries)
    reduction, after = jax.jit(Watch())(step, start(view))
    assert reduction.tokens is None
    for sample in range(batch):
        both = weights_received(*shown(step, sample), rows=[0, 1] if sees[sample].any() else [])
        more = after.received[sample] - start(view).received[sample]
        np.testing.assert_allclose(more, both[: view.num_visual], atol=1e-5)


def test_rows_before_the_last_of_several_marks_in_a_row_do_not_count():
    #        two images after one another, then one with a mark of its own, and padding
    sees = ["0000000", "1100000", "1111000", "1111000", "0000111", "0000111", "0000000"]
    table = jnp.asarray([[list(map(int, row)) for row in sees]], bool)
    assert behind_images(table)[0].tolist() == [False, False, True, True, True, True, False]


def test_layers_are_summed_by_the_tokens_own_numbers():
    def layer(numbers: list[int], values: list[float]) -> Watched:
        return Watched(numbers=jnp.asarray([numbers]), received=jnp.asarray([values]))

    states = {0: layer([0, 1, 2], [1.0, 2.0, 4.0]), 2: layer([3, 1, -1], [8.0, 16.0, 32.0])}
    assert received(states, 4).tolist() == [[1.0, 18.0, 4.0, 8.0]]


def answer(
    kind: str, pruners: tuple[Any, ...], inputs: Any = None, rows: int | None = None, beam: int = 0
) -> programs.Generated:
    inputs = BATCHES[kind].packed().inputs if inputs is None else inputs
    rows = len(BATCHES[kind].PROMPTS) if rows is None else rows
    how = beams(beam) if beam else sampling(rows)
    stop = Stop(ends=BATCHES[kind].NEVER, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)
    return programs.generate(MODELS[kind](), pruners, inputs, how, stop)


def watched(kind: str, **how: Any) -> np.ndarray:
    (states,) = answer(kind, (Watch(),), **how).selection.states
    return np.asarray(received(states, SIZES[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_watching_changes_nothing(kind: str):
    plain, seen = answer(kind, ()), answer(kind, (Watch(),))
    np.testing.assert_array_equal(seen.tokens, plain.tokens)
    np.testing.assert_allclose(seen.logits, plain.logits, rtol=1e-6)
    assert seen.selection.kept is None


def test_a_decoders_sums_are_those_of_one_pass_over_prompt_and_answer():
    """Layer by layer over the whole text, without a cache; new rows' weights over the prompt."""
    model, tokens = MODELS["opt"](), np.asarray(answer("opt", ()).tokens)
    found = watched("opt")
    language = model.language_model
    for row, prompt in enumerate(blip2.PROMPTS):
        visual = model.front(blip2.packed([row]).inputs).visual
        fed = jnp.asarray([[*prompt, *tokens[row, : NEW - 1]]])
        x = jnp.concatenate([model.language_projection(visual), language.embed(fed)], axis=1)
        size = x.shape[1]
        places = jnp.arange(size, dtype=jnp.int32)[None]
        mask = jnp.tril(jnp.ones((1, size, size), bool))
        seen = np.tril(np.ones((size, size), bool))
        seen[:, size - (NEW - 1) :] = False  # what READ does not show
        x, total = language.placed(x, places), np.zeros(size)
        for layer in language.layers_at(places):
            x, queries, made = layer(x, mask=mask)
            scaled = np.asarray(queries[0]) / np.sqrt(queries.shape[3])
            rows = range(blip2.QUERIES - 1, size)
            total += weights_received(scaled, np.asarray(made.keys[0]), seen, rows)
        np.testing.assert_allclose(found[row], total[: blip2.QUERIES], rtol=1e-4, atol=1e-5)


def test_cross_attentions_sums_are_those_of_one_pass_over_prompt_and_answer():
    model, tokens = MODELS["mllama"](), np.asarray(answer("mllama", ()).tokens)
    found = watched("mllama")
    language = model.language_model
    for row, prompt in enumerate(mllama.PROMPTS):
        if not mllama.AVAILABLE[row]:
            assert not found[row].any()
            continue
        whole = [*prompt, *tokens[row, : NEW - 1].tolist()]
        inputs = pack([whole], [mllama.PICTURES[row]], mllama.CONFIG).inputs
        visual, size = model.encode(inputs.images), inputs.tokens.shape[1]
        x = language.embed_tokens(jnp.asarray(inputs.tokens))
        rope = language._rope(jnp.arange(size, dtype=jnp.int32)[None])
        causal = jnp.tril(jnp.ones((1, size, size), bool))
        total = np.zeros(mllama.ROOM)
        for number, layer in enumerate(language.layers):
            if number not in mllama.TEXT.cross_attention_layers:
                x, _, _ = layer(x, rope, causal)
                continue
            shown = layer.shown(x, visual.features)
            scaled = np.asarray(shown.queries[0]) / np.sqrt(shown.queries.shape[3])
            sees = np.asarray(visual.sees[0])
            rows = [
                place
                for place in range(len(whole))
                if sees[place].any() and whole[place : place + 2] != [mllama.IMAGE] * 2
            ]
            own = weights_received(scaled, np.asarray(shown.made.keys[0]), sees, rows)
            total[: len(own)] += own
            x = layer(x, shown.made, *cross_mask(visual.sees, visual.slots.valid, "meta"))
        np.testing.assert_allclose(found[row], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beam", [0, 3])
def test_every_row_that_reads_images_spreads_one_weight_a_head(beam: int):
    """Beams of a prompt are rows that add to the same sum."""
    sums = watched("mllama", beam=beam).sum(axis=1)
    heads, layers = mllama.TEXT.num_attention_heads, len(mllama.TEXT.cross_attention_layers)
    for row, prompt in enumerate(mllama.PROMPTS):
        rows = 0
        if mllama.IMAGE in prompt:
            rows = len(prompt) - prompt.index(mllama.IMAGE) + (beam or 1) * (NEW - 1)
            rows -= prompt[:2] == (mllama.IMAGE,) * 2
        np.testing.assert_allclose(sums[row], rows * heads * layers, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_received_the_same_alone_as_in_the_batch(kind: str):
    together = watched(kind)
    for row in range(len(BATCHES[kind].PROMPTS)):
        inputs = BATCHES[kind].packed([row]).inputs
        if getattr(inputs, "images", inputs) is None:
            continue
        alone = watched(kind, inputs=inputs, rows=1)
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_after_another_method_what_is_received_goes_to_the_original_tokens():
    out = answer("mllama", (Random(keep=6, site=Site.CROSS, seed=1), Watch()))
    found, keep = np.asarray(received(out.selection.states[1], mllama.ROOM)), out.selection.kept
    assert keep is not None
    for row in range(len(mllama.PROMPTS)):
        left = kept(keep, row)
        assert np.flatnonzero(found[row]).tolist() == left
        assert len(left) == min(6, mllama.AVAILABLE[row])


def scores(seed: int, view: View, size: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(len(view.valid), size)), jnp.float32)


def best(row: Any, numbers: Sequence[int], number: int) -> list[int]:
    return sorted(sorted(numbers, key=lambda n: (-float(row[n]), n))[:number])


@pytest.mark.parametrize("number", [1, 4, 100])
@pytest.mark.parametrize("site", [Site.LAYER, Site.CROSS])
def test_the_highest_scores_stay_and_no_padding_whatever_its_score(site: Site, number: int):
    view = cache_view(5) if site is Site.LAYER else random_view(6)
    view = replace(view, site=site)
    given = scores(1, view, view.num_visual)
    is_there = np.asarray(view.valid)[:, : view.num_visual]
    given = jnp.where(is_there, given, 100.0)
    keep = run(SGL(keep=number, scores=given, site=site), view)[0].tokens
    for sample in range(len(is_there)):
        own = [index for index in kept(keep, sample) if index < view.num_visual]
        assert own == best(given[sample], np.flatnonzero(is_there[sample]).tolist(), number)
        text = np.flatnonzero(np.asarray(view.valid)[sample])
        assert set(text[text >= view.num_visual]) <= set(kept(keep, sample))


def test_scores_are_by_the_number_from_before_any_pruning():
    view = random_view(8)
    given = scores(2, view, view.num_visual)
    keep, _ = prune((Random(keep=6, seed=3), SGL(keep=2, scores=given)), view)
    before, _ = prune((Random(keep=6, seed=3),), view)
    for sample in range(len(view.valid)):
        assert kept(keep, sample) == best(given[sample], kept(before, sample), 2)


def test_without_a_guide_it_says_so():
    with pytest.raises(ValueError, match=r"SGL wants a guide.*catp_jax\.guided"):
        run(SGL(keep=2), random_view())


def test_in_front_of_all_layers_is_another_site():
    with pytest.raises(ValueError, match=r"from 1 on, got 0; in front of all layers is site=Site"):
        SGL(keep=2, layer=0)


SITES = [("opt", Site.LAYER), ("opt", Site.ENTRY), ("mllama", Site.CROSS)]
in_every_model = pytest.mark.parametrize(("kind", "site"), SITES)


def guided_by_itself(kind: str, site: Site, keep: int) -> tuple[SGL, Keep, programs.Generated]:
    method = SGL(keep=keep, scores=jnp.asarray(watched(kind)), site=site, layer=1)
    out = answer(kind, (method,))
    assert out.selection.kept is not None
    return method, out.selection.kept, out


@in_every_model
def test_a_model_that_guides_itself_keeps_what_it_attended_to(kind: str, site: Site):
    method, keep, out = guided_by_itself(kind, site, 3)
    available = [blip2.QUERIES] * 4 if kind == "opt" else mllama.AVAILABLE
    for row, number in enumerate(available):
        assert kept(keep, row) == best(method.scores[row], range(number), 3)  # type: ignore[index]
    assert float(jnp.abs(out.logits - answer(kind, ()).logits).max()) > 1e-3


@in_every_model
def test_a_full_budget_changes_nothing(kind: str, site: Site):
    _, _, out = guided_by_itself(kind, site, 1000)
    plain = answer(kind, ())
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_allclose(out.logits, plain.logits, rtol=1e-5, atol=1e-5)


@in_every_model
def test_a_prompt_keeps_the_same_alone_as_in_the_batch(kind: str, site: Site):
    method, keep, out = guided_by_itself(kind, site, 3)
    assert method.scores is not None
    for row in (0, 1, 3):
        inputs = BATCHES[kind].packed([row]).inputs
        own = replace(method, scores=method.scores[row : row + 1])
        alone = answer(kind, (own,), inputs=inputs, rows=1)
        assert kept(alone.selection.kept, 0) == kept(keep, row)  # type: ignore[arg-type]
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[row])


def test_the_cache_of_later_layers_holds_no_more_than_what_stays():
    for kind, site in SITES:
        method, _, _ = guided_by_itself(kind, site, 3)
        inputs = BATCHES[kind].packed().inputs
        cache = programs.prefill(MODELS[kind](), (method,), inputs, new_slots=NEW).cache
        if kind == "mllama":
            (part,) = cache.cross
            assert part.layers == mllama.TEXT.cross_attention_layers
            assert {block.keys.shape[2] for block in part.blocks} == {3}
            continue
        slots = {
            layer: block.keys.shape[2]
            for part in cache.prompts
            for layer, block in zip(part.layers, part.blocks, strict=True)
        }
        text = inputs.tokens.shape[1]
        first = blip2.QUERIES if site is Site.LAYER else 3
        assert slots == {0: first + text, 1: 3 + text, 2: 3 + text}
