"""What training lists about a scene besides questions: several answers in one question's words.

    attribute   what: square red small blue circle 7 green red digit 4
    spot        where: square two three small blue one four
    presence    is there: red yes square no
    place       where: red circle two three blue cross one four green square four one
    existence   is there: red circle yes green square no blue cross no
    count       how many: red two circle one blue three square two
    relation    is: red circle left of blue cross yes above green square no

Rows and columns are counted from one. Here a model has to know of an object as soon as it is named.
From questions, which are answered at their end alone, it learns the same much more slowly.
"""

from collections import Counter
from collections.abc import Callable

from catp_jax.training.scene_questions import COUNTS, Asked, count, existence, named, relation
from catp_jax.training.scenes import COLOURS, DIGITS, SHAPES, Dice, Scene, Thing
from catp_jax.training.turns import Turn

LOOKS = (*SHAPES, *DIGITS, *COLOURS)
LEFT_OUT = {"is", "are", "there", "a", "the", "how", "many", "objects"}


def places(dice: Dice, scene: Scene) -> list[Turn]:
    """The row and the column of up to three objects."""
    return [
        (f"{thing.colour} {thing.name}", f"{COUNTS[thing.row]} {COUNTS[thing.column]}")
        for thing in dice.shuffled(named(scene))[:3]
    ]


def attributes(dice: Dice, scene: Scene) -> list[Turn]:
    """The other of colour and name of up to four objects that one of them tells from all others,
    alone or with the size; of a colour, which digit it has.
    """
    looks = [
        (words, thing.name if thing.colour in words.split() else thing.colour)
        for words, thing in _told_shortly(dice, scene)
    ]
    digits = [thing for thing in scene.things if thing.is_digit]
    often = Counter(thing.colour for thing in digits)
    looks += [(f"{t.colour} digit", t.name) for t in digits if often[t.colour] == 1]
    return dice.shuffled(looks)[:4]


def spots(dice: Dice, scene: Scene) -> list[Turn]:
    """The row and the column of up to three objects that colour or name tells from all others,
    alone or with the size.
    """
    return [
        (words, f"{COUNTS[thing.row]} {COUNTS[thing.column]}")
        for words, thing in _told_shortly(dice, scene)[:3]
    ]


def presences(dice: Dice, scene: Scene) -> list[Turn]:
    """Whether there is anything of up to six colours and names, yes as likely as no."""
    seen = {word for thing in scene.things for word in (thing.colour, thing.name)}
    left = {"yes": [], "no": []}
    for word in dice.shuffled(LOOKS):
        left["yes" if word in seen else "no"].append(word)
    turns = []
    while len(turns) < 6 and all(left.values()):
        answer = dice.pick([*left])
        turns.append((left[answer].pop(), answer))
    return turns


def _told_shortly(dice: Dice, scene: Scene) -> list[tuple[str, Thing]]:
    """Colours and names that one object alone has, or alone of its size, with that object."""
    words = [(word, thing) for thing in scene.things for word in (thing.colour, thing.name)]
    sized = [(f"{thing.size} {word}", thing) for word, thing in words]
    often = Counter(word for word, _ in (*words, *sized))
    told = [
        plain if often[plain[0]] == 1 else full
        for plain, full in zip(words, sized, strict=True)
        if often[full[0]] == 1
    ]
    return dice.shuffled(told)


def existences(dice: Dice, scene: Scene) -> list[Turn]:
    """Whether there are up to four things."""
    return [(_short(one), one.answer) for one in _evenly(dice, list(existence(scene)), 4)]


def counts(dice: Dice, scene: Scene) -> list[Turn]:
    """How many there are of up to five colours and shapes."""
    return [(_short(one), one.answer) for one in _evenly(dice, list(count(scene)), 5)]


def relations(dice: Dice, scene: Scene) -> list[Turn]:
    """Where an object is, seen from two others."""
    asked = [one for one in relation(scene) if one.kind != "nearest"]
    if not asked:
        return []
    first = dice.pick(asked).needed[0]
    some = _evenly(dice, [one for one in asked if one.needed[0] is first], 2)
    name = f"{first.colour} {first.name} "
    return [
        (_short(one) if number == 0 else _short(one).removeprefix(name), one.answer)
        for number, one in enumerate(some)
    ]


def _evenly(dice: Dice, asked: list[Asked], most: int) -> list[Asked]:
    """So many of the questions, each answer as likely as another."""
    left, out = dice.shuffled(asked), []
    while left and len(out) < most:
        wanted = dice.pick(sorted({one.answer for one in left}))
        out.append(next(one for one in left if one.answer == wanted))
        left.remove(out[-1])
    return out


def _short(asked: Asked) -> str:
    words = asked.question.removesuffix("?").split()
    return " ".join(word for word in words if word not in LEFT_OUT)


LISTS: dict[str, tuple[str, Callable[[Dice, Scene], list[Turn]]]] = {
    "place": ("where:", places),
    "existence": ("is there:", existences),
    "count": ("how many:", counts),
    "relation": ("is:", relations),
}
"""What a list begins with, and what makes it."""
FIRST = {
    "attribute": ("what:", attributes),
    "spot": ("where:", spots),
    "presence": ("is there:", presences),
}
"""The easiest, for models that have yet to find out that there is something to see: a word, or two,
tell what is meant."""


def listed(dice: Dice, scene: Scene, kind: str) -> list[Turn]:
    """A list, its first words behind what it begins with; empty if there is nothing to say."""
    begin, make = (LISTS | FIRST)[kind]
    return [
        (f"{begin} {words}" if number == 0 else words, answer)
        for number, (words, answer) in enumerate(make(dice, scene))
    ]
