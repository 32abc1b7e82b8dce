"""MINT from the front door: `Model.contrasting`, `load(contrast=…)` and `--contrast`."""

import numpy as np
import pytest
from PIL import Image

import catp_jax
from catp_jax.model import Model
from tests.command import catp_jax as command
from tests.shallow import shallow

PICTURES = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
QUESTIONS = ["what color is the circle?", "is there a red circle in the image?"]
PRUNED = {"prune": "l2", "keep": "25%", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def model() -> Model:
    return catp_jax.load(shallow("mini-blip2-opt"))


def test_logits_are_those_of_what_is_kept_in_contrast_to_all(model: Model):
    kept = model.generate(PICTURES, QUESTIONS, **PRUNED).logits
    whole = model.generate(PICTURES, QUESTIONS, max_new_tokens=4).logits
    found = model.contrasting(0.5, 1e-6).generate(PICTURES, QUESTIONS, **PRUNED).logits
    plausible = kept >= kept.max(axis=1, keepdims=True) + np.log(1e-6)
    expected = 1.5 * kept - 0.5 * whole
    np.testing.assert_allclose(found[plausible], expected[plausible], rtol=1e-4, atol=1e-4)
    assert np.abs(found - kept)[plausible].max() > 1e-3


def test_without_pruning_there_is_no_contrast(model: Model):
    whole = model.generate(PICTURES, QUESTIONS, max_new_tokens=4)
    found = model.contrasting().generate(PICTURES, QUESTIONS, max_new_tokens=4)
    assert found.tokens == whole.tokens


def test_a_contrasted_model_on_a_mesh_says_the_same(model: Model):
    spread = catp_jax.load(shallow("mini-blip2-opt"), mesh="data=8", contrast=1.0)
    ours = model.contrasting().generate(PICTURES, QUESTIONS, **PRUNED)
    assert spread.generate(PICTURES, QUESTIONS, **PRUNED).tokens == ours.tokens


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--contrast", "-1"], "alpha is 0 (no contrast) or above, got -1.0"),
        (["--contrast", "1", "--plausible", "2"], "beta lies between 0"),
        (["--plausible", "0.1"], "give contrast, too"),
    ],
)
def test_numbers_out_of_range_are_a_wrong_call(words: list[str], says: str):
    run = command("generate", str(shallow("mini-blip2-opt")), "--prompt", "what?", *words)
    assert run.returncode == 2
    assert says in " ".join(run.stderr.replace("│", " ").split())


def test_a_contrasted_model_is_not_contrasted_again(model: Model):
    with pytest.raises(ValueError, match="contrasted already"):
        model.contrasting().contrasting()
