"""The mini Llama Vision's training: its forward passes, and the command from end to end."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
from catp_jax.models.mllama import Inputs
from catp_jax.study.tasks import Example, easy_vqa
from catp_jax.training import mini_llama_vision
from catp_jax.training.data import Composer, Text
from catp_jax.training.llama_answers import say_what_is_seen
from catp_jax.training.mini_llama_vision import (
    evaluate,
    initialise,
    logits_of,
    main,
    mini_config,
)
from catp_jax.training.scoring import blind_accuracy, is_answered
from catp_jax.training.tokenizer import load_processor, train_tokenizer

logits = jax.jit(logits_of)
read = jax.jit(lambda model, inputs: model(inputs))


def toy_config(depth=3, cross_attention_layers=(1,)):
    """The mini Llama Vision with fewer layers, which compile sooner; one of each sort."""
    config = mini_config()
    text = {"num_hidden_layers": depth, "cross_attention_layers": cross_attention_layers}
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_hidden_layers=2),
        text=dataclasses.replace(config.text, **text),
    )


@pytest.fixture(scope="module")
def model():
    return initialise(toy_config(4, (1, 3)), seed=1)


@pytest.fixture(scope="module")
def batch():
    examples = list(easy_vqa("train", 1500))
    tokenizer = train_tokenizer((f"{e.question} {e.answer}" for e in examples), 352, 512)
    text = Text(encode=tokenizer.encode, end=0, padding=1)
    return Composer(examples, mini_config().vision, seed=0).questions(0, 2, 3, text)


def test_it_asks_what_pruning_wants():
    config = mini_config()
    assert config.vision.max_num_tiles * config.vision.tokens_per_tile >= 200
    assert config.vision.tokens_per_tile % 8 != 0  # transformers masks everything otherwise
    assert len(config.text.cross_attention_layers) >= 2
    assert config.text.cross_attention_layers[0] > 0
    assert config.text.num_attention_heads > config.text.num_key_value_heads
    assert config.image_token_index == config.text.vocab_size


def test_every_gate_is_open_from_the_start():
    state = nnx.state(initialise(mini_config(), seed=1))
    leaves = jax.tree.leaves_with_path(jax.tree.map(np.asarray, state))
    gates = [x for path, x in leaves if x.shape == (1,)]
    assert len(gates) == 3 + 2 + 2 * 2  # tower, global layer, two cross-attention layers
    assert all((gate != 0).all() for gate in gates)


def test_at_the_start_a_word_attends_to_what_it_names():
    """In the first cross-attention layer, key heads are query heads, and features are words."""
    model = initialise(mini_config(), seed=1)
    rng = np.random.default_rng(0)
    reading = jnp.asarray(rng.normal(size=(192, 11)).astype(np.float32))
    words = list(range(300, 311))
    say_what_is_seen(model, reading, words)
    seen = jnp.linalg.pinv(reading)
    features = model.multi_modal_projector(16 * seen)[None]  # one token for each word
    layer = model.language_model.layers[1]
    rows = model.language_model.embed_tokens(jnp.array([words]))
    queries = layer.cross_attn.queries(layer.input_layernorm(rows))[:, :, ::3]
    scores = jnp.einsum("bshd,bnhd->bsn", queries, layer.cross_attn.project(features).keys)
    assert (scores[0].argmax(axis=-1) == jnp.arange(11)).all()


def test_questions_of_an_image_get_the_logits_they_get_alone(model, batch):
    together = logits(model, batch)
    for number in range(batch.tokens.shape[1]):
        alone = read(
            model,
            Inputs(
                tokens=batch.tokens[:, number],
                token_valid=batch.token_valid[:, number],
                images=batch.images,
            ),
        )
        np.testing.assert_allclose(together[:, number], alone, atol=2e-5)


def test_keeping_everything_changes_nothing_and_keeping_little_does(model, batch):
    everything = logits(model, batch)
    shape = (*batch.tokens.shape[:2], 260)
    indices = jnp.broadcast_to(jnp.arange(260, dtype=jnp.int32), shape)
    np.testing.assert_allclose(logits(model, batch, kept=indices), everything, atol=2e-5)
    few = logits(model, batch, kept=indices[..., :4])
    assert not np.allclose(few, everything, atol=1e-3)


def test_a_closed_first_layer_is_skipped_for_that_question_alone(model, batch):
    usual = logits(model, batch)
    closed = logits(model, batch, jnp.array([True, False, True]))
    np.testing.assert_allclose(closed[:, [0, 2]], usual[:, [0, 2]], atol=2e-5)
    assert not np.allclose(closed[:, 1], usual[:, 1], atol=1e-3)


def test_answered_means_every_token_of_the_answer_is_right():
    logits = jnp.zeros((1, 3, 3, 5)).at[0, :, 1, 4].set(1.0).at[0, :, 2, 2].set(1.0)
    targets = jnp.array([[[-1, 4, 2], [-1, 4, 3], [-1, -1, -1]]], jnp.int32)
    assert is_answered(logits, targets).tolist() == [[1.0, 0.0, 1.0]]


def test_evaluation_counts_only_questions(model, batch):
    assert len(evaluate(model, [batch, batch])) == 2 * 2 * 3
    assert len(evaluate(model, [batch], kept=4)) == 2 * 3


def test_blind_accuracy_is_that_of_the_commonest_answer(tmp_path):
    def example(question, answer):
        return Example(image=tmp_path, question=question, answer=answer, id="", image_id=0)

    train_set = [example("a", "yes"), example("a", "yes"), example("a", "no"), example("b", "no")]
    test_set = [example("a", "yes"), example("a", "no"), example("b", "no"), example("c", "no")]
    assert blind_accuracy(train_set, test_set) == 0.5


def test_the_command_trains_writes_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(mini_llama_vision, "mini_config", toy_config)
    options = {
        "work": tmp_path / "work",
        "seed": 0,
        "batch": 2,
        "train_limit": 1500,
        "test_limit": 12,
        "tower_steps": 2,
        "reader_steps": 2,
        "decoder_steps": 2,
    }
    main(out=tmp_path / "one", **options)
    main(out=tmp_path / "two", **options)  # everything is there already
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert first == second

    network, config = convert.load(tmp_path / "one")
    assert config == toy_config()
    assert network.config == config
    assert load_processor(tmp_path / "one").tokenizer.convert_tokens_to_ids("<|image|>") == 352
    log = [
        json.loads(x) for x in (tmp_path / "one" / "training_log.jsonl").read_text().splitlines()
    ]
    assert [line["stage"] for line in log] == ["tower", "reader", "decoder", "test"]
    assert all(math.isfinite(line["loss"]) for line in log[:3])
    assert log[-1]["questions"] == 12

    with pytest.raises(ValueError, match="exists already"):
        main(out=tmp_path / "one", **options)
    with pytest.raises(ValueError, match="seed 0, not 1"):
        main(out=tmp_path / "three", **{**options, "seed": 1})
