"""Training VisToG's grouping: it learns, it resumes, and what it trains is what a prefill reads."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from catp_jax.contract import Site
from catp_jax.generation import generate as programs
from catp_jax.models.blip2 import Blip2Inputs
from catp_jax.pruning import Pool
from catp_jax.pruning.nearest_centroid import NearestCentroid
from catp_jax.pruning.vistog_grouping import VisToGGrouping
from catp_jax.training import vistog_grouping as training
from catp_jax.training.blip2_start import initialise
from catp_jax.training.scene_answers import answer_logits, answered, shown
from catp_jax.training.scene_bank import Bank, evaluate
from catp_jax.training.scene_questions import questions_of
from catp_jax.training.scenes import make_scene
from catp_jax.training.scenes_blip2 import know_places, make_tokenizer, pixels_of
from tests.random_blip2 import random_blip2
from tests.random_mllama import random_mllama
from tests.training.test_scenes_blip2 import toy_config

GROUPS, STEPS = 6, 12


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [make_scene("train", number) for number in range(10)]


@pytest.fixture(scope="module")
def tokenizer(scenes: list[Any]) -> Any:
    return make_tokenizer("opt", scenes)


@pytest.fixture(scope="module")
def model() -> Any:
    model = initialise(toy_config("opt"), 0)
    know_places(model.vision_model)
    return model


@pytest.fixture(scope="module")
def bank(model: Any, tokenizer: Any, scenes: list[Any]) -> Bank:
    return training.make_bank(model, tokenizer, scenes)


def train(model: Any, bank: Bank, work: Any, **options: Any) -> Any:
    options = {"steps": STEPS, "peak": 0.02} | options
    return training.train_grouping(model, bank, GROUPS, work, **options)[0]


@pytest.fixture(scope="module")
def trained(model: Any, bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Any:
    work = tmp_path_factory.mktemp("whole")
    return train(model, bank, work), work


def equal(one: Any, other: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), one, other)))


def grouping_loss(model: Any, bank: Bank) -> Any:
    """Of a grouping, a batch and noise."""
    graph, params, frozen = training.split(model, "grouping")

    def grouped(grouping: Any, view: Any, key: Any) -> Any:
        return VisToGGrouping(keep=GROUPS, grouping=grouping).grouped(view, key)

    stage = training.reading_stage(graph, bank, grouped, STEPS, 0, (0.1, 0.1), 2)

    def loss(grouping: Any, batch: Any, key: Any) -> jax.Array:
        return stage.loss({"learned": grouping, "model": params}, frozen, batch, key)[0]

    return loss


def loss_of(model: Any, bank: Bank, grouping: Any) -> float:
    """On batches and with noise of its own, the same for all."""
    loss = jax.jit(grouping_loss(model, bank))
    some = [bank.draw(step, STEPS, 7) for step in range(3)]
    return float(np.mean([loss(grouping, b, jax.random.key(n)) for n, b in enumerate(some)]))


def test_the_loss_falls_and_every_array_has_moved(model: Any, bank: Bank, trained: Any):
    grouping, work = trained
    start = training.start_of(bank, GROUPS, 0)
    assert loss_of(model, bank, grouping) < loss_of(model, bank, start) - 0.05
    for name, array in vars(grouping).items():
        assert np.isfinite(array).all()
        assert not (array == getattr(start, name)).all(), name
    (line,) = map(json.loads, (work / "training_log.jsonl").read_text().splitlines())
    assert (line["stage"], line["step"]) == ("grouping", STEPS)
    assert 1 <= line["groups"] <= GROUPS


def test_the_gradient_reaches_every_array(model: Any, bank: Bank):
    start, batch = training.start_of(bank, GROUPS, 0), bank.draw(0, STEPS, 0)
    gradient = jax.grad(grouping_loss(model, bank))(start, batch, jax.random.key(0))
    for array in jax.tree.leaves(gradient):
        assert np.isfinite(array).all()
        assert array.any(axis=1).mean() > 0.5


def test_the_model_itself_stays_as_it_is(bank: Bank, model: Any, tmp_path: Any):
    before = jax.tree.map(jnp.array, nnx.state(model))
    train(model, bank, tmp_path, steps=1)
    assert equal(before, nnx.state(model))


def test_cut_off_and_resumed_it_ends_in_the_same_bits(
    model: Any, bank: Bank, trained: Any, tmp_path: Any
):
    part = train(model, bank, tmp_path, stop_at=5)
    assert not equal(part, trained[0])
    assert equal(train(model, bank, tmp_path), trained[0])
    with pytest.raises(ValueError, match="seed 0, not 1"):
        train(model, bank, tmp_path, seed=1)


def test_what_is_trained_is_what_a_prefill_reads(model: Any, bank: Bank, trained: Any):
    method = VisToGGrouping(keep=GROUPS, grouping=trained[0], site=Site.ENTRY)
    asked = [[[("what digit is red?", "7")]], [[("is there a red circle?", "no")]]]
    batch = bank.batch(np.arange(2), asked)
    keep = method.grouped(shown(batch.features))
    mine = answer_logits(model, batch, keep)
    tokens, valid = batch.rows.tokens[:, 0], batch.rows.token_valid[:, 0]
    inputs = Blip2Inputs(
        pixels=jnp.asarray(pixels_of(bank.scenes[:2])),
        image_index=jnp.arange(2, dtype=jnp.int32),
        tokens=tokens,
        token_valid=valid,
    )
    start = programs.prefill(model, (method,), inputs, new_slots=1)
    last = np.asarray(valid).sum(axis=1) - 1
    np.testing.assert_allclose(start.logits, mine[np.arange(2), 0, last], atol=5e-3)  # float16
    np.testing.assert_array_equal(start.selection.kept.valid, keep.valid)


def test_a_grouping_is_trained_and_judged_with_a_model_in_bfloat16(
    model: Any, bank: Bank, tmp_path: Any
):
    graph, state = nnx.split(model)
    half = nnx.merge(graph, jax.tree.map(lambda array: array.astype(jnp.bfloat16), state))
    grouping = train(half, bank, tmp_path, steps=1, scenes=2)
    assert all(array.dtype == jnp.float32 for array in jax.tree.leaves(grouping))
    batch = bank.batch(np.arange(1), [[[("what digit is red?", "7")]]])
    method = VisToGGrouping(keep=GROUPS, grouping=grouping, site=Site.ENTRY)
    assert answered(half, method)(batch).shape == (1, 1)


def test_methods_are_compared_by_family(model: Any, tokenizer: Any, trained: Any):
    test = questions_of("test", 3)
    bank = training.make_bank(model, tokenizer, [scene for scene, _ in test])
    methods = {
        "vistog_grouping": VisToGGrouping(keep=GROUPS, grouping=trained[0], site=Site.ENTRY),
        "nearest_centroid": NearestCentroid(keep=GROUPS, site=Site.ENTRY),
        "pool": Pool(keep=GROUPS, site=Site.ENTRY),
        "whole pool": Pool(keep=32, site=Site.ENTRY),
        "none": None,
    }
    asked = [asked for _, asked in test]
    found = {name: evaluate(answered(model, one), bank, asked) for name, one in methods.items()}
    for figures in found.values():
        assert set(figures) >= {"attribute", "existence", "count", "relation", "reading"}
        assert all(0 <= share <= 1 for share in figures.values())
    assert found["whole pool"] == found["none"]


def test_more_groups_than_queries_start_apart(bank: Bank):
    semantic = np.asarray(training.start_of(bank, 70, 0).semantic)
    assert len({tuple(row) for row in semantic}) == 70


def test_what_it_cannot_be_trained_for_is_refused(
    model: Any, tokenizer: Any, scenes: list[Any], bank: Bank, tmp_path: Any
):
    other: Any = random_mllama()
    with pytest.raises(ValueError, match="for a BLIP-2, not for Mllama"):
        training.make_bank(other, tokenizer, scenes)
    with pytest.raises(ValueError, match="128×128 pixels, and this model takes 12×12"):
        training.make_bank(random_blip2("opt"), tokenizer, scenes)
    with pytest.raises(ValueError, match="at least 1 group, got 0"):
        training.train_grouping(model, bank, 0, tmp_path)
