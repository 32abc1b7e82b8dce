"""The prompt's last token read from the cache: what it changes, and what it doesn't."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image

import catp_jax
from catp_jax.contract import Site
from catp_jax.generation import generate as programs
from catp_jax.model import Model
from catp_jax.pruning import CSP, FastV, KNorm, TrimmedLlama
from tests.shallow import shallow

PICTURES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
QUESTIONS = ["what color is the circle?", "is there a red circle in the image?"]


@pytest.fixture(scope="module", params=["mini-llama-vision", "mini-blip2-opt"])
def model(request: Any) -> Model:
    return catp_jax.load(shallow(request.param))


def asked(model: Model, pruners: Any, *, late: bool, **options: Any) -> Any:
    packed = model.prepare(PICTURES, QUESTIONS)
    packed = model.late(packed) if late else packed
    return model.generate_packed(packed, pruners, max_new_tokens=4, **options)


def test_unpruned_it_makes_no_difference(model: Model):
    early, late = asked(model, (), late=False), asked(model, (), late=True)
    assert late.tokens == early.tokens
    np.testing.assert_allclose(late.logits, early.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_pruned_in_the_cache_counts_from_the_first_token_on(model: Model, beams: int):
    method = KNorm(keep=1, site=Site.CACHE)
    early = asked(model, [method], late=False, num_beams=beams)
    late = asked(model, [method], late=True, num_beams=beams)
    whole = asked(model, (), late=False)
    np.testing.assert_allclose(early.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert np.abs(late.logits - whole.logits).max() > 1e-3


def test_it_is_the_prompt_without_its_last_token_and_a_step(model: Model):
    packed = model.prepare(PICTURES, QUESTIONS)
    method = CSP(keep=2)
    late = model.late(packed)
    start = programs.prefill(model.network, (method,), late.inputs, new_slots=4)
    lengths = [len(tokens) for tokens in model.reader.before_answers(packed)]
    last = [tokens[-1] for tokens in model.reader.before_answers(packed)]
    np.testing.assert_array_equal(late.last, last)
    np.testing.assert_array_equal(
        late.inputs.token_valid.sum(axis=1) + 1, packed.inputs.token_valid.sum(axis=1)
    )
    assert len(set(lengths)) == len(lengths)
    states = start.selection.states
    logits, _, _ = programs.step(model.network, (method,), late.last, start.cache, states)
    np.testing.assert_allclose(
        asked(model, [method], late=True).logits, logits, rtol=1e-4, atol=1e-4
    )


def test_encoded_batches_and_those_read_one_by_one_say_the_same(model: Model):
    method = [KNorm(keep=2, site=Site.CACHE)]
    together = asked(model, method, late=True)
    encoded = model.encode(model.late(model.prepare(PICTURES, QUESTIONS)))
    assert model.generate_packed(encoded, method, max_new_tokens=4).tokens == together.tokens
    for row, (picture, question) in enumerate(zip(PICTURES, QUESTIONS, strict=True)):
        alone = model.late(model.prepare([picture], [question]))
        found = model.generate_packed(alone, method, max_new_tokens=4)
        assert found.tokens[0] == together.tokens[row]


def test_it_goes_with_a_method_that_finds_its_own_number():
    llama = catp_jax.load(shallow("mini-llama-vision"))
    own = TrimmedLlama(keep=None, k_ratio=0.2)
    fixed = TrimmedLlama(keep=200, k_ratio=0.2)
    assert asked(llama, [own], late=True).tokens == asked(llama, [fixed], late=True).tokens


def test_a_method_in_front_of_a_layer_scores_by_the_token_before_the_last(model: Model):
    """Its last row is then the prompt's last but one."""
    packed = model.prepare(PICTURES, QUESTIONS)
    late = model.late(packed)
    short = dataclasses.replace(packed, inputs=late.inputs)
    pruner = [FastV(keep=2, layer=1)]
    ours = model.generate_packed(late, pruner, max_new_tokens=1).kept
    theirs = model.generate_packed(short, pruner, max_new_tokens=1).kept
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(own.number, other.number)


def test_a_model_that_prunes_nothing_in_its_cache_refuses():
    t5 = catp_jax.load(shallow("mini-blip2-t5"))
    with pytest.raises(ValueError, match="prunes nothing in its cache"):
        t5.late(t5.prepare(PICTURES, QUESTIONS))


def test_rules_about_the_prompt_hold_for_all_of_it(model: Model):
    options = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1}
    early, late = asked(model, (), late=False, **options), asked(model, (), late=True, **options)
    assert late.tokens == early.tokens


def test_what_is_late_or_encoded_already_is_refused(model: Model):
    packed = model.prepare(PICTURES, QUESTIONS)
    for one in (model.late(packed), model.encode(packed)):
        with pytest.raises(ValueError, match="before encode"):
            model.late(one)


def test_a_prompt_that_ends_with_its_image_is_refused():
    llama = catp_jax.load(shallow("mini-llama-vision"))
    packed = llama.prepare(PICTURES, [QUESTIONS[0], "what is this? <|image|>"])
    with pytest.raises(ValueError, match="prompt 1 ends with an image or is a single token"):
        llama.late(packed)
