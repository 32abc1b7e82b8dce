"""A small model guides a large one, and answers for it what it is sure of.

    images, prompts ─ guide, watched ─ answers ─ sure? ─ yes: that is the answer
                                                  └ no: the large model, on `keep` visual tokens

Source: Zhao et al., "A Stitch in Time Saves Nine: Small VLM is a Precise Guidance for Accelerating
Large VLMs", arXiv 2412.03324: the guidance, see `pruning.sgl`, and "Small VLM Early Exiting" as the
released code computes it, the end token of an answer being one of its tokens:

    confidence   geometric mean of the probabilities that the guide wrote its answer's tokens with
    consistency  probability of the whole answer (the product, without a root) if the guide sees
                 only the 5 % of the visual tokens that it attended to most, from its first layer on
    score        ½ (confidence + consistency): the guide's answer counts if it is above `threshold`

A guide of the kind Llama 3.2 Vision reads the prompt up to its first cross-attention layer with all
visual tokens, also for the consistency. Of sampled answers the confidence is by the probabilities
that they were drawn with.

Both models must have the same visual tokens, so both must process images alike. Queries of two
Q-Formers are as many, but need not look at the same things: whether those of one BLIP-2 can guide
another is for a study to say.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from catp_jax.answers import Answers
from catp_jax.contract import Site, settle
from catp_jax.generation.buckets import TEXT_LENGTHS, TOKEN_COUNTS, round_up
from catp_jax.model import Model
from catp_jax.pruning import budget
from catp_jax.pruning.sgl import SGL, Watch, received
from catp_jax.readers.images import ImageLike
from catp_jax.readers.packing import Packed
from catp_jax.readers.reading import ImageCache, Prompt, Question

CONSISTENT = "5%"
"""The share of the visual tokens with which the guide must still find its answer likely."""


@dataclasses.dataclass(frozen=True)
class Guided:
    """What a batch of prompts got: `text` has one answer a prompt.

    `asked` are the numbers of the prompts that went to the large model: `large` has their answers
    in this order, and behind them copies of the first one, which fill up the batch; None if none
    went. `guide` has the guide's own answers to all prompts. `scores` say how sure it was of each,
    from 0 to 1; None unless there was a threshold.
    """

    text: list[str]
    asked: list[int]
    scores: list[float] | None
    guide: Answers
    large: Answers | None

    @property
    def is_guides(self) -> list[bool]:
        """Of each prompt whether its answer is the guide's."""
        return [number not in self.asked for number in range(len(self.text))]


def guided(
    model: Model,
    guide: Model,
    images: Sequence[ImageLike | Sequence[ImageLike] | None] | None,
    prompts: Sequence[Prompt],
    *,
    keep: int | str,
    layer: int | None = None,
    threshold: float | None = None,
    pruners: Sequence[Any] = (),
    **options: Any,
) -> Guided:
    """Answers each prompt about its images with `model`, on the `keep` visual tokens (a count or a
    percentage) that `guide` attends to most; above `threshold` with the guide alone.

    `layer` is SGL's, for a model with visual tokens in its sequence; `pruners` are further methods
    for it. The options are for both models, and what is not given is as their own defaults have it,
    but for one answer a prompt. No threshold: the large model answers everything; at 1 it does,
    too, and there are scores (see `exit_curve`).

    Raises ValueError for input that cannot be used, for a guide with other visual tokens, a
    threshold outside of 0 to 1, and several answers a prompt.
    """
    options = {"num_return_sequences": 1, **options}
    method = SGL(keep=1) if layer is None else SGL(keep=1, layer=layer)
    _check(model, guide, keep, threshold, options)
    settle((Watch(),), guide.sites)
    settle((method, *pruners), model.sites)

    cache: ImageCache = {}  # of both: they process images alike
    small, large = (
        one.questions(
            images,
            prompts,
            max_new_tokens=one.defaults.over(**options).max_new_tokens,
            cache=cache,
        )
        for one in (guide, model)
    )
    packed = guide.pack(small)
    budget.check([keep], packed.most)
    noted = {**options, "logprobs": options.get("logprobs") or 0}
    first = guide.generate_packed(packed, [Watch()], **noted)
    looks = np.asarray(received(first.reports[0], packed.capacity))

    scores, asked = None, [*range(len(small))]
    if threshold is not None:
        scores = _scores(guide, packed, small, first, looks)
        asked = [number for number in asked if not scores[number] > threshold]
    text, answers = [*first.text], None
    if asked:
        room = min(round_up(len(asked), TOKEN_COUNTS), len(small))
        rows = [*asked, *asked[:1] * (room - len(asked))]  # few sizes, so few programs
        chosen = model.pack([large[row] for row in rows])
        sgl = _kept(chosen, keep, looks[rows], layer=method.layer)
        answers = model.generate_packed(chosen, [*sgl, *pruners], **options)
        for row, answer in zip(asked, answers.text, strict=False):
            text[row] = answer
    return Guided(text=text, asked=asked, scores=scores, guide=first, large=answers)


def _kept(packed: Packed[Any], keep: int | str, looks: np.ndarray, **where: Any) -> list[SGL]:
    """The method for a batch of which the visual tokens received `looks`; none without an image."""
    if not packed.capacity:
        return []
    limit = jnp.asarray([budget.count(keep, number) for number in packed.available], jnp.int32)
    most = budget.count(keep, packed.capacity)
    return [SGL(keep=most, limit=limit, scores=jnp.asarray(looks), **where)]


def _scores(
    guide: Model,
    packed: Packed[Any],
    questions: Sequence[Question[Any]],
    first: Answers,
    looks: np.ndarray,
) -> list[float]:
    """How sure the guide is of each of its answers."""
    assert first.logprobs is not None  # noqa: S101
    answered = [  # its very tokens: those of the text could be others
        dataclasses.replace(question, tokens=[*question.tokens, *tokens])
        for question, tokens in zip(questions, first.tokens, strict=True)
    ]
    site = Site.ENTRY if Site.ENTRY in guide.sites else None
    method = _kept(packed, CONSISTENT, looks, site=site)
    again = guide.likelihoods(questions, answered, method)
    return [
        float(np.exp(np.mean(written)) + np.exp(one.total)) / 2
        for written, one in zip(first.logprobs, again, strict=True)
    ]


def _check(
    model: Model, guide: Model, keep: int | str, threshold: Any, options: dict[str, Any]
) -> None:
    """Raises ValueError for what needs no image to be refused."""
    budget.parse(keep)
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(
            f"threshold is 0 (the guide answers everything) to 1 (nothing), got {threshold}"
        )
    if (several := options["num_return_sequences"]) != 1:
        raise ValueError(f"a guided prompt has one answer; got num_return_sequences={several}")
    own, wanted = _tokens_of(guide), _tokens_of(model)
    wrong = [
        f"{name}: {own.get(name)}, not {wanted.get(name)}"
        for name in {**wanted, **own}
        if own.get(name) != wanted.get(name)
    ]
    if wrong:
        raise ValueError(
            "the guide sees other visual tokens than the large model, so it cannot say which of "
            f"those to keep ({'; '.join(wrong)}); take a smaller model of the same family"
        )


def _tokens_of(model: Model) -> dict[str, Any]:
    """What decides which visual tokens an image becomes."""
    reader = model.reader
    _, number = reader.abstract_inputs(reader.config, 1, TEXT_LENGTHS[0], None)
    processing = reader.processor.image_processor.to_dict()
    seen = dataclasses.asdict(reader.seen)
    return {"visual tokens of an image": number, **processing, **seen}


@dataclasses.dataclass(frozen=True)
class Exit:
    """What comes of a threshold: the share of prompts that the guide answers, and the accuracy."""

    threshold: float
    share: float
    accuracy: float


def exit_curve(
    scores: Sequence[float],
    guide_right: Sequence[float],
    large_right: Sequence[float],
) -> list[Exit]:
    """Every threshold that makes a difference, from 0, where the guide answers all, to the highest
    score, where it answers none. How right the two models' answers are is a number for each prompt.

    Raises ValueError if there are not as many of each.

        exit_curve([.9, .2], [1, 0], [1, 1])
        # threshold 0: all exit, half right; .2: the first exits, both right; .9: none exits
    """
    of, guides, larges = (np.asarray(some, float) for some in (scores, guide_right, large_right))
    if not len(of) == len(guides) == len(larges) or not len(of):
        raise ValueError(
            "a score, and how right either model is, are wanted for each prompt; got "
            f"{len(of)}, {len(guides)} and {len(larges)}"
        )
    curve = []
    for threshold in np.unique([0.0, *of]):
        exits = of > threshold
        right = np.where(exits, guides, larges)
        curve.append(Exit(float(threshold), float(exits.mean()), float(right.mean())))
    return curve
