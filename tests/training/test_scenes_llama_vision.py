"""Training the mini Llama Vision for scenes: where it starts, what it sees, and the command."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import catp_jax
import convert
from catp_jax.training import scenes_llama_vision as recipe
from catp_jax.training.mini_llama_vision import initialise
from catp_jax.training.scene_batches import LABELS, patch_labels
from catp_jax.training.scene_tower import tower_stage
from catp_jax.training.scenes import make_scene
from catp_jax.training.scenes_llama_vision import scenes_config
from catp_jax.training.tokenizer import load_processor


def toy_config():
    """The mini with fewer layers, which compile sooner; one of each sort."""
    config = scenes_config()
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_hidden_layers=2),
        text=dataclasses.replace(config.text, num_hidden_layers=3, cross_attention_layers=(1,)),
    )


def test_tokens_start_with_where_they_are():
    tower = initialise(toy_config(), 0).vision_model
    recipe.know_places(tower)
    ratio = toy_config().vision.supported_aspect_ratios.index((2, 2)) + 1
    table = tower.gated_positional_embedding.tile_embedding.embedding[...][ratio]
    places = np.asarray(table).reshape(4, 65, 96)[:, 1:]
    grid = places.reshape(2, 2, 8, 8, 96).transpose(0, 2, 1, 3, 4).reshape(16, 16, 96)
    assert len(np.unique(grid.reshape(256, 96).round(4), axis=0)) == 256
    same_row, far_row = (np.abs(grid[5, 5] - grid[row, 6]).sum() for row in (5, 12))
    assert same_row < far_row


def test_labels_follow_the_tokens():
    graph, _ = nnx.split(initialise(toy_config(), 0).vision_model)
    stage = tower_stage(1, recipe.see, graph, recipe.tiles_of, recipe.tokens_of, 8, seed=0)
    batch = stage.batches(3)
    scene = make_scene("train", 3 * 8 + 1)
    labels, _ = patch_labels(scene, 8)
    for name in LABELS:
        tokens = np.asarray(batch.labels[name][1])[:, 1:].reshape(2, 2, 8, 8)
        grid = tokens.transpose(0, 2, 1, 3).reshape(16, 16)
        np.testing.assert_array_equal(grid, labels[name])
    assert batch.weights.sum() == pytest.approx(8.0, abs=1e-4)
    assert not np.asarray(batch.weights)[:, :, 0].any()  # class tokens
    pixels = np.asarray(batch.pixels[1]).transpose(0, 2, 3, 1)  # tile 1 is at the top right
    expected = scene.pixels[:64, 64:].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(pixels[1], expected, atol=1e-5)


def test_the_guide_has_the_minis_visual_tokens_and_a_third_of_its_parameters():
    mini, guide = (recipe.SIZES[size].config for size in ("mini", "guide"))
    tokens = [
        (config.vision.max_num_tiles, config.vision.tokens_per_tile, config.vision.image_size)
        for config in (mini, guide)
    ]
    assert tokens[0] == tokens[1] == (4, 65, 64)
    assert mini.text.vocab_size == guide.text.vocab_size
    of_mini, of_guide = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(convert.abstract(config))))
        for config in (mini, guide)
    )
    assert 0.25 < of_guide / of_mini < 0.36


def test_the_command_trains_writes_and_resumes_and_what_it_writes_answers(tmp_path, monkeypatch):
    toy = dataclasses.replace(recipe.SIZES["mini"], config=toy_config())
    monkeypatch.setitem(recipe.SIZES, "mini", toy)
    options = {
        "work": tmp_path / "work",
        "seed": 0,
        "tower_steps": 2,
        "decoder_steps": 2,
        "scenes": 20,
        "test_scenes": 3,
    }
    recipe.main(out=tmp_path / "one", **options)
    recipe.main(out=tmp_path / "two", **options)  # everything is there already
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert first == second
    assert convert.load(tmp_path / "one")[1] == toy_config()
    log = [
        json.loads(x) for x in (tmp_path / "one" / "training_log.jsonl").read_text().splitlines()
    ]
    assert [line["stage"] for line in log] == ["tower", "decoder", "test"]
    assert all(math.isfinite(line["loss"]) for line in log[:2])
    assert {"attribute", "existence", "count", "relation", "reading"} <= set(log[-1])

    with pytest.raises(ValueError, match="exists already"):
        recipe.main(out=tmp_path / "one", **options)
    with pytest.raises(ValueError, match="seed 0, not 1"):
        recipe.main(out=tmp_path / "three", **{**options, "seed": 1})
    with pytest.raises(ValueError, match="size None, not guide"):
        recipe.main(out=tmp_path / "three", **options, size="guide")

    # training and the front door see the same pixels, and read the same words
    model, scene = catp_jax.load(tmp_path / "one"), make_scene("test", 0)
    packed = model.prepare([scene.pixels], ["what digit is red?"])
    images = packed.inputs.images
    np.testing.assert_allclose(images.pixels, recipe.tiles_of([scene]), atol=1e-6)
    assert images.aspect_ratio_ids.tolist() == [
        toy_config().vision.supported_aspect_ratios.index((2, 2)) + 1
    ]
    tokenizer = load_processor(tmp_path / "one").tokenizer
    assert packed.inputs.tokens[0, :2].tolist() == tokenizer.convert_tokens_to_ids(
        ["<|image|>", "<|begin_of_text|>"]
    )
    assert model.generate([Image.fromarray(scene.pixels)], ["is there a red circle?"]).text
    assert jnp.isfinite(
        model.generate([scene.pixels], ["how many circles are there?"]).logits
    ).all()
