"""VisToG's grouping in whole models: what they read, cache and answer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Keep, Site
from catp_jax.generation import generate as programs
from catp_jax.pruning import FastV, KNorm, Pool, Random
from catp_jax.pruning.vistog_grouping import VisToGGrouping
from catp_jax.struct import replace
from tests.generation.test_cache_sites import generate, inputs_of, model_of, prompts_of
from tests.pruning.groupings import grouping_of, method_of
from tests.pruning.views import run

WIDTHS = {"opt": 15, "mllama": 24}  # of the tiny models' tokens
GROUPS = 5


def in_model(kind: str, groups: int = GROUPS) -> VisToGGrouping:
    return method_of(groups, grouping=grouping_of(groups, WIDTHS[kind]))


def prefill(kind: str, pruners: tuple[Any, ...]) -> programs.Prefilled:
    return programs.prefill(model_of(kind), pruners, inputs_of(kind), new_slots=2)


def test_opt_reads_the_new_tokens():
    """As if its queries had ended in them."""

    @jax.jit
    def logits(model: Any, inputs: Any, method: Any) -> tuple[jax.Array, Keep]:
        front = model.front(inputs)
        new = method(front.view, ())[0].tokens
        places = jnp.broadcast_to(jnp.arange(GROUPS, dtype=jnp.int32), new.indices.shape)
        own = Keep(indices=places, valid=new.valid)
        return model.rows(replace(front, visual=new.tokens), own), new

    expected, new = logits(model_of("opt"), inputs_of("opt"), in_model("opt"))
    last = GROUPS + np.asarray(inputs_of("opt").token_valid).sum(axis=1) - 1
    start = prefill("opt", (in_model("opt"),))
    np.testing.assert_allclose(start.logits, expected[np.arange(4), last], atol=1e-5, rtol=1e-5)
    assert float(jnp.abs(start.logits - prefill("opt", ()).logits).max()) > 1e-2
    np.testing.assert_array_equal(start.selection.kept.valid, new.valid)
    assert start.selection.merged


def test_llamas_layers_make_keys_and_values_of_the_new_tokens():
    start = prefill("mllama", (in_model("mllama"),))
    model, method = model_of("mllama"), in_model("mllama")
    view = jax.jit(lambda model, inputs: model.front(inputs).view)(model, inputs_of("mllama"))
    new = run(method, view)[0].tokens
    assert new.valid.any(axis=1).tolist() == [True, True, False, True, True]
    numbers = np.asarray(view.numbers)
    (part,) = start.cache.cross
    for block, layer in zip(part.blocks, (0, 2), strict=True):
        made = model.language_model.layers[layer].cross_attn.project(new.tokens)
        for row, group in np.argwhere(new.valid):
            stands = int(new.indices[row, group])
            assert int(part.numbers[row, group]) == numbers[row, stands]
            for name in ("keys", "values"):
                found = getattr(block, name)[row, :, group]
                np.testing.assert_allclose(found, getattr(made, name)[row, group], atol=1e-5)


@pytest.mark.parametrize("groups", [1, GROUPS, 90])  # 90: more than there are tokens
@pytest.mark.parametrize("kind", WIDTHS)
def test_the_cache_is_as_long_as_there_are_groups(kind: str, groups: int):
    start = prefill(kind, (in_model(kind, groups),))
    assert np.isfinite(start.logits).all()
    assert {part.num_visual for part in prompts_of(start.cache)} == {groups}


@pytest.mark.parametrize("kind", WIDTHS)
def test_beams_and_greedy_answers_are_finite(kind: str):
    for beams in (0, 3):
        out = generate.__wrapped__(kind, (in_model(kind),), beams)  # arrays have no hash
        assert out.is_finite.all()
        assert out.selection.kept.indices.shape[1] == GROUPS


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("mllama", (KNorm(keep=3), FastV(keep=2, site=Site.CROSS))),
        ("opt", (Pool(keep=3, site=Site.ENTRY), Random(keep=2, site=Site.ENTRY))),
    ],
)
def test_other_methods_go_on_with_the_groups(kind: str, others: tuple[Any, ...]):
    start = prefill(kind, (in_model(kind), *others))
    assert np.isfinite(start.logits).all()
    assert {part.num_visual for part in prompts_of(start.cache)} == {2}


@pytest.mark.parametrize("row", range(4))
def test_a_prompt_is_answered_alone_as_in_the_batch(row: int):
    together = prefill("opt", (in_model("opt"),))
    inputs = inputs_of("opt").alone(row)
    alone = programs.prefill(model_of("opt"), (in_model("opt"),), inputs, new_slots=2)
    np.testing.assert_allclose(alone.logits[0], together.logits[row], atol=1e-5)
