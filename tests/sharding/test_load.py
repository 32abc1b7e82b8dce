"""`catp_jax.load(…, mesh=…)`: shipped models on eight devices answer as on one, in every way."""

import jax
import numpy as np
import pytest

import catp_jax
from catp_jax.generation.options import Options
from catp_jax.pruning import CATP, TrimmedLlama
from catp_jax.study.records import Conditions, Setting
from catp_jax.study.sweep import sweep
from catp_jax.study.tasks import easy_vqa
from tests.shallow import ASSETS, shallow

CIRCLE = ASSETS / "blue-circle.png"
COLOR, SHAPE = "what color is the shape?", "what shape is present?"
MESHES = {"mini-blip2-t5": "data=2,fsdp=2,tensor=2", "mini-llama-vision": "data=2,fsdp=4"}


@pytest.fixture(scope="module", params=MESHES)
def models(request: pytest.FixtureRequest):
    """The same model on one device and on all."""
    folder = shallow(request.param)
    return catp_jax.load(folder), catp_jax.load(folder, mesh=MESHES[request.param])


def test_every_weight_is_where_its_axes_say_and_fsdp_leaves_a_part_to_each(models):
    alone, spread = models
    whole = sum(array.nbytes for array in alone.network.arrays)
    each = sum(array.addressable_shards[0].data.nbytes for array in spread.network.arrays)
    assert each < 0.6 * whole
    for one, other in zip(alone.network.arrays, spread.network.arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_answers_are_the_same_pruned_beamed_and_in_a_batch_that_does_not_divide(models):
    alone, spread = models
    pruner = CATP(keep=8) if hasattr(alone.config, "qformer") else TrimmedLlama(keep=64)
    images, prompts = [CIRCLE] * 3, [COLOR, SHAPE, "is there a triangle?"]
    for pruners, options in (
        ((pruner,), {"num_beams": 3}),
        ((), {"temperature": 0.7, "seed": 3}),
    ):
        ours = spread.generate(images, prompts, pruners, max_new_tokens=4, **options)
        one = alone.generate(images, prompts, pruners, max_new_tokens=4, **options)
        assert ours.tokens == one.tokens
        np.testing.assert_allclose(ours.logits, one.logits, atol=1e-4)
        if pruners:
            for a, b in zip(ours.kept, one.kept, strict=True):
                np.testing.assert_array_equal(a.number, b.number)


def test_given_answers_are_as_likely_as_on_one_device(models):
    """Three of different lengths, one empty: no axis divides them."""
    alone, spread = models
    asked = [(COLOR, " blue"), (SHAPE, ""), ("is there a triangle?", " no it is not")]
    questions = [alone.read(CIRCLE, prompt) for prompt, _ in asked]
    answered = [alone.read(CIRCLE, prompt, begun=answer) for prompt, answer in asked]
    for pruned in ({}, {"prune": "uniform", "keep": 4}):
        ours, one = (model.likelihoods(questions, answered, **pruned) for model in (spread, alone))
        assert [len(found.tokens) > 0 for found in ours] == [True, False, True]
        for a, b in zip(ours, one, strict=True):
            assert (a.tokens, a.is_greedy) == (b.tokens, b.is_greedy)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_a_model_on_a_mesh_describes_itself_as_alone(models):
    alone, spread = models
    assert spread.describe() == alone.describe()


def test_a_stream_is_the_answer():
    model = catp_jax.load(shallow("mini-llama-vision"), mesh=MESHES["mini-llama-vision"])
    asked = {"max_new_tokens": 4, "min_new_tokens": 3}
    pieces = [*model.stream(CIRCLE, COLOR, **asked)]
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate([CIRCLE], [COLOR], **asked).text[0]


def test_a_method_that_finds_its_own_number():
    folder = shallow("mini-llama-vision")
    pruner = TrimmedLlama(keep=None, k_ratio=0.05)
    alone, spread = (
        catp_jax.load(folder, mesh=mesh).generate([CIRCLE], [COLOR], [pruner])
        for mesh in (None, "data=8")
    )
    assert spread.tokens == alone.tokens
    np.testing.assert_array_equal(spread.kept[0].number, alone.kept[0].number)


def test_a_study_has_the_same_answers_and_pictures():
    folder = shallow("mini-blip2-t5")
    questions = list(easy_vqa("test", limit=20))[8:]  # each batch is about two images: one shape
    settings = [Setting("random", 4)]
    conditions = Conditions(batch=8, options=Options(max_new_tokens=3))
    found = [
        list(
            sweep(
                catp_jax.load(folder, mesh=mesh),
                questions,
                settings,
                conditions,
                pictured=[1],
            )
        )
        for mesh in (None, "data=4,tensor=2")
    ]
    for alone, spread in zip(*found, strict=True):
        for ours, theirs in zip(spread.answers, alone.answers, strict=True):
            assert (ours.text, ours.kept) == (theirs.text, theirs.kept)
        for number, grid in alone.maps.items():
            np.testing.assert_allclose(spread.maps[number], grid, atol=2e-3)


def test_a_mesh_that_does_not_divide_is_refused_before_weights_are_read():
    with pytest.raises(ValueError, match="axis vision_heads has 3 heads, which tensor=8"):
        catp_jax.load(ASSETS / "mini-llama-vision", mesh="tensor=8")
    with pytest.raises(ValueError, match=f"16 places, and JAX sees {jax.device_count()} devices"):
        catp_jax.load(ASSETS / "mini-llama-vision", mesh="tensor=16")
