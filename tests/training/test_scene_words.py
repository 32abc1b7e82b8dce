"""What words are to know of a scene."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from catp_jax.models.t5 import T5
from catp_jax.training import scene_words
from catp_jax.training import scenes_blip2 as recipe
from catp_jax.training.blip2_start import initialise
from catp_jax.training.scene_answers import answer_logits, rows_of
from catp_jax.training.scene_bank import Bank
from catp_jax.training.scene_questions import attribute, named, reading, relation
from catp_jax.training.scenes import COLOURS, DIGITS, SHAPES, make_scene
from catp_jax.training.scoring import answer_loss

NOTHING = -1
SIDES = ("left of", "below")


@pytest.fixture(scope="module")
def scenes():
    return [make_scene("train", number) for number in range(6)]


@pytest.fixture(scope="module", params=["opt", "t5"])
def text(request):
    return make_text(request.param)


def make_text(kind):
    scenes = [make_scene("train", number) for number in range(60)]  # all words are in them
    return recipe.make_text(recipe.make_tokenizer(kind, scenes), recipe.scenes_config(kind))


def labelled(scene, text, *rows):
    """What each word should know, by sort and row: only what there is to know."""
    made = rows_of(text)([list(rows)], len(rows))
    labels = scene_words.labels_of(text)([scene], [list(rows)], made)
    return {
        name: [
            {at: label for at, label in enumerate(row) if label != NOTHING}
            for row in np.asarray(some)[0].tolist()
        ]
        for name, some in labels.items()
    }


def words_at(text, question, *words):
    """Where in a question the last of some words stands."""
    tokens, wanted = text.encode(question), [text.answer(word)[0] for word in words]
    (found,) = (
        at + len(wanted) - 1 for at in range(len(tokens)) if tokens[at : at + len(wanted)] == wanted
    )
    return found


def sides(one, other):
    """From one object to another, 0: left or up, 1: in line, 2: right or down."""
    return [
        0 if to < back else 2 if to > back else 1
        for back, to in ((one.row, other.row), (one.column, other.column))
    ]


def test_the_second_object_knows_where_the_first_is(scenes, text):
    asked = 0
    for scene in scenes:
        for one in [one for one in relation(scene) if one.kind in SIDES][:4]:
            first, second = one.needed
            labels = labelled(scene, text, [(one.question, one.answer)])
            a = words_at(text, one.question, first.colour, first.name)
            b = words_at(text, one.question, second.colour, second.name)
            row = {name: some[0] for name, some in labels.items()}
            assert (row["row"][a], row["column"][a]) == (first.row, first.column)
            assert (row["row"][b], row["column"][b]) == (second.row, second.column)
            assert (row["row before"][b], row["column before"][b]) == (first.row, first.column)
            assert [row["down"][b], row["right"][b]] == sides(first, second)
            assert {a, a - 1}.isdisjoint(row["down"])  # nothing was named before
            assert row["asked"] == {b: {"left of": 0, "below": 3}[one.kind]}
            assert row["right so"] == {b: one.answer == "yes"}
            asked += 1
    assert asked > 10


def test_the_end_of_a_question_knows_its_answer_and_that_of_a_list_does_not(scenes):
    text = make_text("t5")
    question, turns = "is there a red circle?", [("is: red circle", "yes"), ("blue cross", "no")]
    rows = labelled(scenes[0], text, [(question, "no")], turns)["answer"]
    assert rows == [{len(text.encode(question)) - 1: text.answer("no")[0]}, {}]


def test_what_is_nearest_is_a_colour(scenes, text):
    near = [(scene, one) for scene in scenes for one in relation(scene) if one.kind == "nearest"]
    assert near
    for scene, one in near:
        at = words_at(text, one.question, one.needed[0].colour, one.needed[0].name)
        label = labelled(scene, text, [(one.question, one.answer)])["nearest"][0][at]
        assert [*COLOURS][label] == one.answer


def test_words_for_looks_know_how_many_there_are(scenes, text):
    question = "how many red objects, circles or crosses are there?"
    for scene in scenes:
        row = labelled(scene, text, [(question, "two")])["number"][0]
        things = scene.things
        found = [
            sum(thing.colour == "red" for thing in things),
            sum(thing.name == "circle" for thing in things),
            sum(thing.name == "cross" for thing in things),
        ]
        assert [row[at] for at in sorted(row)] == [min(number, 4) for number in found]


def test_only_questions_about_sides_say_which(scenes, text):
    scene = next(scene for scene in scenes if len(named(scene)) > 1)
    first, second = (f"{thing.colour} {thing.name}" for thing in named(scene)[:2])
    both = f"is there a {first} or a {second}?"
    turns = [(f"is: {first} left of {second}", "yes"), (f"above {second}", "no")]
    labels = labelled(scene, text, [(both, "yes")], turns)
    assert labels["asked"] == labels["right so"] == [{}, {}]
    assert all(labels["right"])  # where it is, words know anyway


def test_two_heads_start_looking_along_the_line():
    model = initialise(recipe.scenes_config("t5"), 0).language_model
    assert isinstance(model, T5)
    scene_words.look_along(model)
    places = jnp.arange(40, dtype=jnp.int32)[None]
    found = np.asarray(model.encoder.bias(places, places))[0]
    for row, column in ((20, 20), (20, 19), (20, 16), (19, 20), (13, 20)):
        near = -0.5 * abs(row - column)
        before, behind = found[:2, row, column]
        assert before == pytest.approx(near if column <= row else near - 6, abs=0.3)
        assert behind == pytest.approx(near if column > row else near - 6, abs=0.3)
    assert found[:2, 35, 0].max() < -10  # what is far is not heard
    assert np.abs(found[2:]).max() < 0.3


def test_words_that_fit_several_objects_know_nothing(scenes, text):
    for scene in scenes:
        for colour in COLOURS:
            some = [thing for thing in scene.things if thing.colour == colour]
            rows = labelled(scene, text, [(f"how many objects are {colour}?", "two")])["row"]
            assert len(rows[0]) == (len(some) == 1)


def small(kind, scenes):
    """A model of two layers, a batch of questions and lists, and heads that know nothing."""
    config, text = recipe.scenes_config(kind), make_text(kind)
    layers = {"num_hidden_layers" if kind == "opt" else "num_layers": 2}
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **layers))
    bank = Bank(
        scenes,
        lambda some: jnp.asarray(np.random.default_rng(0).normal(size=(len(some), 32, 64))),
        rows_of(text),
        scene_words.labels_of(text),
    )
    model = initialise(config, 0)
    heads = scene_words.word_heads(model.language_model)
    return model, bank.draw(50, 100, seed=0, scenes=4), heads


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_loss_is_that_of_the_answers_and_of_what_is_known(scenes, kind):
    """Heads that know nothing cost the logarithm of the choices; each learns."""
    model, batch, heads = small(kind, scenes)
    total, figures = scene_words.words_loss(model, heads, batch)
    plain, _ = answer_loss(answer_logits(model, batch), batch.rows.targets)
    np.testing.assert_allclose(figures["loss"], plain, rtol=1e-5)
    bare, _ = scene_words.words_loss(model, {}, batch)
    guessed = sum(0.5 * np.log(head.shape[1]) for head in heads.values())
    np.testing.assert_allclose(total, bare + guessed, rtol=1e-5)
    if kind == "opt":
        assert bare == pytest.approx(plain)
    else:  # the end of each question says its answer
        assert bare > plain + 1
    graph, state = nnx.split(model)

    def loss(params):
        return scene_words.words_loss(nnx.merge(graph, params[0]), params[1], batch)

    (_, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))((state, heads))
    assert all(float(jnp.abs(grad).max()) > 0 for grad in grads[1].values())


@pytest.mark.parametrize(("kind", "earlier"), [("opt", 1), ("t5", 0)])
def test_each_head_reads_its_own_layer(scenes, kind, earlier, monkeypatch):
    """Layer n's words are the nth unit vector: a head that reads another changes nothing."""
    model, batch, heads = small(kind, scenes)
    width = len(heads["row"])
    units = jnp.eye(width)[:6]
    states = [jnp.broadcast_to(unit, (*batch.rows.tokens.shape, width)) for unit in units]
    logits = answer_logits(model, batch)
    monkeypatch.setattr(scene_words, "told", lambda model, batch: (logits, states))
    wanted = {
        **{"row": 3, "column": 3, "row before": 4, "column before": 4, "asked": 4},
        **{"down": 5, "right": 5, "nearest": 5, "number": 5, "right so": 6},
        **({"colour": 5, "name": 5} if kind == "opt" else {}),
    }
    assert {*wanted} == {*heads}
    base, _ = scene_words.words_loss(model, heads, batch)
    for name, head in heads.items():
        read = []
        for layer in range(6):
            total, _ = scene_words.words_loss(
                model, {**heads, name: head.at[layer, 0].set(-9.0)}, batch
            )
            read += [layer + 1] if abs(total - base) > 1e-3 else []
        assert read == [wanted[name] - earlier]


def test_a_head_learns_from_words_with_a_label_alone():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 5, 4)), rng.integers(-1, 4, size=(3, 5))
    other = np.where((labels < 0)[..., None], rng.normal(size=logits.shape), logits)
    found = [scene_words._known(jnp.asarray(x), jnp.asarray(labels)) for x in (logits, other)]
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    losses = [-np.log(shares[at][labels[at]]) for at in zip(*np.where(labels >= 0), strict=True)]
    right = [logits[at].argmax() == labels[at] for at in zip(*np.where(labels >= 0), strict=True)]
    for loss, share in found:
        assert loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert share == pytest.approx(np.mean(right))


def test_words_know_the_look_of_what_they_name(scenes, text):
    """Of a word that is ambiguous without "large" or "small" before it, too."""
    known, sized = Counter(), 0
    for scene in scenes:
        for one in (*attribute(scene), *reading(scene)):
            (thing,) = one.needed
            labels = labelled(scene, text, [(one.question, one.answer)])
            if not labels["colour"][0]:  # what it says is true of a digit, too
                continue
            at = min(labels["colour"][0])  # an OPT's answer may be its words, too
            assert at == min(labels["name"][0])
            assert labels["colour"][0][at] == [*COLOURS].index(thing.colour)
            assert labels["name"][0][at] == [*SHAPES, *DIGITS].index(thing.name)
            if one.answer == thing.colour:
                assert at == words_at(text, one.question, thing.name)
            known[one.kind, one.family] += 1
            sized += thing.size in one.question.split()
    assert min(known.values()) > 5
    assert (len(known), sized > 5) == (4, True)
