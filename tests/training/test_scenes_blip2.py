"""Training the mini BLIP-2s for scenes: where they start, what they see, and the command."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import catp_jax
import convert
from catp_jax.contract import Keep, Replace
from catp_jax.models.querying import QueryingFront
from catp_jax.training import scene_answers as answers
from catp_jax.training import scenes_blip2 as recipe
from catp_jax.training.blip2_start import initialise
from catp_jax.training.mini_blip2 import make_text
from catp_jax.training.scene_batches import LABELS
from catp_jax.training.scene_lists import FIRST, LISTS, listed
from catp_jax.training.scenes import Dice, make_scene
from catp_jax.training.scenes_blip2 import scenes_config

FAMILIES = {"attribute", "existence", "count", "relation", "reading"}


def toy_config(which):
    """The mini with fewer layers, which compile sooner."""
    config = scenes_config(which)
    layers = {"num_hidden_layers": 1} if which == "opt" else {"num_layers": 1}
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_hidden_layers=1),
        qformer=dataclasses.replace(config.qformer, num_hidden_layers=2),
        text=dataclasses.replace(config.text, **layers),
    )


@pytest.fixture(scope="module")
def scenes():
    return [make_scene("train", number) for number in range(6)]


def test_cells_are_named_row_by_row(scenes):
    labels = recipe.cell_labels(scenes)
    for scene, *columns in zip(scenes, *labels.values(), strict=True):
        found = [
            (number // 4, number % 4, *words)
            for number, words in enumerate(zip(*columns, strict=True))
            if any(words)
        ]
        told = sorted(
            (
                thing.row,
                thing.column,
                *(LABELS[key].index(getattr(thing, key)) for key in ("name", "colour", "size")),
            )
            for thing in scene.things
        )
        assert found == told


def test_at_the_start_queries_look_apart_and_get_nothing_in_common(scenes):
    model = initialise(toy_config("opt"), 0)
    recipe.know_places(model.vision_model)
    features = model.vision_model(jnp.asarray(recipe.pixels_of(scenes)))[0] + 3.0
    layer = model.qformer.encoder.layer[0].crossattention.attention
    before = layer.query.kernel[...]
    recipe.look_apart(model, features)
    np.testing.assert_allclose(layer.query.kernel[...], 2 * before)
    np.testing.assert_allclose(layer.value(features).mean(axis=(0, 1)), 0, atol=1e-4)


def test_heads_start_with_how_often_labels_are_weighted_in(scenes):
    """With no difference between queries a probe says each label as often as it is right."""
    labels = recipe.cell_labels(scenes)
    often = np.exp(recipe.probes(labels, 96, seed=0)["often"]["colour"])
    objects = [thing.colour for scene in scenes for thing in scene.things]
    assert often[0] == pytest.approx(0.5, abs=1e-3)
    for colour in set(objects):
        share = objects.count(colour) / len(objects) / 2
        assert often[LABELS["colour"].index(colour)] == pytest.approx(share, abs=1e-3)


def test_a_query_is_read_to_lie_in_the_row_and_the_column_of_the_cell_whose_probe_asks_for_it():
    ask = jax.random.normal(jax.random.key(1), (16, 64))
    lines = recipe.in_lines({"ask": ask, "key": jnp.eye(64)})
    found = np.asarray(ask @ lines)  # each cell's probe, as if a query had become it
    rows, columns = np.divmod(np.arange(16), 4)
    np.testing.assert_array_equal(found[:, :4].argmax(axis=1), rows)
    np.testing.assert_array_equal(found[:, 4:].argmax(axis=1), columns)


def test_half_the_heads_of_an_opt_are_drawn_to_queries():
    model = initialise(toy_config("opt"), 0).language_model
    word = jnp.asarray(np.random.default_rng(0).normal(size=96).astype(np.float32))
    recipe.have_eyes(model, word)
    attention = model.model.decoder.layers[0].self_attn
    bias = np.asarray(attention.q_proj.bias[...]).reshape(6, 16)
    keys = np.asarray((word - word.mean()) / word.std() @ attention.k_proj.kernel[...])
    drawn = np.einsum("hd,hd->h", bias, keys.reshape(6, 16))
    assert (drawn[1::2] > 1).all()
    assert not drawn[::2].any()


@pytest.mark.parametrize("kept", [0, 8, 32])
def test_words_behind_fewer_queries_are_where_training_had_them(kept):
    """Counted from `kept` on, the words behind 32 queries are where they will be behind `kept`."""
    model = initialise(toy_config("opt"), 0).language_model
    positions = model.model.decoder.embed_positions
    recipe.count_from(jnp.asarray(kept, jnp.int32), model)
    trained = np.asarray(positions.embedding[...])[2 + 32 : 2 + 32 + 16]
    recipe.count_from(32, model)
    np.testing.assert_array_equal(trained, positions.embedding[...][2 + kept : 2 + kept + 16])
    near, far = (np.linalg.norm(trained[0] - trained[n]) for n in (1, 8))
    assert 0 < near < far


@pytest.mark.parametrize("which", ["opt", "t5"])
def test_the_command_trains_writes_and_resumes_and_what_it_writes_answers(
    which, tmp_path, monkeypatch
):
    monkeypatch.setattr(recipe, "scenes_config", toy_config)
    options = {
        "which": which,
        "work": tmp_path / "work",
        "seed": 0,
        "tower_steps": 2,
        "qformer_steps": 2,
        "answers_steps": 2,
        "scenes": 20,
        "test_scenes": 3,
    }
    recipe.main(out=tmp_path / "one", **options)
    recipe.main(out=tmp_path / "two", **options)  # everything is there already
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert first == second
    model, config = convert.load(tmp_path / "one")
    assert config == toy_config(which)
    log = [
        json.loads(x) for x in (tmp_path / "one" / "training_log.jsonl").read_text().splitlines()
    ]
    assert [line["stage"] for line in log] == ["tower", "qformer", "answers", "test"]
    assert all(math.isfinite(line["loss"]) for line in log[:3])
    assert {*log[2]} >= {"nearest", "right so"}  # what words know is learned, too
    assert set(log[-1]) >= FAMILIES
    if which == "opt":
        places = model.language_model.model.decoder.embed_positions.embedding[...]
        np.testing.assert_array_equal(places, recipe.places_in_line(32 + 514, 96)[32:])
    with pytest.raises(ValueError, match="exists already"):
        recipe.main(out=tmp_path / "one", **options)
    for other, says in (
        ({"seed": 1}, "seed 0, not 1"),
        ({"answers_steps": 3}, f"{which} holds a run with answers_steps 2, not 3"),
    ):
        with pytest.raises(ValueError, match=says):
            recipe.main(out=tmp_path / "three", **options | other)
    monkeypatch.setitem(recipe.MIX, which, recipe.Mix(looking=0.4))
    with pytest.raises(ValueError, match=r"mix Mix.*, not Mix"):
        recipe.main(out=tmp_path / "three", **options)

    # training and the front door see the same pixels, and what training reads is the whole model's
    loaded, scene = catp_jax.load(tmp_path / "one"), make_scene("test", 0)
    asked = ["what digit is red?", "is there a red circle?"]
    packed = loaded.prepare([scene.pixels] * 2, asked)
    np.testing.assert_allclose(packed.inputs.pixels[0], recipe.pixels_of([scene])[0], atol=1e-6)
    assert jnp.isfinite(loaded.generate([scene.pixels] * 2, asked).logits).all()


@pytest.mark.parametrize("which", ["opt", "t5"])
def test_training_reads_kept_states_as_the_model_reads_images(which, scenes):
    model = initialise(toy_config(which), 0)
    tokenizer = recipe.make_tokenizer(which, scenes)
    text = recipe.make_text(tokenizer, model.config)
    pairs = [[("what digit is red?", "7"), ("is there a red circle?", "no")]] * len(scenes)
    pixels = jnp.asarray(recipe.pixels_of(scenes))
    rows = answers.rows_of(text)([[[pair] for pair in some] for some in pairs], 2)
    states = model.encode(pixels)[0]
    mine = answers.answer_logits(model, answers.SceneBatch(features=states, rows=rows))
    asked = text.batch(np.asarray(pixels), pairs, 2)
    whole = model(asked.inputs, None, asked.decoder_tokens)[:, -asked.targets.shape[1] :]
    rows = min(mine.shape[2], whole.shape[1])
    np.testing.assert_allclose(
        mine.reshape(-1, *mine.shape[2:])[:, :rows], whole[:, :rows], atol=2e-5, rtol=1e-4
    )


def reduction(name, features):
    """Of 32 queries; of the images one has no empty entry, one has two, one nothing else."""
    if name == "all":
        return None
    valid = jnp.asarray([[True] * 5, [True, False, True, False, True], [False] * 5])
    indices = jnp.asarray([[0, 3, 7, 20, 31], [2, 2, 9, 9, 30], [0, 0, 0, 0, 0]], jnp.int32)
    if name == "keep":
        return Keep(indices=indices, valid=valid)
    tokens = jax.random.normal(jax.random.key(3), (3, 5, features.shape[2]))
    groups = jnp.broadcast_to(jnp.arange(32, dtype=jnp.int32) % 5, (3, 32))
    return Replace(indices=indices, valid=valid, groups=groups, tokens=tokens)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["all", "keep", "replace"])
def test_questions_in_one_row_are_answered_as_each_alone(name, dtype, scenes):
    """Of an OPT: empty entries are not seen, and what is behind closes up, question by question."""
    graph, state = nnx.split(initialise(toy_config("opt"), 0))
    model = nnx.merge(graph, jax.tree.map(lambda array: array.astype(dtype), state))
    rows = answers.rows_of(recipe.make_text(recipe.make_tokenizer("opt", scenes), model.config))(
        [[[("what digit is red?", "7")], [("is there a red circle?", "no")]]] * 3, 2
    )
    features = jax.random.normal(jax.random.key(2), (3, 32, model.config.qformer.hidden_size))
    keep = reduction(name, features)
    found = answers.answer_logits(model, answers.SceneBatch(features=features, rows=rows), keep)
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if dtype == jnp.float32 else {"atol": 0.05}
    for number in range(2):
        tokens, valid = rows.tokens[:, number], rows.token_valid[:, number]
        front = QueryingFront(
            visual=features, tokens=tokens, token_valid=valid, begun=None, view=None
        )
        alone = np.asarray(model.rows(front, keep)[:, -tokens.shape[1] :], np.float32)
        mine = np.asarray(found[:, number], np.float32)
        is_read = np.asarray(valid)
        np.testing.assert_allclose(mine[is_read], alone[is_read], **tolerance)


def test_a_decoder_is_told_a_lists_words_and_says_its_answers(scenes):
    tokenizer = recipe.make_tokenizer("t5", scenes)
    text = recipe.make_text(tokenizer, scenes_config("t5"))
    turns = [("where: red circle", "two three"), ("blue cross", "one four")]
    rows = jax.tree.map(
        np.asarray, answers.rows_of(text)([[turns, [("what digit is red?", "7")]]], 2)
    )

    def ids(words):
        return tokenizer.encode(words, add_special_tokens=False)

    assert rows.tokens[0, 0][rows.token_valid[0, 0]].tolist() == tokenizer.encode(
        "where: red circle blue cross"
    )
    said = ids("where: red circle two three blue cross one four")
    assert rows.decoder_tokens[0, 0, : 1 + len(said)].tolist() == [0, *said]
    told = {int(at): int(token) for at, token in enumerate(rows.targets[0, 0]) if token >= 0}
    assert list(told.values()) == ids("two three one four")
    assert all(rows.decoder_tokens[0, 0, 1 + at] == token for at, token in told.items())
    assert rows.decoder_tokens[0, 1, :2].tolist() == [0, *ids("7")]
    assert rows.targets[0, 1, :3].tolist() == [*ids("7"), tokenizer.eos_token_id, -1]


def test_the_two_kinds_start_alike_up_to_the_queries():
    fronts = [nnx.state(initialise(scenes_config(which), 0).qformer) for which in ("opt", "t5")]
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), *fronts)))


@pytest.mark.parametrize("which", ["opt", "t5"])
@pytest.mark.parametrize("kind", [*LISTS, *FIRST])
def test_every_list_fits_into_a_row(which, kind):
    """What is read of a list whose end is cut off would have no answer."""
    scenes = [make_scene("train", number) for number in range(100)]
    config = scenes_config(which)
    text = make_text(recipe.make_tokenizer(which, scenes), config)
    for scene in scenes:
        turns = listed(Dice(scene.number), scene, kind)
        if len(turns) > 1:
            targets = text.rows([[turns]], 1, answers.TEXT_LENGTH, answers.TEXT_LENGTH)[2]
            assert (targets >= 0).sum() == sum(len(answer.split()) for _, answer in turns)
