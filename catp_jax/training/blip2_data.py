"""Batches of easy-VQA for BLIP-2: one image of fixed size, labels for its patches, questions.

A batch is a pure function of (seed, step), so a run that resumes at a step sees what an
uninterrupted one would have seen.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from catp_jax.models.blip2 import Blip2Inputs
from catp_jax.models.vit import VitConfig
from catp_jax.struct import pytree
from catp_jax.study.tasks import Example
from catp_jax.training.photos import (
    Pairs,
    Photos,
    by_image,
    dense_weights,
    normalise,
    put_together,
    read_image,
)
from catp_jax.training.turns import Turn, line

PAPERS_PROMPT = "Question: {} Short answer:"
PAPERS_WORDING = 0.25  # share of training questions in the wording of the BLIP-2 paper
OPEN = 0.25  # how much less often than rarity says a "what" is asked: those are learned at once
TEXT_LENGTH = 20  # the longest question in that wording, its answer and the marks around them
ANSWER_LENGTH = 3  # of a decoder's row: its first token, the answer, a single word, and the end


@pytree
class LookBatch:
    """Images of one shape each, and where it is.

    `covered` says which image tokens it covers. `weights` of an image sum to one, half of it on the
    shape; patches at its edge have none.
    """

    pixels: Float[Array, "i c height width"]
    shapes: Int[Array, " i"]
    colours: Int[Array, " i"]
    covered: Int[Array, "i n"]
    weights: Float[Array, "i n"]


@pytree
class AskBatch:
    """Prompts and, of every row of logits that text has, the token it should say (-1: any)."""

    inputs: Blip2Inputs
    decoder_tokens: Int[Array, "b t"] | None
    targets: Int[Array, "b rows"]


def coverage(
    matte: Float[np.ndarray, "height width"], config: VitConfig
) -> Float[np.ndarray, "one n"]:
    """Mean of an image-sized matte over every patch; 0 for the class token."""
    grid, patch = config.grid, config.patch_size
    means = matte.reshape(grid, patch, grid, patch).mean(axis=(1, 3)).reshape(1, -1)
    return np.pad(means, ((0, 0), (1, 0)))


@dataclasses.dataclass(frozen=True)
class Text:
    """Turns questions and answers into rows of tokens.

    `prompt · answer · end` in one row; where there is a decoder (`start` is its first token), the
    prompt alone, and `start · answer · end` for the decoder. A list is `words · answer · words …`;
    there the prompt has all words, and the decoder's row the whole list. `encode` marks the prompt
    as the tokenizer does; `encode_word` adds no mark.
    """

    encode: Callable[[str], list[int]]
    encode_word: Callable[[str], list[int]]
    end: int
    padding: int
    start: int | None

    def answer(self, answer: str) -> list[int]:
        """The answer as a word after the question."""
        tokens = self.words(answer)
        if len(tokens) != len(answer.split()):
            raise ValueError(f"a word is one token, but {answer!r} has {len(tokens)}")
        return tokens

    def words(self, text: str) -> list[int]:
        """Words after others."""
        return self.encode_word(text if self.start is not None else f" {text}")

    def rows(
        self,
        asked: list[list[Sequence[Turn]]],
        each: int,
        length: int = TEXT_LENGTH,
        answer: int = ANSWER_LENGTH,
    ) -> list[np.ndarray]:
        """Tokens, which of them are any, targets, and the decoder's tokens: [images, each, …], rows
        of `length` tokens, a decoder's of `answer`; images with fewer rows have empty ones.
        """
        shape, start = (len(asked), each), self.start
        tokens = np.full((*shape, length), self.padding, np.int32)
        valid = np.zeros(tokens.shape, bool)
        decoder = np.full((*shape, answer), self.padding, np.int32)
        targets = np.full((*shape, length if start is None else answer), -1, np.int32)
        for image, questions in enumerate(asked):
            for row, turns in enumerate(questions):
                if start is None:
                    prompt, follows = line(
                        turns, self.encode, self.words, self.answer, self.end, length
                    )
                else:
                    prompt = self.encode(asked_for := " ".join(words for words, _ in turns))
                    if len(prompt) > length:
                        raise ValueError(f"{asked_for!r} takes {len(prompt)} tokens of {length}")
                    said = turns if len(turns) > 1 else [("", turns[0][1])]
                    reply, follows = line(
                        said,
                        lambda text: [start, *self.words(text)],
                        self.words,
                        self.answer,
                        self.end,
                        answer,
                    )
                    decoder[image, row, : len(reply)] = reply
                tokens[image, row, : len(prompt)] = prompt
                valid[image, row, : len(prompt)] = True
                targets[image, row, : len(follows)] = follows
        return [tokens, valid, targets, decoder]

    def batch(
        self, pixels: Float[np.ndarray, "i c height width"], asked: list[Pairs], each: int
    ) -> AskBatch:
        """One batch, `each` questions an image; images with fewer have empty rows."""
        turns: list[list[Sequence[Turn]]] = [[(pair,) for pair in pairs] for pairs in asked]
        tokens, valid, targets, decoder = (
            jnp.asarray(array.reshape(-1, array.shape[-1])) for array in self.rows(turns, each)
        )
        inputs = Blip2Inputs(
            pixels=jnp.asarray(pixels),
            image_index=jnp.asarray(np.repeat(np.arange(len(asked), dtype=np.int32), each)),
            tokens=tokens,
            token_valid=valid,
        )
        return AskBatch(
            inputs=inputs,
            decoder_tokens=None if self.start is None else decoder,
            targets=targets,
        )


class Composer(Photos):
    """Makes training batches out of photos. Every method is a function of its arguments alone."""

    def __init__(self, examples: Iterable[Example], config: VitConfig, seed: int):
        super().__init__(examples, seed)
        for pair in self.rarity:
            if pair[1] not in ("yes", "no"):
                self.rarity[pair] *= OPEN
        self.config, self.size = config, (config.image_size, config.image_size)

    def looks(self, step: int, size: int) -> LookBatch:
        """Batch number `step`: any shape in any colours."""
        rng = np.random.default_rng((self.seed, 0, step))
        rows = []
        for _ in range(size):
            shape, colour, cut, colours = self.any_look(rng)
            canvas, matte = put_together(rng, cut.matte, colours, self.size)
            covered, weights = dense_weights(coverage(matte, self.config), 1)
            rows.append((normalise(canvas), shape, colour, covered[0], weights[0]))
        pixels, shapes, colours, covered, weights = (np.stack(c) for c in zip(*rows, strict=True))
        return LookBatch(
            pixels=jnp.asarray(pixels),
            shapes=jnp.asarray(shapes.astype(np.int32)),
            colours=jnp.asarray(colours.astype(np.int32)),
            covered=jnp.asarray(covered.astype(np.int32)),
            weights=jnp.asarray(weights),
        )

    def questions(self, step: int, size: int, each: int, text: Text, is_plain: bool) -> AskBatch:
        """Batch number `step`: photos' questions beside another image of the same answers."""
        rng = np.random.default_rng((self.seed, 1, step))
        pixels, asked = [], []
        for _ in range(size):
            photo, cut, colours = self.same_look(rng, is_plain)
            pixels.append(normalise(put_together(rng, cut.matte, colours, self.size)[0]))
            pairs = self.ask(rng, photo, each, is_plain)
            asked.append([(_worded(rng, question), answer) for question, answer in pairs])
        return text.batch(np.stack(pixels), asked, each)


def _worded(rng: np.random.Generator, question: str) -> str:
    return PAPERS_PROMPT.format(question) if rng.random() < PAPERS_WORDING else question


def evaluation_batches(
    examples: Iterable[Example], text: Text, size: int, wording: str = "{}"
) -> list[AskBatch]:
    """Every example as it is, `size` images a batch, questions put into `wording`; the last batch
    repeats none, it has fewer questions.
    """
    groups = by_image(examples)
    each = max(len(group) for group in groups)
    batches = []
    for start in range(0, len(groups), size):
        part = groups[start : start + size]
        pixels = np.stack([normalise(read_image(group[0])) for group in part])
        asked = [[(wording.format(e.question), e.answer) for e in group] for group in part]
        spare = size - len(part)
        pixels = np.pad(pixels, ((0, spare), (0, 0), (0, 0), (0, 0)))
        batches.append(text.batch(pixels, asked + [[]] * spare, each))
    return batches
