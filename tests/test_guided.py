"""A small model that guides a large one; here most models guide themselves."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import catp_jax
from catp_jax import guided as module
from catp_jax.contract import Site
from catp_jax.guided import Exit, exit_curve, guided
from catp_jax.model import Model
from catp_jax.pruning import KNorm
from catp_jax.pruning.sgl import SGL, Watch, received
from catp_jax.training.scene_questions import scenes_task
from tests.shallow import shallow

ASSETS = Path(catp_jax.__file__).parent / "assets"
CIRCLE = Image.open(ASSETS / "blue-circle.png").convert("RGB")
PICTURES = [CIRCLE, CIRCLE.crop((0, 0, 32, 32)), CIRCLE.crop((0, 16, 64, 48))]
PROMPTS = ["what color is the shape?", "what shape is present?", "is there a red shape?"]
NEW = 4
KINDS = ("mini-llama-vision", "mini-blip2-opt")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Model:
    return catp_jax.load(shallow(request.param))


@pytest.fixture(scope="module")
def llama() -> Model:
    return catp_jax.load(shallow("mini-llama-vision"))


@pytest.fixture(scope="module")
def blip2() -> Model:
    return catp_jax.load(shallow("mini-blip2-opt"))


class Untouched(Model):
    """A model that may read, but not run."""

    def pack(self, questions: Any) -> Any:
        raise AssertionError("the large model was called")


def untouched(model: Model) -> Untouched:
    fields = dataclasses.fields(model)
    return Untouched(**{field.name: getattr(model, field.name) for field in fields})


def itself(model: Model, images: Any = None, prompts: Any = None, **options: Any) -> Any:
    """The model guided by itself."""
    images, prompts = images or PICTURES, prompts or PROMPTS
    options = {"keep": "25%", "max_new_tokens": NEW} | options
    return guided(model, model, images, prompts, **options)


def plain(model: Model, **options: Any) -> Any:
    return model.generate(PICTURES, PROMPTS, max_new_tokens=NEW, **options)


def test_all_visual_tokens_give_the_large_models_own_answers(model: Model):
    out, own = itself(model, keep="100%"), plain(model)
    assert out.text == own.text == out.guide.text
    assert out.asked == [0, 1, 2]
    assert out.is_guides == [False] * 3
    assert out.scores is None
    np.testing.assert_allclose(out.large.logits[:3], own.logits, rtol=1e-4, atol=1e-5)


def test_what_stays_is_what_the_guide_attended_to_most(model: Model):
    out, own = itself(model, logprobs=0), plain(model, pruners=[Watch()], logprobs=0)
    total = np.asarray(received(own.reports[0], own.capacity))
    for row, number in enumerate(own.available):
        count = -(-number // 4)
        order = sorted(range(number), key=lambda n: (-total[row, n], n))
        assert out.large.kept[row].number.tolist() == sorted(order[:count])
    assert out.text == out.large.text[:3]
    # not the first token's: this Llama's only cross-attention layer prunes behind itself
    pairs = zip(out.large.logprobs, own.logprobs, strict=True)
    assert max(abs(one[1] - other[1]) for one, other in pairs) > 1e-3


def test_a_prompt_is_answered_the_same_alone_as_in_the_batch(model: Model):
    together = itself(model, threshold=1)
    alone = itself(model, PICTURES[1:2], PROMPTS[1:2], threshold=1)  # one tile, where four are
    assert alone.text == together.text[1:2]
    assert alone.scores == pytest.approx(together.scores[1:2], rel=1e-3)
    kept = [out.large.kept[number] for out, number in ((alone, 0), (together, 1))]
    np.testing.assert_array_equal(kept[0].number, kept[1].number)


def test_at_threshold_0_the_guide_answers_and_the_large_model_never_runs(model: Model):
    out = guided(
        untouched(model), model, PICTURES, PROMPTS, keep=4, threshold=0, max_new_tokens=NEW
    )
    assert out.text == plain(model).text
    assert out.is_guides == [True] * 3
    assert (out.asked, out.large) == ([], None)


def test_at_threshold_1_everything_goes_on_with_its_score(model: Model):
    out = itself(model, threshold=1)
    assert out.asked == [0, 1, 2]
    assert out.large.available == out.guide.available
    assert out.text == itself(model).text
    assert all(0 < score <= 1 for score in out.scores)


def test_the_less_sure_prompts_go_on_in_a_batch_of_their_own(model: Model):
    every = itself(model, threshold=1)
    low, middle, high = np.argsort(every.scores).tolist()
    out = itself(model, threshold=(every.scores[middle] + every.scores[high]) / 2)
    assert out.asked == sorted([low, middle])
    assert out.is_guides[high]
    assert out.scores == pytest.approx(every.scores)
    assert len(out.large.text) == 2
    for row in range(3):
        assert out.text[row] == (every.guide.text if row == high else every.text)[row]
    assert [kept.number.tolist() for kept in out.large.kept] == [
        every.large.kept[row].number.tolist() for row in out.asked
    ]


def test_a_batch_of_those_that_go_on_is_filled_up_to_few_sizes(blip2: Model):
    images, prompts = [*PICTURES, *PICTURES[:2]], [*PROMPTS, "what is the circle?", "no?"]
    every = itself(blip2, images, prompts, threshold=1)
    assert len(every.large.available) == 5
    out = itself(blip2, images, prompts, threshold=sorted(every.scores)[2])
    assert (len(out.asked), len(out.large.available)) == (3, 4)
    assert out.large.tokens[3] == out.large.tokens[0]
    assert out.asked != [0, 1, 2]  # so that another prompt's scores would show
    for row, kept in zip(out.asked, out.large.kept, strict=False):
        assert kept.number.tolist() == every.large.kept[row].number.tolist()
    for row in range(5):
        assert out.text[row] == (every if row in out.asked else every.guide).text[row]


def test_a_score_is_of_how_an_answer_was_written_and_of_the_whole_with_few_tokens(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    """With all visual tokens the answer is as likely as it was; with few it is not."""
    logprobs = plain(model, logprobs=0).logprobs
    confidence = [np.exp(np.mean(row)) for row in logprobs]
    few = itself(model, threshold=1)
    monkeypatch.setattr(module, "CONSISTENT", "100%")
    full = itself(model, threshold=1)
    expected = [
        (sure + np.exp(sum(row))) / 2 for sure, row in zip(confidence, logprobs, strict=True)
    ]
    np.testing.assert_allclose(full.scores, expected, rtol=1e-3)
    assert np.abs(np.asarray(few.scores) - full.scores).max() > 1e-3
    assert (np.asarray(few.scores) >= np.asarray(confidence) / 2 - 1e-6).all()


def test_the_consistency_is_that_of_tokens_dropped_before_the_first_layer(blip2: Model):
    """Against a generation with 5 % of the tokens, where it writes the same first token."""
    watched = plain(blip2, pruners=[Watch()], logprobs=0)
    looks = received(watched.reports[0], watched.capacity)
    method = SGL(keep=-(-watched.capacity // 20), scores=jnp.asarray(looks), site=Site.ENTRY)
    few = blip2.generate(PICTURES, PROMPTS, [method], max_new_tokens=1)
    out = itself(blip2, threshold=1, max_new_tokens=1)
    logits = few.logits.astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    for row, (token, written) in enumerate(zip(watched.tokens, watched.logprobs, strict=True)):
        consistency = shares[row, token[0]]
        expected = (np.exp(written[0]) + consistency) / 2
        assert out.scores[row] == pytest.approx(expected, rel=1e-3)


def test_options_are_for_both_models(blip2: Model):
    out = itself(blip2, keep="100%", num_beams=2, logprobs=2)
    own = plain(blip2, num_beams=2, logprobs=2)
    assert out.guide.tokens == out.large.tokens[:3] == own.tokens
    assert len(out.guide.alternatives[0][0]) == len(out.large.alternatives[0][0]) == 2
    assert itself(blip2).large.logprobs is None


def test_other_methods_follow_in_the_large_model(llama: Model):
    further = [KNorm(keep=5, site=Site.CACHE)]
    out = itself(llama, keep=16, pruners=further)
    cached = out.large.cached[1]  # the cross-attention layer
    assert cached.indices.shape[2] == 5
    for row in range(3):
        left = set(out.large.kept[row].number.tolist())
        assert len(left) == 16
        assert set(np.unique(cached.indices[row][cached.valid[row]]).tolist()) <= left


def test_a_prompt_without_an_image_goes_along(llama: Model):
    images, prompts = [CIRCLE, None], [PROMPTS[0], "hello"]
    out = itself(llama, images, prompts, keep=8, threshold=1)
    assert [len(kept.number) for kept in out.large.kept] == [8, 0]
    assert out.text[1] == llama.generate([None], ["hello"], max_new_tokens=NEW).text[0]
    alone = itself(llama, [None], ["hello"], keep=8, threshold=1)
    assert alone.text == out.text[1:]
    assert alone.scores == pytest.approx(out.scores[1:], rel=1e-3)


def test_a_decoders_layer_is_told(blip2: Model):
    near, far = (itself(blip2, keep=2, layer=layer).large for layer in (1, 2))
    assert [kept.number.tolist() for kept in near.kept] == [k.number.tolist() for k in far.kept]
    assert np.abs(near.logits - far.logits).max() > 1e-4


def refused(model: Model, guide: Model, says: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=says):
        guided(
            untouched(model),
            untouched(guide),
            PICTURES,
            PROMPTS,
            **dict[str, Any](keep=4) | options,
        )


def test_a_guide_with_other_visual_tokens_is_refused_before_anything_runs(
    llama: Model, blip2: Model
):
    says = "the guide sees other visual tokens than the large model"
    refused(llama, llama.seeing(tiles=2), rf"{says}.*\(tiles: 2, not None\); take a smaller")
    refused(llama, llama.seeing(0.5), rf"{says}.*image_scale: 0.5, not 1.0")
    refused(llama, blip2, rf"{says}.*image_processor_type: BlipImageProcessor, not Mllama")
    larger = catp_jax.load(ASSETS / "scenes-llama-vision")
    refused(larger, llama, rf"{says}.*size: .*32.*, not .*64")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"threshold": 1.5}, r"threshold is 0 .* to 1 .*, got 1\.5"),
        ({"threshold": -0.1}, "got -0.1"),
        ({"threshold": float("nan")}, "got nan"),
        ({"keep": 0}, "keep takes a count of at least 1 or a percentage"),
        ({"layer": 0}, "SGL wants the number of a layer from 1 on, got 0"),
        ({"num_return_sequences": 2, "temperature": 1.0}, "a guided prompt has one answer; got"),
        ({"tempo": 3}, "tempo: no option of generation"),
        ({"max_new_tokens": 10_000}, "prompt 0: .*positions"),
        ({"pruners": [Watch(site=Site.CROSS)]}, "Watch cannot work at site CROSS; it can at READ"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(llama: Model, options: Any, says: str):
    refused(llama, llama, says, **options)


def test_a_guide_whose_attention_is_not_shown_is_refused():
    t5 = catp_jax.load(shallow("mini-blip2-t5"))
    with pytest.raises(ValueError, match=r"Watch prunes .*READ.*which this model does not have"):
        itself(t5)


def test_images_and_prompts_are_lists_of_one_length(llama: Model):
    for images, prompts in ((PICTURES, PROMPTS[0]), (CIRCLE, PROMPTS)):
        with pytest.raises(ValueError, match="are lists, with one entry for each question"):
            guided(llama, llama, images, prompts, keep=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one entry of images per prompt is wanted, got 3 for 2"):
        guided(llama, llama, PICTURES, PROMPTS[:2], keep=4)


def test_the_shipped_guide_guides_the_mini_of_scenes():
    model = catp_jax.load(ASSETS / "scenes-llama-vision")
    guide = catp_jax.load(ASSETS / "scenes-llama-vision-guide")
    asked = [one for one in scenes_task(scenes=4).examples if one.family == "attribute"]
    images, prompts = [one.image for one in asked], [one.question for one in asked]
    out = guided(model, guide, images, prompts, keep="25%", threshold=1, max_new_tokens=8)
    assert [len(kept.number) for kept in out.large.kept] == [65] * 4
    assert out.asked == [0, 1, 2, 3]
    assert [text.strip() for text in out.text] == [one.answer for one in asked]
    own = guide.generate(images, prompts, [Watch()], max_new_tokens=8)
    assert own.text == out.guide.text
    looks = np.asarray(received(own.reports[0], own.capacity))
    for kept, row in zip(out.large.kept, looks, strict=False):
        assert {*kept.number.tolist()} == {*np.argsort(-row, kind="stable")[:65].tolist()}


def test_the_exit_curve_by_hand():
    assert exit_curve([0.9, 0.2, 0.5], [1, 0, 0.3], [1, 1, 0.6]) == [
        Exit(0.0, 1.0, pytest.approx(1.3 / 3)),  # type: ignore[arg-type]
        Exit(0.2, pytest.approx(2 / 3), pytest.approx(2.3 / 3)),  # type: ignore[arg-type]
        Exit(0.5, pytest.approx(1 / 3), pytest.approx(2.6 / 3)),  # type: ignore[arg-type]
        Exit(0.9, 0.0, pytest.approx(2.6 / 3)),  # type: ignore[arg-type]
    ]


def test_equal_scores_are_one_point_of_the_curve():
    curve = exit_curve([0.5, 0.5, 0.5], [True, True, False], [False, False, False])
    assert [(one.threshold, one.share) for one in curve] == [(0.0, 1.0), (0.5, 0.0)]


def test_the_curve_says_what_guided_does(llama: Model):
    every = itself(llama, threshold=1)
    for point in exit_curve(every.scores, [1, 1, 1], [0, 0, 0])[::3]:
        out = itself(llama, threshold=point.threshold)
        assert np.mean(out.is_guides) == pytest.approx(point.share) == point.accuracy


def test_a_curve_of_unequal_lists_is_refused():
    for lists in (([0.5], [1, 1], [1]), ([], [], [])):
        with pytest.raises(ValueError, match="wanted for each prompt; got"):
            exit_curve(*lists)
