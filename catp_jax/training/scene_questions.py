"""Questions about `scenes`, of five families; each knows its answer and what it needs to see.

    attribute   what color is the small circle?       what shape is the red object?
    existence   is there a red circle?
    count       how many red objects are there?       how many circles are there?
    relation    is the red circle left of the blue cross?
                what color is the object nearest to the red circle?
    reading     what digit is red?                    what color is the digit 7?

A description such as "the red circle" fits one object alone. Where a question is answered no, there
are objects of that colour and of that shape, but none of both. Digits count as objects in questions
of the family reading and in the count of a colour; a "nearest object" may be one too.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from catp_jax.study.tasks import QUESTION, Box, Example, Task, exact_match
from catp_jax.training.scenes import (
    COLOURS,
    DIGITS,
    SHAPES,
    SIZES,
    Dials,
    Dice,
    Scene,
    Thing,
    make_scene,
)

COUNTS = ("one", "two", "three", "four")
SCENES = 400  # of the task
BESIDE = 1.25  # times as far as the nearest object all others have to be


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about a scene: `needed` are the objects that its answer depends on.

    `kind` is the part of the family within which answers are balanced.
    """

    question: str
    answer: str
    family: str
    kind: str
    needed: tuple[Thing, ...]

    def boxes(self, scene: Scene) -> tuple[Box, ...]:
        """Where in the image they are."""
        return tuple(map(scene.box, self.needed))


def attribute(scene: Scene) -> Iterator[Asked]:
    """One attribute of the only object that has the others."""
    shapes = [thing for thing in scene.things if not thing.is_digit]
    for thing in shapes:
        same_name = [other for other in shapes if other.name == thing.name]
        same_colour = [other for other in shapes if other.colour == thing.colour]
        for others, name in ((same_name, thing.name), (same_colour, f"{thing.colour} object")):
            asks = "color" if others is same_name else "shape"
            answer = thing.colour if others is same_name else thing.name
            if len(others) == 1:
                yield Asked(f"what {asks} is the {name}?", answer, "attribute", asks, (thing,))
            elif sum(other.size == thing.size for other in others) == 1:
                question = f"what {asks} is the {thing.size} {name}?"
                yield Asked(question, answer, "attribute", asks, (thing,))


def existence(scene: Scene) -> Iterator[Asked]:
    """Whether there is a shape of a colour."""
    shapes = [thing for thing in scene.things if not thing.is_digit]
    for colour in dict.fromkeys(thing.colour for thing in shapes):
        for name in dict.fromkeys(thing.name for thing in shapes):
            found = [thing for thing in shapes if (thing.colour, thing.name) == (colour, name)]
            ruled_out = [thing for thing in shapes if thing.colour == colour or thing.name == name]
            answer, needed = ("yes", found) if found else ("no", ruled_out)
            question = f"is there a {colour} {name}?"
            yield Asked(question, answer, "existence", "yes or no", tuple(needed))


def count(scene: Scene) -> Iterator[Asked]:
    """How many objects there are of a colour or of a shape, from one to four."""
    for colour in COLOURS:
        found = [thing for thing in scene.things if thing.colour == colour]
        yield from _counted(f"how many {colour} objects are there?", "of a colour", found)
    for name in SHAPES:
        found = [thing for thing in scene.things if thing.name == name]
        yield from _counted(f"how many {plural(name)} are there?", "of a shape", found)


def plural(name: str) -> str:
    """The word for several of a shape."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _counted(question: str, kind: str, found: list[Thing]) -> Iterator[Asked]:
    if 1 <= len(found) <= len(COUNTS):
        yield Asked(question, COUNTS[len(found) - 1], "count", kind, tuple(found))


def named(scene: Scene) -> list[Thing]:
    """The shapes that colour and name tell from all others."""
    looks = Counter((thing.colour, thing.name) for thing in scene.things)
    return [t for t in scene.things if looks[t.colour, t.name] == 1 and not t.is_digit]


def relation(scene: Scene) -> Iterator[Asked]:
    """Where one object is, seen from another, and what is nearest to it."""
    told_apart = named(scene)
    for thing in told_apart:
        for other in told_apart:
            where = f"the {thing.colour} {thing.name}", f"the {other.colour} {other.name}"
            for words, away in (
                (("left of", "right of"), other.column - thing.column),
                (("above", "below"), other.row - thing.row),
            ):
                if away:
                    for word, is_so in zip(words, (away > 0, away < 0), strict=True):
                        question = f"is {where[0]} {word} {where[1]}?"
                        answer = "yes" if is_so else "no"
                        yield Asked(question, answer, "relation", word, (thing, other))
        near = sorted((t for t in scene.things if t is not thing), key=lambda t: _apart(t, thing))
        if _apart(near[1], thing) > BESIDE**2 * _apart(near[0], thing):
            question = f"what color is the object nearest to the {thing.colour} {thing.name}?"
            yield Asked(question, near[0].colour, "relation", "nearest", (thing, near[0]))


def _apart(one: Thing, other: Thing) -> int:
    """The square of the distance between two objects' cells."""
    return (one.row - other.row) ** 2 + (one.column - other.column) ** 2


def reading(scene: Scene) -> Iterator[Asked]:
    """Which digit has a colour, and which colour a digit has."""
    for thing in scene.things:
        if thing.is_digit:
            question = f"what digit is {thing.colour}?"
            yield Asked(question, thing.name, "reading", "digit", (thing,))
            question = f"what color is the digit {thing.name}?"
            yield Asked(question, thing.colour, "reading", "color", (thing,))


def place(scene: Scene) -> Iterator[Asked]:
    """In which row or column of cells an object is."""
    for thing in named(scene):
        for line, number in (("row", thing.row), ("column", thing.column)):
            if number < len(COUNTS):
                question = f"which {line} is the {thing.colour} {thing.name} in?"
                yield Asked(question, COUNTS[number], "place", line, (thing,))


FAMILIES: dict[str, Callable[[Scene], Iterator[Asked]]] = {
    "attribute": attribute,
    "existence": existence,
    "count": count,
    "relation": relation,
    "reading": reading,
}
TAUGHT = {**FAMILIES, "place": place}
"""What training asks: before a model can say that one object is left of another, it has to know
where each is, which it learns much sooner if it is asked."""
WORDS = (*SHAPES, *COLOURS, *DIGITS, *SIZES, *COUNTS, "yes", "no")
"""What a model has to be able to say and to read."""


def questions_of(
    split: str, scenes: int, each: int = 1, dials: Dials | None = None, seed: int = 0
) -> list[tuple[Scene, list[Asked]]]:
    """The first scenes of a split with `each` questions of every family about each, as far as there
    are any.

    Of a scene's questions that are asked whose answer was the rarest so far among those of their
    kind, so that no answer is likelier than another.
    """
    said: Counter[tuple[str, str, str]] = Counter()
    asked_kinds: Counter[tuple[str, str]] = Counter()
    out = []
    for number in range(scenes):
        scene = make_scene(split, number, dials, seed)
        dice, asked = Dice(seed, number, len(split)), []
        for family, make in FAMILIES.items():
            candidates = dice.shuffled(list(make(scene)))
            for _ in range(min(each, len(candidates))):
                best = min(
                    candidates,
                    key=lambda one: (
                        asked_kinds[one.family, one.kind],
                        said[one.family, one.kind, one.answer],
                    ),
                )
                candidates.remove(best)
                asked.append(best)
                asked_kinds[family, best.kind] += 1
                said[family, best.kind, best.answer] += 1
        out.append((scene, asked))
    return out


def scenes_task(
    dials: Dials | None = None, split: str = "test", scenes: int = SCENES, each: int = 1
) -> Task:
    """Questions about the scenes of a split, scored by exact match."""
    dials = dials or Dials()
    examples = [
        Example(
            image=scene.pixels,
            question=asked.question,
            answer=asked.answer,
            id=f"scenes-{split}-{scene.number}-{number}",
            image_id=scene.number,
            family=asked.family,
            needed=asked.boxes(scene),
        )
        for scene, questions in questions_of(split, scenes, each, dials)
        for number, asked in enumerate(questions)
    ]
    return Task(
        name="scenes",
        examples=tuple(examples),
        score=exact_match,
        prompt=QUESTION,
        source={"split": split, "scenes": scenes, "each": each, **dataclasses.asdict(dials)},
    )


def drawn(dice: Dice, scene: Scene, families: Iterable[str]) -> list[Asked]:
    """A question of each of the families (see `TAUGHT`), for training: kind and answer are drawn
    first, evenly of those that the scene has.
    """
    out = []
    for family in families:
        candidates = list(TAUGHT[family](scene))
        for name in ("kind", "answer"):
            values = sorted({getattr(one, name) for one in candidates})
            if values:
                value = dice.pick(values)
                candidates = [one for one in candidates if getattr(one, name) == value]
        if candidates:
            out.append(dice.pick(candidates))
    return out
