"""The mini BLIP-2s' training: batches, starts, losses, and the command from end to end."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import convert
from catp_jax.models.blip2 import Blip2, Blip2Inputs
from catp_jax.study.tasks import easy_vqa
from catp_jax.training import mini_blip2
from catp_jax.training.blip2_data import (
    PAPERS_PROMPT,
    TEXT_LENGTH,
    AskBatch,
    Composer,
    coverage,
    evaluation_batches,
)
from catp_jax.training.blip2_start import QUERIES, initialise, mini_config, say_what_is_seen
from catp_jax.training.mini_blip2 import (
    answer_logits,
    answers_loss,
    evaluate,
    main,
    make_text,
    make_tokenizer,
    qformer_loss,
    tower_loss,
    without_queries,
)
from catp_jax.training.photos import COLOURS, SHAPES, normalise
from catp_jax.training.tokenizer import load_processor, make_blip2_processor

KINDS = ("opt", "t5")
logits = jax.jit(answer_logits)


def toy_config(kind):
    """A mini BLIP-2 of fewer layers, which compile sooner."""
    config = mini_config(kind)
    layers = {"num_hidden_layers": 1} if kind == "opt" else {"num_layers": 1}
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_hidden_layers=1),
        qformer=dataclasses.replace(config.qformer, num_hidden_layers=2),
        text=dataclasses.replace(config.text, **layers),
    )


@pytest.fixture(scope="module")
def examples():
    return list(easy_vqa("train", 1500))


@pytest.fixture(scope="module")
def composer(examples):
    return Composer(examples, mini_config("opt").vision, seed=3)


@pytest.fixture(scope="module")
def tokenizers(examples):
    return {kind: make_tokenizer(kind, examples) for kind in KINDS}


@pytest.fixture(scope="module")
def texts(tokenizers):
    return {kind: make_text(tokenizers[kind], mini_config(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def models():
    return {kind: initialise(toy_config(kind), seed=1) for kind in KINDS}


def equal(one, other) -> bool:
    same = jax.tree.map(lambda x, y: bool((x == y).all()), one, other)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_what_the_layer_study_wants(kind):
    config = mini_config(kind)
    assert config.num_query_tokens == QUERIES == 32
    assert config.qformer.cross_layers == (0, 2, 4, 6, 8, 10)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="opt or t5, not 'llama'"):
        mini_config("llama")


def test_a_batch_is_a_function_of_seed_and_step(composer, examples, texts):
    assert equal(composer.looks(7, 4), composer.looks(7, 4))
    assert not equal(composer.looks(7, 4), composer.looks(8, 4))
    other = Composer(examples, mini_config("opt").vision, seed=4)
    assert not equal(composer.looks(7, 4), other.looks(7, 4))
    first, again = (composer.questions(7, 3, 2, texts["t5"], False) for _ in range(2))
    assert equal(first, again)


def test_coverage_of_a_hand_made_shape():
    """Columns 12–19 of rows 0–7: half of two patches of the first row."""
    matte = np.zeros((64, 64), np.float32)
    matte[:8, 12:20] = 1
    wanted = np.zeros((1, 65), np.float32)
    wanted[0, 1 + 1] = wanted[0, 1 + 2] = 0.5
    np.testing.assert_array_equal(coverage(matte, mini_config("opt").vision), wanted)


def test_a_patch_labelled_with_a_colour_shows_it(composer):
    batch = composer.looks(0, 64)
    patches = np.asarray(batch.pixels).reshape(64, 3, 8, 8, 8, 8).transpose(0, 2, 4, 1, 3, 5)
    patches = ((patches * 0.5 + 0.5) * 255).reshape(64, 64, 3, 64)
    np.testing.assert_allclose(batch.weights.sum(axis=1), 1, atol=1e-5)
    covered, weights = np.asarray(batch.covered)[:, 1:], np.asarray(batch.weights)[:, 1:]
    assert (patches.min(axis=(2, 3))[(covered == 0) & (weights > 0)] >= 229.5).all()
    is_red = np.asarray(batch.colours) == COLOURS.index("red")
    red = patches[is_red][covered[is_red] == 1]
    assert len(red)
    assert (np.abs(red - np.array([255, 0, 0])[None, :, None]).max(axis=1).min(axis=1) <= 1).all()


@pytest.mark.parametrize("wording", ["{}", PAPERS_PROMPT])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_processor_makes(kind, wording, examples, tokenizers, texts):
    processor = make_blip2_processor(tokenizers[kind], 64, QUERIES)
    example = examples[0]
    question = wording.format(example.question)
    with Image.open(example.image) as image:
        found = processor(images=[image], text=[question], return_tensors="np")
    batch = evaluation_batches([example], texts[kind], 1, wording)[0]
    np.testing.assert_allclose(batch.inputs.pixels, found["pixel_values"], atol=1e-6)
    marks, prompt = np.split(found["input_ids"][0], [QUERIES])
    assert (marks == processor.tokenizer.convert_tokens_to_ids("<image>")).all()
    assert (marks == mini_config(kind).image_token_index).all()
    np.testing.assert_array_equal(batch.inputs.tokens[0, : len(prompt)], prompt)
    answer = processor.tokenizer.decode(
        [t for t in batch.targets[0].tolist() if t >= 0], skip_special_tokens=True
    )
    assert answer.strip() == example.answer


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_is_one_token(kind, examples, texts):
    for question in {e.question for e in examples}:
        marks = 2 if question.endswith("?") else 1  # the sign, and the start or end
        tokens = texts[kind].encode(question)
        first_word = 2 if kind == "opt" else 0  # OPT's first word has no space before it
        assert len(tokens) <= len(question.split()) + marks + first_word
    for answer in (*SHAPES, *COLOURS, "yes", "no"):
        assert len(texts[kind].answer(answer)) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["what color is the shape?", "Ein Fußgänger, 12345 mal…", "🙂"])
def test_any_text_comes_back(kind, text, tokenizers):
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_special_tokens_stand_where_those_of_the_large_models_do(tokenizers):
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizers["opt"].convert_tokens_to_ids(names) == [0, 1, 2, 3]
    assert tokenizers["t5"].convert_tokens_to_ids(names[1:]) == [0, 1, 2]
    assert tokenizers["opt"].encode("yes")[0] == 2
    assert tokenizers["t5"].encode("yes")[-1] == 1


def test_a_question_too_long_and_an_answer_of_two_words_are_named(texts):
    pixels = np.zeros((1, 3, 64, 64), np.float32)
    with pytest.raises(ValueError, match="tokens of"):
        texts["opt"].batch(pixels, [[("is there " * TEXT_LENGTH, "yes")]], each=1)
    with pytest.raises(ValueError, match="'zebrawood' has"):
        texts["opt"].batch(pixels, [[("is there", "zebrawood")]], each=1)
    with pytest.raises(ValueError, match="'blue red' takes 4 tokens of 3"):
        texts["t5"].batch(pixels, [[("is there", "blue red")]], each=1)


def test_both_kinds_start_from_the_same_front(models):
    for name in ("vision_model", "qformer"):
        fronts = [nnx.state(getattr(models[kind], name)) for kind in KINDS]
        assert equal(*fronts)
    assert (models["opt"].query_tokens[...] == models["t5"].query_tokens[...]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_a_query_looks_like_the_words_for_what_it_has_seen(kind):
    model = initialise(mini_config(kind), seed=1)
    rng = np.random.default_rng(0)
    reading = jnp.asarray(rng.normal(size=(64, 11)).astype(np.float32))
    words = jnp.arange(300, 311)
    say_what_is_seen(model, reading, words.tolist())
    seen = jnp.linalg.pinv(reading)
    queries = model.language_projection(64 * seen)  # one for each word
    likeness = queries @ model.language_model.embed(words[None])[0].T
    assert (likeness.argmax(axis=1) == jnp.arange(11)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_gets_the_logits_it_gets_alone(kind, models, composer, texts):
    batch = composer.questions(0, 2, 3, texts[kind], False)
    together = logits(models[kind], batch)
    for row in (1, 5):
        inputs = Blip2Inputs(
            pixels=batch.inputs.pixels[row // 3][None],
            image_index=jnp.zeros(1, jnp.int32),
            tokens=batch.inputs.tokens[row][None],
            token_valid=batch.inputs.token_valid[row][None],
        )
        decoder = None if batch.decoder_tokens is None else batch.decoder_tokens[row][None]
        alone = AskBatch(inputs=inputs, decoder_tokens=decoder, targets=batch.targets[row][None])
        np.testing.assert_allclose(together[row], logits(models[kind], alone)[0], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_queries_zeroed_every_image_gets_the_same_answer(kind, models, composer, texts):
    batch = composer.questions(0, 4, 1, texts[kind], False)
    same = {name: jnp.repeat(getattr(batch.inputs, name)[:1], 4, axis=0)
            for name in ("tokens", "token_valid")}  # fmt: skip
    inputs = Blip2Inputs(pixels=batch.inputs.pixels, image_index=batch.inputs.image_index, **same)
    decoder = batch.decoder_tokens
    decoder = None if decoder is None else jnp.repeat(decoder[:1], 4, axis=0)
    batch = AskBatch(inputs=inputs, decoder_tokens=decoder, targets=batch.targets)
    seen = np.asarray(logits(models[kind], batch))
    blind = np.asarray(logits(without_queries(models[kind]), batch))
    assert np.abs(seen - seen[:1]).max() > 1e-3
    assert np.abs(blind - blind[:1]).max() < 1e-5


def test_looking_is_learned_from_one_batch(models, composer):
    """A few plain steps on the same images: both stages' losses fall."""
    model, batch = models["opt"], composer.looks(0, 8)
    graph, tower = nnx.split(model.vision_model)
    heads = {"shape": jnp.zeros((96, 4)), "colour": jnp.zeros((96, 9))}
    first, last = descend(tower_loss(graph), {"tower": tower, **heads}, None, batch)
    assert first == pytest.approx(2 * math.log(4 * 9), rel=1e-3)
    assert last < 0.8 * first

    is_front = nnx.Any(nnx.PathContains("qformer"), nnx.PathContains("query_tokens"))
    graph, front, frozen = nnx.split(model, is_front, ...)
    heads = {"shape": jnp.zeros((64, 3)), "colour": jnp.zeros((64, 8))}
    first, last = descend(qformer_loss(graph), {"front": front, **heads}, frozen, batch)
    assert first == pytest.approx(2 * math.log(3 * 8), rel=1e-3)
    assert last < 0.8 * first


@pytest.mark.parametrize("kind", KINDS)
def test_answering_is_learned_from_one_batch(kind, models, composer, texts):
    batch = composer.questions(0, 4, 2, texts[kind], True)
    graph, frozen, params = nnx.split(models[kind], nnx.PathContains("vision_model"), ...)
    first, last = descend(answers_loss(graph), params, frozen, batch)
    assert last < 0.5 * first


def descend(loss, params, frozen, batch, steps=12, rate=0.02):
    """Loss before and after some steps along the gradient's direction."""
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    losses = []
    for _ in range(steps):
        (value, _), grads = step(params, frozen, batch, jax.random.key(0))
        losses.append(float(value))
        params = jax.tree.map(lambda x, g: x - rate * g / (jnp.abs(g) + 1e-6) * 0.1, params, grads)
    return losses[0], losses[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_asks_every_question_once(kind, examples, models, texts):
    some = examples[:95]
    batches = evaluation_batches(some, texts[kind], size=4)
    assert len({b.targets.shape for b in batches}) == 1
    assert len(evaluate(models[kind], batches)) == len(some)


def test_the_command_trains_writes_and_resumes_and_kinds_share_the_first_stages(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(mini_blip2, "mini_config", toy_config)
    options = {
        "work": tmp_path / "work",
        "seed": 0,
        "batch": 16,
        "train_limit": 1500,
        "test_limit": 12,
        **{f"{name}_steps": 2 for name in ("tower", "qformer", "reader", "answers", "places")},
    }
    main(out=tmp_path / "one", which="opt", **options)
    main(out=tmp_path / "two", which="opt", **options)  # everything is there already
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert first == second
    main(out=tmp_path / "t5", which="t5", **options)

    fronts = []
    for kind, name in (("opt", "one"), ("t5", "t5")):
        network, config = convert.load(tmp_path / name)
        assert isinstance(network, Blip2)
        assert config == toy_config(kind)
        fronts.append(nnx.state(network.vision_model))
        processor = load_processor(tmp_path / name)
        assert processor.num_query_tokens == QUERIES
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        found = processor(images=[Image.fromarray(pixels)], text=["is it?"], return_tensors="np")
        np.testing.assert_allclose(found["pixel_values"][0], normalise(pixels), atol=1e-6)
        log = (tmp_path / name / "training_log.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in log]
        own = ["reader", "answers", "places"] if kind == "opt" else ["reader", "answers"]
        assert [line["stage"] for line in log] == ["tower", "qformer", *own, "test"]
        if kind == "opt":
            places = network.language_model.model.decoder.embed_positions.embedding[...]
            assert (places == 0).all()
        assert all(math.isfinite(line["loss"]) for line in log[:-1])
        assert log[-1]["questions"] == 12
        assert f"--kind {kind} " in (tmp_path / name / "README.md").read_text()
    assert equal(*fronts)

    with pytest.raises(ValueError, match="exists already"):
        main(out=tmp_path / "one", which="opt", **options)
    with pytest.raises(ValueError, match="seed 0, not 1"):
        main(out=tmp_path / "three", which="opt", **{**options, "seed": 1})
