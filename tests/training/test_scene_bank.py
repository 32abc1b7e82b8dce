"""What training on scenes asks, step by step."""

import jax.numpy as jnp
import pytest

from catp_jax.training.scene_bank import EACH, SCENES, Bank, Mix, Rows
from catp_jax.training.scene_lists import FIRST, LISTS
from catp_jax.training.scenes import SIZES, make_scene

STEPS = 100
EASY = [begin for begin, _ in FIRST.values()]
BEGIN = {begin: kind for kind, (begin, _) in LISTS.items()}


@pytest.fixture(scope="module")
def drawn():
    """The text of a step's rows, scene by scene."""
    told = []

    def rows(asked, each):
        told.append(asked)
        nothing = jnp.zeros((len(asked), each, 1), jnp.int32)
        return Rows(tokens=nothing, token_valid=nothing > 0, targets=nothing)

    scenes = [make_scene("train", number) for number in range(20)]
    bank = Bank(scenes, lambda some: jnp.zeros((len(some), 1, 1)), rows)

    def draw(step, **options):
        batch = bank.draw(step, STEPS, **{"seed": 0, **options})
        assert batch.rows.tokens.shape[:2] == (SCENES, EACH)
        return told.pop()

    return draw


def shares(asked):
    """Of which lists the rows are, and how many are questions."""
    rows = [turns for some in asked for turns in some]
    assert len(rows) == SCENES * EACH
    kinds = [kind(turns[0][0]) for turns in rows]
    return {name: kinds.count(name) / len(kinds) for name in (*LISTS, "easy", "question")}


def is_easy(turns):
    return kind(turns[0][0]) == "easy"


def kind(words):
    begin, _, rest = words.partition(": ")
    is_short = " " not in rest or rest.startswith((*SIZES,)) or rest.endswith("digit")
    if f"{begin}:" in EASY and is_short:  # a list that names objects has colour and name
        return "easy"
    return BEGIN.get(f"{begin}:", "question")


def test_the_easiest_lists_come_first_and_fade_out_to_those_of_attributes(drawn):
    asked = {step: drawn(step, mix=Mix(looking=0.5)) for step in (0, 25, 50)}
    first, middle, later = (shares(asked[step]) for step in (0, 25, 50))
    assert first["easy"] > 0.85
    assert 0.3 < middle["easy"] < 0.65
    assert 0 < later["easy"] < 0.2
    begins = {
        step: {turns[0][0].partition(" ")[0] for some in all for turns in some if is_easy(turns)}
        for step, all in asked.items()
    }
    assert begins[0] == {"what:", "where:", "is"}
    assert begins[50] == {"what:"}


def test_other_lists_give_way_to_questions(drawn):
    first, last = (shares(drawn(step)) for step in (0, STEPS - 1))
    assert first["easy"] == last["easy"] == 0
    assert all(first[kind] > 0.05 for kind in LISTS)
    assert 0.25 < first["question"] < 0.55
    assert last["question"] > 0.65


def test_a_step_is_always_the_same_and_no_two_are(drawn):
    one, same, other = (drawn(step, seed=3, mix=Mix(looking=0.5)) for step in (7, 7, 8))
    assert one == same
    assert one != other
    assert one != drawn(7, seed=4, mix=Mix(looking=0.5))
