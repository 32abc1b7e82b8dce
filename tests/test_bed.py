"""The shipped minis on scenes: it matters which visual tokens are kept, or it measures nothing.

`python -m benchmarks.testbed` has all methods and budgets, and more questions.
"""

from pathlib import Path

import numpy as np
import pytest

import catp_jax
from benchmarks.testbed import blind, guessed
from catp_jax.study.half_pixels import halved
from catp_jax.study.records import UNPRUNED, Conditions, Setting
from catp_jax.study.results import difference
from catp_jax.study.sweep import sweep
from catp_jax.training.scene_questions import scenes_task

FOLDER = Path(catp_jax.__file__).parent / "assets" / "scenes-llama-vision"
KEEP, SCENES = 16, 40  # of 260 visual tokens; scenes with a question of each family
COARSE, BLIND = "half the pixels", "blind"
LOOKS = ("attribute", "existence", "reading")  # which one or two objects decide


@pytest.fixture(scope="module")
def task():
    return scenes_task(scenes=SCENES)


@pytest.fixture(scope="module")
def scores(task):
    """Accuracy by setting and family."""
    model = catp_jax.load(FOLDER, generation_config=False)
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt)
    settings = [Setting(method, KEEP) for method in ("oracle", "anti", "random")]
    found = {}
    for name, examples, some in (
        (None, task.examples, settings),
        (COARSE, halved(task.examples), []),
        (BLIND, blind(task.examples), []),
    ):
        for result in sweep(model, examples, some, conditions, score=task.score):
            found[name or result.setting.method] = {
                family: np.mean([a.score for a in result.answers if a.family == family])
                for family in {example.family for example in task.examples}
            }
    return found


@pytest.mark.parametrize("family", LOOKS)
def test_it_answers_with_all_of_its_tokens(scores, family):
    assert scores[UNPRUNED][family] >= 0.9


@pytest.mark.parametrize("family", ["attribute", "reading"])
def test_the_needed_tokens_are_enough_and_the_others_are_of_no_use(scores, family):
    assert scores["oracle"][family] >= scores[UNPRUNED][family] - 0.15
    assert scores["anti"][family] <= 0.35
    assert scores["anti"][family] + 0.1 <= scores["random"][family]
    assert scores["random"][family] + 0.1 <= scores["oracle"][family]


@pytest.mark.parametrize("family", LOOKS)
def test_it_cannot_be_answered_blind(task, scores, family):
    assert scores[BLIND][family] <= max(guessed(task)[family], 0.1) + 0.1
    assert scores[BLIND][family] + 0.3 <= scores[UNPRUNED][family]


def test_reading_loses_by_fewer_pixels(scores):
    assert scores[COARSE]["reading"] < scores[UNPRUNED]["reading"]


@pytest.fixture(scope="module")
def of_blip2(task):
    """Answers of the mini BLIP-2 with T5 by setting, with 8 of its 32 queries."""
    folder = FOLDER.with_name("scenes-blip2-t5")
    model = catp_jax.load(folder, generation_config=False)
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt)
    methods = ("oracle", "anti", "random", "self_attention", "catp")
    settings = [Setting(method, 8) for method in methods]
    results = sweep(model, task.examples, settings, conditions, score=task.score)
    return {result.setting.method: result.answers for result in results}


@pytest.mark.parametrize("family", ["attribute", "reading"])
def test_blip2_needs_the_queries_that_look_there(of_blip2, family):
    right = {
        method: np.mean([one.score for one in answers if one.family == family])
        for method, answers in of_blip2.items()
    }
    assert right["oracle"] >= right[UNPRUNED] - 0.1 >= 0.75
    assert right["anti"] <= 0.35
    assert right["anti"] + 0.1 <= right["random"] <= right["oracle"] - 0.2


def test_two_methods_are_apart_beyond_their_interval(of_blip2):
    found = {
        method: [one for one in answers if one.family == "attribute"]
        for method, answers in of_blip2.items()
    }
    assert difference(found["self_attention"], found["catp"])[1] > 0.1
