"""Lists about scenes and rows of several turns: every answer is right, and is what is asked for."""

import pytest

from catp_jax.training.scene_lists import FIRST, LISTS, listed
from catp_jax.training.scenes import Dice, make_scene
from catp_jax.training.turns import line

NUMBERS = ("one", "two", "three", "four")
PLURALS = {"crosses": "cross", "circles": "circle", "squares": "square"}
PLURALS |= {"triangles": "triangle", "diamonds": "diamond"}


def truth(kind, words, before, things):
    """What is to be said after some words of a list; `before` are those of its first turn."""
    if kind == "count":
        word = PLURALS.get(words[0], words[0])
        return NUMBERS[sum(word in (thing.colour, thing.name) for thing in things) - 1]
    if kind == "presence":
        return "yes" if any(words[0] in (t.colour, t.name) for t in things) else "no"
    if kind in ("attribute", "spot"):
        *size, word = words
        if word == "digit":  # "red digit"
            (thing,) = (t for t in things if t.name.isdigit() and t.colour == size[0])
            return thing.name
        with_word = [thing for thing in things if word in (thing.colour, thing.name)]
        (thing,) = (thing for thing in with_word if thing.size in size or not size)
        assert bool(size) == (len(with_word) > 1)
        looks = {thing.colour: thing.name, thing.name: thing.colour}
        spot = f"{NUMBERS[thing.y // 32]} {NUMBERS[thing.x // 32]}"
        return looks[word] if kind == "attribute" else spot
    found = [thing for thing in things if (thing.colour, thing.name) == tuple(words[:2])]
    if kind == "existence":
        return "yes" if found else "no"
    if kind == "place":
        (thing,) = found
        return f"{NUMBERS[thing.y // 32]} {NUMBERS[thing.x // 32]}"
    (one,) = (thing for thing in things if (thing.colour, thing.name) == tuple(before[:2]))
    (other,) = (thing for thing in things if (thing.colour, thing.name) == tuple(words[-2:]))
    so = {
        "left": one.x < other.x - 9,
        "right": one.x > other.x + 9,
        "above": one.y < other.y - 9,
        "below": one.y > other.y + 9,
    }
    (relation,) = {*so} & {*words}
    return "yes" if so[relation] else "no"


@pytest.mark.parametrize("kind", [*LISTS, *FIRST])
def test_what_is_listed_is_so(kind):
    begin, most, seen = (LISTS | FIRST)[kind][0], 0, set()
    for number in range(40):
        scene = make_scene("train", number)
        turns = listed(Dice(number), scene, kind)
        first = turns[0][0].removeprefix(f"{begin} ").split() if turns else []
        for place, (words, answer) in enumerate(turns):
            asked = words.removeprefix(f"{begin} ") if place == 0 else words
            assert truth(kind, asked.split(), first, scene.things) == answer
            seen.add(answer)
        most = max(most, len(turns))
    assert most > 1
    assert len(seen) >= 2


def test_whether_there_is_something_is_asked_once_a_word():
    for number in range(60):
        turns = listed(Dice(number), make_scene("train", number), "presence")
        words = [asked.removeprefix("is there: ") for asked, _ in turns]
        assert len({*words}) == len(words) > 1


def codes(text):
    return [ord(letter) for letter in text]


def test_a_question_ends_and_a_list_does_not():
    parts = {"prompt": codes, "words": lambda text: codes(text.upper()), "reply": codes, "end": 0}
    assert line([("ab", "c")], length=4, **parts) == ([97, 98, 99, 0], [-1, 99, 0, -1])
    tokens, targets = line([("a", "b"), ("c", "de")], length=9, **parts)
    assert tokens == [97, 98, 67, 100, 101]
    assert targets == [98, -1, 100, 101, -1]


def test_turns_beyond_the_length_are_left_out_but_never_the_first():
    parts = {"prompt": codes, "words": codes, "reply": codes, "end": 0}
    tokens, _ = line([("a", "b"), ("c", "de"), ("f", "g")], length=4, **parts)
    assert tokens == [97, 98]
    with pytest.raises(ValueError, match="'ab c' takes 4 tokens of 3"):
        line([("ab", "c")], length=3, **parts)
