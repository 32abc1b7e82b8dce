"""Training the model along with VisToG's grouping: what moves, what stays, what is written."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
from catp_jax import leaves
from catp_jax.models.blip2 import Blip2Inputs
from catp_jax.pruning import NearestCentroid
from catp_jax.training import vistog_grouping as training
from catp_jax.training.blip2_start import QUERIES, initialise
from catp_jax.training.mini_blip2 import write
from catp_jax.training.scene_bank import Bank
from catp_jax.training.scenes import make_scene
from catp_jax.training.scenes_blip2 import know_places, make_tokenizer, pixels_of
from catp_jax.training.tokenizer import make_blip2_processor
from tests.training.test_scenes_blip2 import toy_config

GROUPS, STEPS = 5, 4
READERS = {
    "projector": {"language_projection"},
    "language_model": {"language_projection", "language_model"},
}


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return [make_scene("train", number) for number in range(6)]


@pytest.fixture(scope="module")
def tokenizer(scenes: list[Any]) -> Any:
    return make_tokenizer("t5", scenes)


@pytest.fixture(scope="module")
def model() -> Any:
    model = initialise(toy_config("t5"), 0)
    know_places(model.vision_model)
    return model


@pytest.fixture(scope="module")
def bank(model: Any, tokenizer: Any, scenes: list[Any]) -> Bank:
    return training.make_bank(model, tokenizer, scenes)


def train(model: Any, bank: Bank, work: Path, **options: Any) -> Any:
    options = {"steps": STEPS, "peak": 0.02, "model_peak": 0.01, "scenes": 2} | options
    return training.train_grouping(model, bank, GROUPS, work, **options)


@pytest.fixture(scope="module", params=READERS)
def trained(
    request: pytest.FixtureRequest, model: Any, bank: Bank, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What was trained along, and what came out."""
    work = tmp_path_factory.mktemp(request.param)
    return request.param, *train(model, bank, work, trained=request.param)


def arrays(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in leaves.named(tree).items()}


def moved(one: Any, other: Any) -> set[str]:
    """The parts of a model of which an array differs."""
    before, after = arrays(one), arrays(other)
    assert before.keys() == after.keys()
    names = [name for name in before if not np.array_equal(before[name], after[name])]
    return {name.split(".")[0] for name in names}


def test_what_is_named_moves_and_nothing_else(trained: Any, model: Any, bank: Bank):
    name, grouping, own = trained
    assert moved(model, own) == READERS[name]
    start = training.start_of(bank, GROUPS, 0)
    for key, array in vars(grouping).items():
        assert np.isfinite(array).all()
        assert not np.array_equal(array, getattr(start, key)), key


def test_every_array_of_the_language_model_moves(trained: Any, model: Any):
    name, _, own = trained
    before, after = arrays(model), arrays(own)
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == {key for key in before if key.split(".")[0] in READERS[name]}
    assert all(np.isfinite(array).all() for array in after.values())


def test_the_given_model_stays_as_it_is(model: Any, bank: Bank, tmp_path: Path):
    before = {name: array.copy() for name, array in arrays(model).items()}
    train(model, bank, tmp_path, trained="language_model", steps=1)
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_with_the_grouping_alone_the_model_is_the_given_one(model: Any, bank: Bank, tmp_path: Path):
    assert train(model, bank, tmp_path, steps=1)[1] is model


def test_cut_off_and_resumed_a_model_ends_in_the_same_bits(
    trained: Any, model: Any, bank: Bank, tmp_path: Path
):
    name, grouping, own = trained
    part = train(model, bank, tmp_path, trained=name, stop_at=2)
    assert moved(part[1], own) == READERS[name]
    again, same = train(model, bank, tmp_path, trained=name)
    assert not moved(same, own)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(grouping), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=f"trained {name}, not grouping"):
        train(model, bank, tmp_path)
    with pytest.raises(ValueError, match=r"model_peak 0\.01, not 0\.02"):
        train(model, bank, tmp_path, trained=name, model_peak=0.02)


def test_a_trained_model_is_more_right_of_its_groups(trained: Any, model: Any, bank: Bank):
    _, grouping, own = trained
    losses = []
    for some in (model, own):
        graph, params, frozen = training.split(some, "projector")

        def reduce(grouping: Any, view: Any, key: Any) -> Any:
            method = training.VisToGGrouping(keep=GROUPS, grouping=grouping)
            return method.grouped(view, key)

        loss = training.reading_stage(graph, bank, reduce, STEPS, 0, (0.1, 0.1), 4).loss
        start = {"learned": grouping, "model": params}
        found = jax.jit(loss)(start, frozen, bank.draw(0, STEPS, 7), jax.random.key(0))
        losses.append(float(found[0]))
    assert losses[1] < losses[0] - 0.05


def test_a_model_is_trained_to_read_what_a_method_leaves(model: Any, bank: Bank, tmp_path: Path):
    method = NearestCentroid(keep=GROUPS)
    options = {"trained": "projector", "steps": 2, "scenes": 2}
    own = training.train_reading(model, bank, method, tmp_path, **options)
    assert moved(model, own) == READERS["projector"]
    with pytest.raises(ValueError, match="holds a run with method"):
        training.train_reading(model, bank, NearestCentroid(keep=4), tmp_path, **options)


def test_what_cannot_be_trained_is_refused(model: Any, bank: Bank, tmp_path: Path):
    with pytest.raises(ValueError, match="one of grouping, projector, language_model; got qformer"):
        train(model, bank, tmp_path, trained="qformer")
    graph, state = nnx.split(model)
    half = nnx.merge(graph, jax.tree.map(lambda array: array.astype(jnp.bfloat16), state))
    with pytest.raises(ValueError, match="wants all weights in float32, and they are in bfloat16"):
        train(half, bank, tmp_path, trained="projector")
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="module")
def folder(trained: Any, model: Any, tokenizer: Any, tmp_path_factory: Any) -> Path:
    """The trained model, written beside the first; that one's config.json speaks of float16."""
    place = tmp_path_factory.mktemp("written")
    processor = make_blip2_processor(tokenizer, model.config.vision.image_size, QUERIES)
    write(model, processor, place / "first")
    config = place / "first" / "config.json"
    config.write_text(config.read_text().replace("{", '{"dtype": "float16",', 1))
    training.write_trained(trained[2], place / "first", place / "model")
    return place


def test_what_is_written_is_what_was_trained(trained: Any, folder: Path):
    loaded, _ = convert.load(folder / "model")
    assert not moved(trained[2], loaded)
    first, own = ({path.name for path in (folder / name).iterdir()} for name in ("first", "model"))
    assert first == own
    for name in ("tokenizer.json", "generation_config.json", "processor_config.json"):
        assert (folder / "model" / name).read_bytes() == (folder / "first" / name).read_bytes()


def test_a_converted_folder_can_be_what_it_came_from(trained: Any, folder: Path, tmp_path: Path):
    convert.to_orbax(folder / "first", tmp_path / "converted")
    training.write_trained(trained[2], tmp_path / "converted", tmp_path / "model")
    loaded, _ = convert.load(tmp_path / "model")
    assert not moved(trained[2], loaded)
    first, own = (
        {path.name for path in place.iterdir()} for place in (folder / "first", tmp_path / "model")
    )
    assert first == own


@pytest.mark.usefixtures("with_torch")
def test_transformers_loads_what_is_written_with_equal_logits(
    trained: Any, folder: Path, scenes: list[Any]
):
    import torch
    from transformers import Blip2ForConditionalGeneration

    network, report = Blip2ForConditionalGeneration.from_pretrained(
        folder / "model", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert network.dtype == torch.float32
    own, pixels = trained[2], pixels_of(scenes[:2])
    words = np.array([[9, 12, 31, 4], [7, 25, 8, 66]], np.int32)
    decoder = np.array([[0, 30], [0, 31]], np.int32)
    queries = np.full((2, QUERIES), own.config.image_token_index)
    with torch.no_grad():
        wanted = network(
            pixel_values=torch.tensor(pixels),
            input_ids=torch.tensor(np.concatenate([queries, words], axis=1)),
            attention_mask=torch.ones((2, QUERIES + words.shape[1])),
            decoder_input_ids=torch.tensor(decoder),
        ).logits.numpy()
    inputs = Blip2Inputs(
        pixels=jnp.asarray(pixels),
        image_index=jnp.arange(2, dtype=jnp.int32),
        tokens=jnp.asarray(words),
        token_valid=jnp.ones(words.shape, bool),
    )
    got = np.asarray(own(inputs, None, jnp.asarray(decoder)))
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
