"""The last stage of both recipes on scenes: what a frozen encoder makes of them, and questions."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Int

from catp_jax.struct import pytree
from catp_jax.training.scene_lists import FIRST, LISTS, listed
from catp_jax.training.scene_questions import TAUGHT, Asked, drawn
from catp_jax.training.scenes import Dice, Scene
from catp_jax.training.turns import Turn

SCENES, EACH = 16, 8  # scenes in a step, and questions about each
FIRSTS = 0.95  # the share of the rows that are lists of the easiest sort, at the very first

Asking = list[list[Sequence[Turn]]]
"""The rows of text about each of some scenes."""


@dataclasses.dataclass(frozen=True)
class Mix:
    """What training asks: how often each family (as `TAUGHT` has them), and which share of the rows
    are lists, each at first and at last. Up to the share `looking` of the steps there are lists of
    the easiest sort too, nearly alone at first; those of attributes stay among the others.
    """

    easy: tuple[float, ...] = (3.0, 3.0, 1.0, 1.0, 3.0, 3.0)
    hard: tuple[float, ...] = (1.0, 2.0, 2.5, 3.0, 1.0, 0.5)
    lists: tuple[float, float] = (0.6, 0.2)
    looking: float = 0.0


USUAL = Mix()


@pytree
class Rows:
    """Questions about some scenes as tokens, `q` about each; `targets` is what each row should say,
    -1: anything. A decoder of its own (T5's) has `decoder_tokens`.
    """

    tokens: Int[Array, "i q s"]
    token_valid: Bool[Array, "i q s"]
    targets: Int[Array, "i q t"]
    decoder_tokens: Int[Array, "i q t"] | None = None


@pytree
class SceneBatch:
    """What an encoder makes of scenes, and questions about them. `labels` are what words should
    know, where training says so.
    """

    features: Float[Array, "i n d"]
    rows: Rows
    labels: dict[str, Int[Array, "i q s"]] | None = None


class Bank:
    """Scenes with what a frozen encoder makes of them, and batches of questions about them."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        encode: Callable[[Sequence[Scene]], Array],
        rows: Callable[[Asking, int], Rows],
        label: Callable[[Sequence[Scene], Asking, Rows], dict[str, Array]] | None = None,
    ) -> None:
        """`encode` gives the features of some scenes, `rows` makes tokens of text, so many rows for
        each; `label` gives what words should know, if there is any.
        """
        made = [
            np.asarray(encode(scenes[start : start + SCENES]), np.float16)
            for start in range(0, len(scenes), SCENES)
        ]
        self.scenes, self.rows, self.label = scenes, rows, label
        self.features: Float16[np.ndarray, "scenes n d"] = np.concatenate(made)

    def batch(self, numbers: Any, asked: Asking) -> SceneBatch:
        """These rows about the scenes of these numbers."""
        rows, labels = self.rows(asked, max(map(len, asked))), None
        if self.label is not None:
            some = [self.scenes[number] for number in np.arange(len(self.scenes))[numbers]]
            labels = self.label(some, asked, rows)
        features = jnp.asarray(self.features[numbers].astype(np.float32))
        return SceneBatch(features=features, rows=rows, labels=labels)

    def draw(
        self, step: int, steps: int, seed: int, mix: Mix = USUAL, scenes: int = SCENES
    ) -> SceneBatch:
        """Batch number `step` of `steps`, with so many `scenes`: what is easy fades out."""
        rng = np.random.default_rng((seed, step))
        share = step / steps
        weights = (1 - share) * np.array(mix.easy) + share * np.array(mix.hard)
        of_easiest = FIRSTS * (1 - share / mix.looking) if mix.looking else 0.0
        of_lists = (1 - share) * mix.lists[0] + share * mix.lists[1]
        lists = [*LISTS, "attribute"] if mix.looking else list(LISTS)
        numbers = rng.integers(len(self.scenes), size=scenes)
        asked: Asking = []
        for number in numbers.tolist():
            dice, scene = Dice(seed, step, number), self.scenes[number]
            some: list[Sequence[Turn]] = []
            while len(some) < EACH:
                is_first = of_easiest > 0 and rng.random() < of_easiest
                if is_first or rng.random() < of_lists:
                    turns = listed(dice, scene, rng.choice(list(FIRST) if is_first else lists))
                    some += [turns] if turns else []
                else:
                    family = rng.choice(list(TAUGHT), p=weights / weights.sum())
                    some += [[(one.question, one.answer)] for one in drawn(dice, scene, [family])]
            asked.append(some)
        return self.batch(numbers, asked)


def judge(
    answered: Callable[[SceneBatch], Float[Array, "i q"]], bank: Bank, asked: list[list[Asked]]
) -> list[np.ndarray]:
    """How right each image's questions are answered. `answered` says it of a batch."""
    right = []
    for start in range(0, len(asked), SCENES):
        some = asked[start : start + SCENES]
        numbers = slice(start, start + len(some))
        turns: Asking = [[[(one.question, one.answer)] for one in each] for each in some]
        found = np.asarray(jax.device_get(answered(bank.batch(numbers, turns))))
        right += [row[: len(each)] for row, each in zip(found, some, strict=True)]
    return right


def evaluate(
    answered: Callable[[SceneBatch], Float[Array, "i q"]], bank: Bank, asked: list[list[Asked]]
) -> dict[str, float]:
    """The share of right answers by family and, within one, by kind, see `judge`."""
    right = defaultdict(list)
    for questions, row in zip(asked, judge(answered, bank, asked), strict=True):
        for one, is_right in zip(questions, row, strict=True):
            right[one.family].append(is_right)
            right[f"{one.family}, {one.kind}"].append(is_right)
    return {name: round(float(np.mean(some)), 4) for name, some in sorted(right.items())}


def texts_about(scenes: Sequence[Scene]) -> Iterator[str]:
    """All questions about some scenes with their answers, to train a tokenizer on."""
    for scene in scenes:
        for make in TAUGHT.values():
            yield from (f"{one.question} {one.answer}" for one in make(scene))
        for kind in LISTS:
            turns = listed(Dice(scene.number), scene, kind)
            yield " ".join(f"{words} {answer}" for words, answer in turns)
