"""What words learn to know in training, so that a BLIP-2 learns relations.

    is the red circle left of the blue cross?
                    1                   1 2 3 4

Words that name an object know (1) in which row and column it is, a layer later (2) where the object
named before is and how the question goes on from there ("left"), then (3) on which side of it this
one is and what is nearest to it, and at last (4) whether the question is right. Words for colours
and shapes know how many objects are so. Heads read that off the layers' states and are dropped
after. In lists it is the same, also where the answers are about the object named first.

A T5 answers lists (`scene_lists`) by words that its decoder reads, and questions by its encoder's:
there, without this, training finds no word that knows a place. The end of its question knows the
answer, too, which the language model's head reads. An OPT reads lists and questions alike, but from
lists alone it did not learn what is nearest. With all this it did, and confused large and small,
until its words also had to know (3) colour and name, and more questions were about attributes.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from catp_jax.models.blip2 import Blip2
from catp_jax.models.opt import Opt
from catp_jax.models.t5 import T5, buckets
from catp_jax.training.blip2_data import Text
from catp_jax.training.loop import Figures
from catp_jax.training.scene_answers import told
from catp_jax.training.scene_bank import Asking, Rows, SceneBatch
from catp_jax.training.scene_questions import COUNTS, plural, relation
from catp_jax.training.scenes import COLOURS, DIGITS, SHAPES, SIZES, Scene, Thing
from catp_jax.training.scoring import answer_loss

SIDES = ("left", "right", "above", "below")
NAMES = (*SHAPES, *DIGITS)
MANY = len(COUNTS)  # and more are not told apart
CHOICES = {
    "row": 4,
    "column": 4,
    "row before": 4,
    "column before": 4,
    "down": 3,
    "right": 3,
    "nearest": len(COLOURS),
    "number": 1 + MANY,
    "asked": len(SIDES),
    "right so": 2,
    "colour": len(COLOURS),
    "name": len(NAMES),
}
"""What a word may know of what it names, and how many answers there are."""
LOOK = ("colour", "name")  # known to an OPT's words alone
LAYER = {"row": 3, "column": 3, "row before": 4, "column before": 4, "asked": 4, "right so": 6}
"""After how many layers it should know it, the others after five; in an OPT, whose last layer has
to answer, one earlier.
"""
WEIGHT = 0.5  # of each of these, beside the answers
SLOPE, AWAY = 0.5, 6.0  # what a token further costs at the start, and the other direction

Labels = dict[str, Int[Array, "i q s"]]


def labels_of(text: Text) -> Callable[[Sequence[Scene], Asking, Rows], Labels]:
    """What each word of some rows should know, -1: nothing; "answer" is a token."""
    words = (*COLOURS, *SHAPES, *map(plural, SHAPES), *DIGITS, *SIZES)
    tokens = {word: text.words(word) for word in words}

    def spelled(named: dict[tuple[str, ...], Any]) -> dict[tuple[int, ...], Any]:
        return {
            tuple(token for word in words for token in tokens[word]): meant
            for words, meant in named.items()
        }

    def labels(scenes: Sequence[Scene], asked: Asking, rows: Rows) -> Labels:
        read, valid, targets = map(np.asarray, (rows.tokens, rows.token_valid, rows.targets))
        out = {name: np.full(read.shape, -1, np.int32) for name in (*CHOICES, "answer")}
        for image, (scene, some) in enumerate(zip(scenes, asked, strict=True)):
            called, numbers = spelled(names(scene)), spelled(amounts(scene))
            nearest = {
                one.needed[0]: one.answer for one in relation(scene) if one.kind == "nearest"
            }
            for row, turns in enumerate(some):
                line = read[image, row].tolist()
                for place, number in named_in(line, numbers):
                    out["number"][image, row, place] = number
                before, last, at = None, None, -1
                for at, thing in named_in(line, called):
                    if thing is not last:
                        before, last = last, thing
                    for name, label in known(thing, before, nearest.get(thing)):
                        out[name][image, row, at] = label
                if len(turns) == 1:
                    end = valid[image, row].sum() - 1
                    out["answer"][image, row, end] = targets[image, row, 0]
                    for side in asked_for(turns[0][0]) if before else ():
                        out["asked"][image, row, at] = side
                        out["right so"][image, row, at] = turns[0][1] == "yes"
        return {name: jnp.asarray(array) for name, array in out.items()}

    return labels


def asked_for(question: str) -> Iterator[int]:
    """The number of the side that a question is about, if it is about one."""
    yield from (number for number, side in enumerate(SIDES) if side in question.split())


def names(scene: Scene) -> dict[tuple[str, ...], Thing]:
    """The words, one or two, that tell an object from all others."""
    called = [
        (words, thing)
        for thing in scene.things
        for words in (
            (thing.colour,),
            (thing.name,),
            (thing.colour, thing.name),
            (thing.size, thing.colour),
            (thing.size, thing.name),
        )
    ]
    often = Counter(words for words, _ in called)
    return {words: thing for words, thing in called if often[words] == 1}


def amounts(scene: Scene) -> dict[tuple[str, ...], int]:
    """How many objects there are of each colour and shape."""
    often = Counter(look for thing in scene.things for look in (thing.colour, thing.name))
    said = {look: look for look in (*COLOURS, *SHAPES)} | {plural(name): name for name in SHAPES}
    return {(word,): min(often[look], MANY) for word, look in said.items()}


def named_in(
    tokens: Sequence[int], called: dict[tuple[int, ...], Any]
) -> Iterator[tuple[int, Any]]:
    """Where in a row the words for something end, and what it is; more words come before fewer."""
    longest = max(map(len, called), default=0)
    for end in range(1, len(tokens) + 1):
        words = (tuple(tokens[start:end]) for start in range(max(0, end - longest), end))
        thing = next((called[some] for some in words if some in called), None)
        if thing is not None:
            yield end - 1, thing


def known(thing: Thing, before: Thing | None, nearest: str | None) -> Iterator[tuple[str, int]]:
    """What is to be known of an object, and the number of the right answer."""
    yield "row", thing.row
    yield "column", thing.column
    yield "colour", [*COLOURS].index(thing.colour)
    yield "name", NAMES.index(thing.name)
    if before is not None:
        yield "row before", before.row
        yield "column before", before.column
        yield "down", int(np.sign(thing.row - before.row)) + 1
        yield "right", int(np.sign(thing.column - before.column)) + 1
    if nearest is not None:
        yield "nearest", [*COLOURS].index(nearest)


def look_along(language: T5) -> None:
    """Starts an encoder in which one head looks at the words before, and another at those behind.

    A bias for each distance grows in small steps from nothing. Without this, an object's words hear
    for very long of what is seen alone, and not that "left" stands in front of them.
    """
    bias: Any = language.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.embedding
    bucket_of = buckets(language.config, is_bidirectional=True)
    number = language.config.relative_attention_num_buckets // 2
    near = -SLOPE * np.searchsorted(bucket_of, np.arange(number)).astype(np.float32)
    table = np.zeros(bias.shape, np.float32)
    for head, (before, behind) in enumerate(((0, AWAY), (AWAY, 0))):
        table[:number, head], table[number:, head] = near - before, near - behind
    bias[...] += jnp.asarray(table)


def word_heads(language: Opt | T5) -> dict[str, Float[Array, "d choices"]]:
    """What reads off a word what it knows."""
    width, left_out = language.config.hidden_size, LOOK if isinstance(language, T5) else ()
    return {
        name: jnp.zeros((width, choices))
        for name, choices in CHOICES.items()
        if name not in left_out
    }


def words_loss(
    model: Blip2, heads: dict[str, Float[Array, "d choices"]], batch: SceneBatch
) -> tuple[Float[Array, ""], Figures]:
    """The answers' tokens, and what words should know of the objects that they name."""
    logits, words = told(model, batch)
    total, figures = answer_loss(logits, batch.rows.targets)
    labels: Any = batch.labels
    language = model.language_model
    earlier = 0 if isinstance(language, T5) else 1
    for name, head in heads.items():
        layer = min(LAYER.get(name, 5) - earlier, len(words))
        loss, figures[name] = _known(words[layer - 1] @ head, labels[name])
        total += WEIGHT * loss
    if isinstance(language, T5):
        ends = labels["answer"].max(axis=2)
        at = labels["answer"].argmax(axis=2)[..., None, None]
        said = language.logits(jnp.take_along_axis(words[-1], at, axis=2)[:, :, 0])
        loss, figures["answer"] = _known(said, ends)
        total += loss
    return total, figures


def _known(
    logits: Float[Array, "*words choices"], labels: Int[Array, "*words"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The loss and the share of right answers, of words that should know any."""
    is_asked = (labels >= 0).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    is_right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
    often = jnp.maximum(is_asked.sum(), 1)
    return (losses * is_asked).sum() / often, (is_right * is_asked).sum() / often
