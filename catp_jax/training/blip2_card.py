"""The README beside a mini BLIP-2, its figures from the run itself."""

import textwrap
from typing import Any

from catp_jax.models.blip2 import Blip2Config
from catp_jax.models.opt import OptConfig

CARD = """# Mini BLIP-2 {kind}

A BLIP-2 of {millions:.1f} million parameters (`blip-2` in `transformers`), trained from random
weights on [easy-VQA](https://pypi.org/project/easy-vqa) (Victor Zhou, MIT): one coloured shape on a
plain background, 13 answers. It is there to try and test pruning on trained weights and real
images; it knows nothing else.

{build}

## Accuracy on the {questions:,} test questions

| | |
|---|---|
| all | {accuracy} |
| yes/no | {yes_no} |
| shape | {shape} |
| colour | {colour} |
| all, asked as "{wording}" | {worded} |
| all, with the queries zeroed | {zeroed} |
| without looking: the commonest training answer to each question | {blind} |

## Training

    make train

or, in an environment with `catp-jax[demo]`,

    python -m catp_jax.training.mini_blip2 --kind {which} --out mini-blip2-{which} --seed {seed}

{minutes:.0f} minutes of steps; a run that is cut off resumes when started again. Figures are in
`training_log.jsonl`, the last line is the test. Stages:

1. *tower*, {tower}: every patch names the shape and the colour that cover it, or
   "background"; the class token those of the image.
2. *qformer*, {qformer} on the frozen tower: every query's last state is scored for the shape and
   the colour of the image. One loss takes the mean of all queries' scores and another the best
   query's, as image-text matching and contrast do in BLIP-2's own first stage.
3. *reader*, {reader}, on the frozen Q-Former: the language model
   and the projection before it learn to answer questions without "no" or "not". They start where a
   query looks like the words for what it has seen.
4. *answers*, {answers}: all questions.{moved}

The first two are the same run for both kinds. Training images are composed: the shape of one
training image in the colours of another, at a random place. Labels come from the training
questions. Questions are drawn so that every answer to a question comes about equally often, "what"
questions less often than "is there"; a quarter are put in the words of the BLIP-2 paper.
"""


PLACES = """
5. *places*, {steps} steps: the table of positions is set to zero and left there, and the rest
   learns to do without. An OPT trained on texts knows them at all positions; this one would know
   its questions at a single place, from which pruning moves them away. The stage was added after
   that had been seen: before it every method, random too, lost about half of the answers alike."""


def card(
    config: Blip2Config,
    figures: dict[str, Any],
    options: dict[str, Any],
    parameters: int,
    wording: str,
    each: int,
) -> str:
    """The README's text, from a run's figures and options."""
    text, vision, qformer = config.text, config.vision, config.qformer
    if isinstance(text, OptConfig):
        which, kind = "opt", "OPT"
        language = f"an OPT of {text.num_hidden_layers} layers"
        moved = PLACES.format(steps=options["places_steps"])
    else:
        which, kind, moved = "t5", "T5", ""
        language = f"a T5 of {text.num_layers} encoder and {text.num_decoder_layers} decoder layers"
    build = (
        f"A {vision.image_size}×{vision.image_size} image is {vision.tokens} tokens of a ViT of "
        f"{vision.num_hidden_layers} layers. {config.num_query_tokens} queries read them in "
        f"{len(qformer.cross_layers)} of the Q-Former's {qformer.num_hidden_layers} layers, every "
        f"second one. The language model is {language}."
    )
    return CARD.format(
        seed=options["seed"],
        tower=f"{options['tower_steps']} steps of {options['batch'] // 2} images",
        qformer=f"{options['qformer_steps']} steps",
        reader=f"{options['reader_steps']} steps of {options['batch']} questions, {each} an image",
        answers=f"{options['answers_steps']} steps",
        which=which,
        moved=moved,
        kind=kind,
        build=textwrap.fill(build, 100),
        millions=parameters / 1e6,
        wording=wording.format("…"),
        questions=figures["questions"],
        minutes=figures["minutes of training"],
        accuracy=percent(figures["accuracy"]),
        yes_no=percent(figures.get("accuracy yes/no")),
        shape=percent(figures.get("accuracy shape")),
        colour=percent(figures.get("accuracy colour")),
        worded=percent(figures["accuracy in the paper's wording"]),
        zeroed=percent(figures["accuracy with the queries zeroed"]),
        blind=percent(figures["accuracy blind"]),
    )


def percent(share: float | None) -> str:
    """A share in percent; a dash where there was nothing to count."""
    return "–" if share is None else f"{100 * share:.2f} %"
