"""A study of methods that prune each layer's cache: how many tokens are left there."""

import jax.numpy as jnp
import numpy as np
import pytest

import catp_jax
from catp_jax.contract import Keep
from catp_jax.study import sweep as sweeping
from catp_jax.study.records import UNPRUNED, Conditions, Setting
from catp_jax.study.sweep import sweep
from catp_jax.training.scene_questions import scenes_task
from tests.shallow import shallow

KEEP = 8  # of 32


@pytest.fixture(scope="module")
def answers():
    task = scenes_task(scenes=1)
    model = catp_jax.load(shallow("mini-blip2-opt"), generation_config=False)
    conditions = Conditions(task=task.name, source=task.source, prompt=task.prompt)
    settings = [Setting(method, KEEP) for method in ("k_norm", "csp", "l2,csp")]
    settings[-1] = Setting("l2,csp", "16,8")
    results = sweep(model, task.examples, settings, conditions, score=task.score)
    return {result.setting.method: result.answers for result in results}


def test_what_is_left_is_counted_over_layers_and_heads(answers):
    assert {one.visual_tokens for one in answers["k_norm"]} == {KEEP}
    for method in ("csp", "l2,csp"):  # a head may have spent its budget on either
        counts = [one.visual_tokens for one in answers[method]]
        assert all(0 < count < 32 for count in counts)
    assert all(one.visual_tokens <= 16 for one in answers["l2,csp"])
    assert all(len(one.kept) == 16 for one in answers["l2,csp"])
    assert {one.cached for one in answers[UNPRUNED]} == {None}


def test_the_share_of_what_is_needed_is_that_of_the_caches(answers):
    shares = [one.needed for one in answers["k_norm"]]
    assert all(share is None or 0 < share < 1 for share in shares)
    assert any(share is not None for share in shares)
    assert {one.needed for one in answers[UNPRUNED]} <= {None, 1.0}
    needed = np.asarray([[0.5, 0.0, 0.25, 0.25]])
    heads = Keep(
        indices=jnp.asarray([[[0, 1], [2, 3]]], jnp.int32),
        valid=jnp.asarray([[[True, True], [True, False]]]),
    )
    assert sweeping._share(needed, 0, None, {3: heads}) == 0.375  # a half, and a quarter
    assert sweeping._mean_number({3: heads}, 0) == 1.5
