"""Contrastive decoding: the pruned view against the whole one, by slow loops and by hand."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import catp_jax
from catp_jax.contract import Keep, Reduction, Site, View
from catp_jax.generation import generate as programs
from catp_jax.generation.beam import beams
from catp_jax.generation.contrast import FAR, contrast, contrasted
from catp_jax.generation.decoding import Stop
from catp_jax.generation.forcing import Forcing
from catp_jax.generation.rules import Rules
from catp_jax.generation.sampling import sampling
from catp_jax.models.frozen import freeze
from catp_jax.pruning import CATP, FastV, KNorm, TrimmedLlama
from catp_jax.struct import pytree, static
from catp_jax.targets.products import matrix_flops
from tests import random_blip2 as blip2
from tests import random_mllama as mllama
from tests.mllama_methods import last_rows, masked_model
from tests.shallow import ASSETS, shallow

NEW, VOCAB = 5, 50
ALPHA, BETA = 2.0, 0.1
KINDS = ("mllama", "opt")


@pytree
class First:
    """Reads the first visual tokens in a step, and counts how often it was asked."""

    sites = (Site.READ,)
    site: Site = static(default=Site.READ)
    keep: int = static(default=3)

    def start(self, view: View) -> Any:
        return jnp.zeros(view.valid.shape[0], jnp.int32)

    def __call__(self, view: View, state: Any) -> tuple[Reduction, Any]:
        visual = jnp.arange(view.valid.shape[1], dtype=jnp.int32)[None]
        places = jnp.broadcast_to(visual, view.valid.shape)
        is_read = (places < self.keep) | (places >= view.num_visual)
        return Reduction(tokens=Keep(indices=places, valid=view.valid & is_read)), state + 1


PRUNERS: dict[str, Any] = {"mllama": (FastV(keep=6, rows="last"),), "opt": (CATP(keep=2),)}
EVERYWHERE = [
    ("mllama", (FastV(keep=6), First())),
    ("opt", (FastV(keep=4, layer=1), KNorm(keep=2, site=Site.CACHE))),
    ("t5", (CATP(keep=2),)),
]
NAMES = [
    f"{kind}-{'-'.join(type(pruner).__name__ for pruner in pruners)}"
    for kind, pruners in EVERYWHERE
]


def model_of(kind: str) -> Any:
    return mllama.random_mllama() if kind == "mllama" else blip2.random_blip2(kind)  # type: ignore[arg-type]


def inputs_of(kind: str, rows: Sequence[int] | None = None) -> Any:
    if kind == "mllama":
        return mllama.packed(range(5) if rows is None else rows).inputs
    return blip2.packed(range(4) if rows is None else rows, kind).inputs  # type: ignore[arg-type]


def rows_of(kind: str) -> int:
    return inputs_of(kind).tokens.shape[0]


def stop_of(kind: str) -> Stop:
    never = mllama.NEVER if kind == "mllama" else blip2.NEVER
    return Stop(ends=never, pad=jnp.asarray(0, jnp.int32), max_new_tokens=NEW)


def generate(
    kind: str,
    model: Any,
    pruners: tuple[Any, ...],
    decoding: Any = None,
    rows: Sequence[int] | None = None,
) -> programs.Generated:
    inputs = inputs_of(kind, rows)
    decoding = sampling(inputs.tokens.shape[0]) if decoding is None else decoding
    return programs.generate(model, pruners, inputs, decoding, stop_of(kind))


def forced(kind: str, model: Any, pruners: tuple[Any, ...], tokens: Any) -> Any:
    """What a model thinks of these answers' tokens."""
    lengths = jnp.full(tokens.shape[0], NEW, jnp.int32)
    return generate(kind, model, pruners, Forcing(given=jnp.asarray(tokens), lengths=lengths))


def oracle(masked: Any, full: Any, alpha: float, beta: float) -> np.ndarray:
    """Contrasted logits of one row by the formula, -inf where implausible."""
    masked, full = np.asarray(masked, np.float64), np.asarray(full, np.float64)
    p = np.exp(masked - masked.max())
    p /= p.sum()
    return np.where(p >= beta * p.max(), (1 + alpha) * masked - alpha * full, -np.inf)


def check(found: Any, masked: Any, full: Any, alpha: float, beta: float, atol: float) -> None:
    """Plausible logits are the oracle's; implausible ones lie far below, in the masked order."""
    for one, m, f in zip(np.asarray(found), np.asarray(masked), np.asarray(full), strict=True):
        wanted = oracle(m, f, alpha, beta)
        plausible = np.isfinite(wanted)
        np.testing.assert_allclose(one[plausible], wanted[plausible], rtol=1e-5, atol=atol)
        rest = one[~plausible] - wanted[plausible].min() + FAR
        np.testing.assert_allclose(rest, m[~plausible] - m.max(), rtol=0, atol=0.01)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 30.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.7, 1.0])
def test_contrasted_logits_are_the_formulas(alpha: float, beta: float):
    rng = np.random.default_rng(0)
    masked, full = (rng.normal(size=(6, 40)).astype(np.float32) * 2 for _ in range(2))
    found = contrast(
        jnp.asarray(masked), jnp.asarray(full), np.asarray(alpha, "f4"), np.asarray(beta, "f4")
    )
    assert found.dtype == jnp.float32
    check(found, masked, full, alpha, beta, 1e-4)


def test_hand_made_the_contrast_is_computed_in_float32():
    masked = jnp.asarray([[3.0, 2.0, -9.0]], jnp.bfloat16)
    full = jnp.asarray([[3.0, 1.0, 9.0]], jnp.bfloat16)
    model = contrasted(None)
    found = contrast(masked, full, model.alpha, model.beta)
    assert found.tolist() == [[3.0, 3.0, 3.0 - FAR - 12.0]]


def test_a_broken_view_is_found():
    good, bad = jnp.zeros((1, 4)), jnp.full((1, 4), jnp.nan)
    model = contrasted(None)
    for masked, full in ((bad, good), (good, bad)):
        assert jnp.isnan(contrast(masked, full, model.alpha, model.beta)).all()


@functools.cache
def kept_of(kind: str) -> Keep:
    """What the pruners keep of a prompt."""
    start = programs.prefill(model_of(kind), PRUNERS[kind], inputs_of(kind), new_slots=NEW)
    return start.selection.kept


@jax.jit
def forward(model: Any, inputs: Any, keep: Keep | None) -> Any:
    return model(inputs, keep)


def uncached(kind: str, written: list[list[int]], keep: Keep | None) -> np.ndarray:
    """Logits of the next token with nothing cached, the answers as part of the prompts."""
    of: Any = mllama if kind == "mllama" else blip2
    prompts = [(*prompt, *more) for prompt, more in zip(of.PROMPTS, written, strict=True)]
    if kind == "opt":
        inputs = blip2.pack(prompts, blip2.IMAGES, blip2.CONFIGS["opt"]).inputs
        logits = np.asarray(forward(model_of(kind), inputs, keep))
        last = [np.flatnonzero(row)[-1] - len(row) for row in np.asarray(inputs.token_valid)]
        return logits[np.arange(len(last)), last]
    inputs = mllama.pack(prompts, mllama.PICTURES, mllama.CONFIG).inputs
    allowed = np.full((len(prompts), mllama.ROOM), keep is None)
    if keep is not None:
        for row, columns, valid in zip(allowed, keep.indices, keep.valid, strict=True):
            row[np.asarray(columns)[np.asarray(valid)]] = True
    prompt = inputs_of(kind).token_valid
    return last_rows(masked_model(model_of(kind), inputs, jnp.asarray(allowed), prompt), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_two_uncached_models(kind: str):
    written: list[list[int]] = [[] for _ in range(rows_of(kind))]
    for _ in range(NEW):
        masked, full = (uncached(kind, written, keep) for keep in (kept_of(kind), None))
        for answer, m, f in zip(written, masked, full, strict=True):
            answer.append(int(oracle(m, f, ALPHA, BETA).argmax()))
    model, pruners = model_of(kind), PRUNERS[kind]
    found = generate(kind, contrasted(model, ALPHA, BETA), pruners).tokens.tolist()
    assert found == written
    for other in (generate(kind, model, pruners), generate(kind, model, ())):
        assert found != other.tokens.tolist()


@pytest.mark.parametrize(("kind", "pruners"), EVERYWHERE, ids=NAMES)
def test_every_step_contrasts_what_both_models_say(kind: str, pruners: tuple[Any, ...]):
    inner, inputs = model_of(kind), inputs_of(kind)
    both = contrasted(inner, ALPHA, BETA)
    ways = [(both, pruners), (inner, pruners), (inner, ())]
    starts = [programs.prefill(*way, inputs, new_slots=NEW) for way in ways]
    logits, caches, states = (
        [getattr(start, name) for start in starts] for name in ("logits", "cache", "selection")
    )
    states = [selection.states for selection in states]
    for number in range(NEW):
        check(logits[0], logits[1], logits[2], ALPHA, BETA, 1e-4)
        assert float(np.abs(logits[1] - logits[2]).max()) > 1e-3 or number == 0
        token = logits[0].argmax(axis=1).astype(jnp.int32)
        for way, (model, some) in enumerate(ways):
            logits[way], caches[way], states[way] = programs.step(
                model, some, token, caches[way], states[way]
            )
    jax.tree.map(np.testing.assert_array_equal, states[0], states[1])
    for pruner, state in zip(pruners, states[0], strict=True):
        if isinstance(pruner, First):  # in a step it is asked once a layer, by the masked view
            assert all(asked.tolist() == [NEW] * rows_of(kind) for asked in state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_without_contrast_the_answer_is_the_pruned_models(kind: str):
    model, pruners = model_of(kind), PRUNERS[kind]
    for beta in (0.0, 1e-6):
        found = generate(kind, contrasted(model, 0.0, beta), pruners)
        wanted = generate(kind, model, pruners)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        jax.tree.map(np.testing.assert_array_equal, found.selection, wanted.selection)
    found = generate(kind, contrasted(model, 0.0, 0.0), pruners)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_full_budget_there_is_nothing_to_contrast(kind: str):
    model = model_of(kind)
    pruners = tuple(dataclasses.replace(pruner, keep=1000) for pruner in PRUNERS[kind])
    wanted = generate(kind, model, ()).tokens
    for alpha in (0.0, 1.0, 50.0):
        found = generate(kind, contrasted(model, alpha), pruners).tokens
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_gets_the_same_answer_alone_as_in_the_batch(kind: str):
    model = contrasted(model_of(kind), ALPHA, BETA)
    together = generate(kind, model, PRUNERS[kind]).tokens
    alone = generate(kind, model, PRUNERS[kind], rows=[2]).tokens
    np.testing.assert_array_equal(alone[0], together[2])
    alone = generate(kind, model, PRUNERS[kind], rows=[3, 1]).tokens
    np.testing.assert_array_equal(alone, together[jnp.asarray([3, 1])])


def test_no_token_is_drawn_that_the_masked_view_finds_implausible():
    kind = "mllama"
    model, pruners = model_of(kind), PRUNERS[kind]

    def shares(beta: float) -> np.ndarray:
        """p / max p of each token that is drawn, by the masked view."""
        found = []
        for seed in range(4):
            how = sampling(rows_of(kind), temperature=4.0, seed=100 * seed)
            drawn = generate(kind, contrasted(model, ALPHA, beta), pruners, how).tokens
            written = forced(kind, model, pruners, drawn).written
            found.append(np.exp(written.logprobs - written.top_logprobs[..., 0]))
        return np.stack(found)

    cut = shares(0.3)
    assert cut.min() >= 0.3 - 1e-4
    assert (cut < 1 - 1e-4).any()
    assert shares(0.0).min() < 0.2


def test_if_only_the_likeliest_is_plausible_the_answer_is_the_pruned_models():
    """Drawn or not, for any alpha; and if rules forbid that one, the next one is written."""
    kind = "opt"
    model, pruners, rows = model_of(kind), PRUNERS[kind], rows_of(kind)
    wanted = generate(kind, model, pruners)
    strict = contrasted(model, 9.0, 1.0)
    for how in (None, sampling(rows, temperature=20.0)):
        np.testing.assert_array_equal(generate(kind, strict, pruners, how).tokens, wanted.tokens)
    forbidden = np.unique(wanted.tokens).tolist()
    how = sampling(rows, rules=Rules.of(suppress_tokens=forbidden))
    found = generate(kind, strict, pruners, how)
    assert found.is_finite.all()
    np.testing.assert_array_equal(found.tokens, generate(kind, model, pruners, how).tokens)
    assert not np.isin(found.tokens, forbidden).any()


@pytest.mark.parametrize(
    ("kind", "way"), [("mllama", "beams"), ("opt", "beams"), ("mllama", "samples")]
)
def test_answers_of_a_prompt_go_on_from_each_other_in_both_caches(kind: str, way: str):
    """Each has the probability that the contrasted model gives it alone."""
    model, pruners = contrasted(model_of(kind), ALPHA, 0.01), PRUNERS[kind]
    if way == "beams":
        how: Any = beams(3, answers=3, logprobs=0)
    else:
        how = sampling(rows_of(kind), answers=3, temperature=1.0, seed=5, logprobs=0)
    out = generate(kind, model, pruners, how)
    assert out.is_finite.all()
    tokens = np.asarray(out.tokens).reshape(-1, 3, NEW)
    logprobs = np.asarray(out.written.logprobs).reshape(-1, 3, NEW)
    for number in range(3):
        alone = forced(kind, model, pruners, tokens[:, number]).written.logprobs
        np.testing.assert_allclose(logprobs[:, number], alone, rtol=1e-4, atol=5e-3)
    assert len({tuple(answer) for answer in tokens.reshape(-1, NEW).tolist()}) > len(tokens)
    if way == "beams":
        sums = logprobs.sum(axis=2)
        greedy = forced(kind, model, pruners, generate(kind, model, pruners).tokens).written
        assert (sums[:, 0] >= np.asarray(greedy.logprobs).sum(axis=1) - 1e-3).all()
        assert (np.diff(sums, axis=1) <= 1e-3).all()


def test_beams_are_different_answers_however_few_tokens_are_plausible():
    model = contrasted(model_of("mllama"), ALPHA, 1.0)
    out = generate("mllama", model, PRUNERS["mllama"], beams(3, answers=3))
    tokens = np.asarray(out.tokens).reshape(-1, 3, NEW)
    best = generate("mllama", model_of("mllama"), PRUNERS["mllama"]).tokens
    np.testing.assert_array_equal(tokens[:, 0], best)
    assert all(len({tuple(answer) for answer in answers.tolist()}) == 3 for answers in tokens)
    assert (np.asarray(out.lengths) == NEW).all()


def test_a_budget_that_the_data_decide_works_by_the_prefill_cut_in_two():
    model, inputs = contrasted(model_of("mllama"), ALPHA, BETA), inputs_of("mllama")
    pruners = (TrimmedLlama(keep=None, k_ratio=0.1),)
    front, keep, selection = programs.select_tokens(model, pruners, inputs)
    most = int(keep.valid.sum(axis=1).max())
    assert most < keep.indices.shape[1]
    keep, selection = programs.truncate(keep, selection, most)
    out = programs.generate_from(
        model, pruners, front, keep, selection, sampling(5), stop_of("mllama")
    )
    np.testing.assert_array_equal(out.tokens, generate("mllama", model, pruners).tokens)
    encoded = programs.encode(model, inputs)
    again = programs.generate(model, pruners, encoded, sampling(5), stop_of("mllama"))
    np.testing.assert_array_equal(out.tokens, again.tokens)


def test_other_numbers_compile_nothing():
    model = model_of("opt")
    generate("opt", contrasted(model), PRUNERS["opt"])
    compiled = programs.generate._cache_size()
    answers = {
        str(generate("opt", contrasted(model, alpha, beta), PRUNERS["opt"]).tokens)
        for alpha, beta in ((0.0, 1.0), (1.0, 0.5), (3.0, 0.0))
    }
    assert len(answers) > 1
    assert programs.generate._cache_size() == compiled


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_an_alpha_out_of_range_is_refused(alpha: float):
    with pytest.raises(ValueError, match=r"alpha is 0 \(no contrast\) or above, got"):
        contrasted(None, alpha)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_a_beta_out_of_range_is_refused(beta: float):
    with pytest.raises(ValueError, match=r"beta lies between 0 .* and 1, got"):
        contrasted(None, 1.0, beta)


def prefill_flops(kind: str, model: Any, pruners: tuple[Any, ...]) -> int:
    return matrix_flops(programs.prefill.trace(model, pruners, inputs_of(kind), new_slots=NEW))


def step_flops(kind: str, model: Any, pruners: tuple[Any, ...]) -> int:
    prefill = functools.partial(programs.prefill, new_slots=NEW)
    start = jax.eval_shape(prefill, model, pruners, inputs_of(kind))
    tokens = jax.ShapeDtypeStruct((rows_of(kind),), jnp.int32)
    states = start.selection.states
    return matrix_flops(programs.step.trace(model, pruners, tokens, start.cache, states))


@pytest.mark.parametrize(("kind", "pruners"), EVERYWHERE, ids=NAMES)
def test_it_costs_what_both_models_cost_but_for_the_front(kind: str, pruners: tuple[Any, ...]):
    model = model_of(kind)
    both = contrasted(model)
    parts = step_flops(kind, model, pruners), step_flops(kind, model, ())
    assert step_flops(kind, both, pruners) == sum(parts)
    front = matrix_flops(programs.encode.trace(model, inputs_of(kind)))
    parts = prefill_flops(kind, model, pruners), prefill_flops(kind, model, ())
    assert prefill_flops(kind, both, pruners) == sum(parts) - front


def test_a_loaded_model_answers_streams_and_weighs_answers():
    """Its first layer, which reads text alone, is in both caches."""
    model = catp_jax.load(shallow("mini-llama-vision"))
    both = dataclasses.replace(model, network=contrasted(model.network, ALPHA, BETA))
    assert both.sites == model.sites
    assert both.dtype == model.dtype
    contrast = {"contrast": [pytest.approx(float(ALPHA)), pytest.approx(float(BETA))]}
    assert both.describe() == model.describe() | contrast
    assert "alpha 2, beta 0.1" in repr(both)
    circle, prompt = ASSETS / "blue-circle.png", "what color is the shape?"
    asked: dict[str, Any] = {"prune": "fastv", "keep": "25%", "max_new_tokens": 8}
    asked["min_new_tokens"] = 7
    out = both.generate([circle], [prompt], logprobs=0, **asked)
    assert "".join(both.stream(circle, prompt, **asked)) == out.text[0]
    assert out.kept is not None
    assert len(out.kept[0].number) < out.available[0]
    pruned = {"prune": "fastv", "keep": "25%"}
    whole = both.read(circle, prompt, begun="blue zebra")
    (found,) = both.likelihoods([both.read(circle, prompt)], [whole], **pruned)
    assert min(found.logprobs) < -FAR / 2  # implausible, and yet a number
    assert np.isfinite(found.total)


def test_a_frozen_model_is_contrasted_like_the_model_and_a_step_reuses_both_caches():
    frozen = freeze(model_of("mllama"))
    both, plain = (contrasted(model, ALPHA, BETA) for model in (frozen, model_of("mllama")))
    assert both.arrays is frozen.arrays
    assert type(both.thaw()) is type(model_of("mllama"))
    pruners, inputs = PRUNERS["mllama"], inputs_of("mllama")
    start = programs.prefill(both, pruners, inputs, new_slots=NEW)
    token = jnp.zeros(5, jnp.int32)
    states, buffers = start.selection.states, jax.tree.leaves(start.cache)
    found, _, _ = programs.step(both, pruners, token, start.cache, states)
    start = programs.prefill(plain, pruners, inputs, new_slots=NEW)
    wanted, _, _ = programs.step(plain, pruners, token, start.cache, states)
    np.testing.assert_array_equal(found, wanted)
    assert all(buffer.is_deleted() for buffer in buffers)
