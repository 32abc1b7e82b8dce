"""Trains the two mini BLIP-2s that ship with the package, from nothing, on easy-VQA.

    python -m catp_jax.training.mini_blip2 --out DIR --kind opt --seed 0

BLIP-2's own two stages with easy-VQA's labels in place of captions, after a stage for the image
encoder, which the large models take ready-made:

1. tower: every patch names the shape and the colour that cover it, or "background"; the class token
   names those of the image.
2. qformer: the tower is frozen; every query's last state names the shape and the colour of the
   image. As the paper's image-text matching does, one loss takes the mean of all queries' scores,
   and as its contrast does, another takes the best query's.
3. reader: the Q-Former is frozen too; the language model and the projection before it learn to
   answer questions without "no" or "not". "is there not a red shape?" is answered by whether the
   words are negated xor what is seen is red, and neither alone says anything about the answer.
4. answers: all questions.

5. places, with OPT only: its table of positions is set to zero and left there, and the rest learns
   to do without; what order a question needs, causal attention gives. A language model trained on
   texts knows them at all positions; this one would know its questions at a single place, right
   after all the queries, from which pruning moves them away.

Both kinds share stages 1 and 2: with the same --work the second kind finds them done.
Architecture, tokenizer and files are those of the large models; only the numbers are small.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jaxtyping import Array, Float

import convert
from catp_jax.models.blip2 import Blip2, Blip2Config
from catp_jax.models.opt import Opt, OptConfig
from catp_jax.study.tasks import Example, easy_vqa
from catp_jax.training.blip2_card import card
from catp_jax.training.blip2_data import (
    PAPERS_PROMPT,
    AskBatch,
    Composer,
    LookBatch,
    Text,
    evaluation_batches,
)
from catp_jax.training.blip2_start import (
    POSITIONS,
    QUERIES,
    VOCABULARY,
    initialise,
    mini_config,
    say_what_is_seen,
)
from catp_jax.training.loop import Figures, adamw_stage, train
from catp_jax.training.photos import COLOURS, SHAPES, by_image
from catp_jax.training.scoring import (
    answer_loss,
    blind_accuracy,
    check_options,
    is_answered,
    kind,
    minutes,
)
from catp_jax.training.tokenizer import (
    OPT_SPECIAL,
    T5_SPECIAL,
    make_blip2_processor,
    train_blip2_tokenizer,
    write_processor,
)

QUESTIONS = 8  # per image in a batch of stages 3 and 4


def tower_loss(graph: nnx.GraphDef) -> Any:
    """Loss of stage 1: what covers each patch, and what the image shows, in the class token."""

    def loss(
        params: dict[str, Any], frozen: None, batch: LookBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        features, _ = nnx.merge(graph, params["tower"])(batch.pixels)
        whole = jnp.zeros_like(batch.weights).at[:, 0].set(1.0)  # the class token's weight
        covered = batch.covered.at[:, 0].set(1)
        total, figures = jnp.zeros(()), {}
        for name, labels in (("shape", batch.shapes), ("colour", batch.colours)):
            logits, labels = features @ params[name], covered * (1 + labels[:, None])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            total += (losses * (batch.weights + whole)).sum() / labels.shape[0]
            is_right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
            on_shape = batch.weights * batch.covered.astype(jnp.float32)
            figures[f"{name} of patches"] = (is_right * on_shape).sum() / on_shape.sum()
            figures[f"{name} of images"] = is_right[:, 0].mean()
        return total, {"loss": total, **figures}

    return loss


def qformer_loss(graph: nnx.GraphDef) -> Any:
    """Loss of stage 2: the shape and the colour of the image, by all queries' mean score and by the
    highest.
    """

    def loss(
        params: dict[str, Any], frozen: Any, batch: LookBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        states, _ = nnx.merge(graph, frozen, params["front"]).encode(batch.pixels)
        total, figures = jnp.zeros(()), {}
        for name, labels in (("shape", batch.shapes), ("colour", batch.colours)):
            scores = states @ params[name]
            for how, logits in (("mean", scores.mean(axis=1)), ("best", scores.max(axis=1))):
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
                total += losses.mean()
                is_right = logits.argmax(axis=-1) == labels
                figures[f"{name} by {how}"] = is_right.astype(jnp.float32).mean()
        return total, {"loss": total, **figures}

    return loss


def answer_logits(model: Blip2, batch: AskBatch) -> Float[Array, "b rows vocab"]:
    """Logits of the rows that `batch.targets` speaks of."""
    logits = model(batch.inputs, None, batch.decoder_tokens)
    return logits[:, -batch.targets.shape[1] :]


def answers_loss(graph: nnx.GraphDef) -> Any:
    """Loss of stages 3 and 4: the answer's token and the end after it."""

    def loss(
        params: Any, frozen: Any, batch: AskBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        logits = answer_logits(nnx.merge(graph, frozen, params), batch)
        return answer_loss(logits, batch.targets)

    return loss


@jax.jit
def answered(model: Blip2, batch: AskBatch) -> Float[Array, " b"]:
    """1 where greedy decoding gives exactly the answer."""
    return is_answered(answer_logits(model, batch), batch.targets)


def evaluate(model: Blip2, batches: list[AskBatch]) -> list[float]:
    """For every question of the batches, 1.0 if greedy decoding answers it right."""
    results = []
    for batch in batches:
        is_question = np.asarray(batch.targets >= 0).any(axis=-1)
        results += np.asarray(answered(model, batch))[is_question].tolist()
    return results


def without_queries(model: Blip2) -> Blip2:
    """The model with all queries' last states zeroed."""
    blind = nnx.clone(model)
    blind.language_projection.kernel[...] = jnp.zeros_like(blind.language_projection.kernel[...])
    return blind


def report(
    model: Blip2, text: Text, train_set: list[Example], test_set: list[Example]
) -> dict[str, Any]:
    """Accuracy on the test set: overall, by type, in the paper's wording, and without looking."""
    groups = by_image(test_set)
    size = min(50, len(groups))
    kinds = np.array([kind(example.answer) for group in groups for example in group])
    batches = evaluation_batches(test_set, text, size)
    right = np.array(evaluate(model, batches))
    blind = np.array(evaluate(without_queries(model), batches))
    worded = evaluate(model, evaluation_batches(test_set, text, size, PAPERS_PROMPT))
    figures = {"accuracy": right.mean()}
    figures |= {f"accuracy {k}": right[kinds == k].mean() for k in sorted(set(kinds))}
    figures["accuracy in the paper's wording"] = np.mean(worded)
    figures["accuracy with the queries zeroed"] = blind.mean()
    figures["accuracy blind"] = blind_accuracy(train_set, test_set)
    rounded = {name: round(float(value), 4) for name, value in figures.items()}
    return {"questions": len(kinds), **rounded}


def write(model: Blip2, processor: Any, out: Path, dtype: str | None = None) -> None:
    """Writes the new folder `out` in Hugging Face format, with all that goes beside the weights.

    These are stored as `dtype` (None: as they are); whatever it is, they are read as what they are.
    """
    tokenizer = processor.tokenizer
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if isinstance(model.language_model, Opt):
        ends["bos_token_id"] = tokenizer.bos_token_id
    else:
        ends["decoder_start_token_id"] = model.language_model.config.decoder_start_token_id
    with tempfile.TemporaryDirectory() as beside:
        write_processor(processor, Path(beside))
        text = json.dumps(ends | {"do_sample": False}, indent=2)
        (Path(beside) / "generation_config.json").write_text(text + "\n")
        config = convert.config_json(model.config, **ends)
        convert.write_hf(model, config, out, side_files=beside, dtype=dtype)


def make_tokenizer(which: str, examples: list[Example]) -> Any:
    """OPT's or T5's kind of tokenizer, from the words of the examples."""
    texts = (f"{PAPERS_PROMPT.format(e.question)} {e.answer}" for e in examples)
    special = OPT_SPECIAL if which == "opt" else T5_SPECIAL
    return train_blip2_tokenizer(texts, special, VOCABULARY, POSITIONS)


def make_text(tokenizer: Any, config: Blip2Config) -> Text:
    """How training writes rows, in the tokenizer's words."""

    @functools.lru_cache(maxsize=4096)
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text)

    return Text(
        encode=encode,
        encode_word=functools.partial(tokenizer.encode, add_special_tokens=False),
        end=tokenizer.eos_token_id,
        padding=tokenizer.pad_token_id,
        start=None if isinstance(config.text, OptConfig) else config.text.decoder_start_token_id,
    )


def main(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint in Hugging Face format")],
    which: Annotated[str, typer.Option("--kind", help="language model: opt or t5")] = "opt",
    work: Annotated[Path, typer.Option(help="folder for checkpoints to resume from")] = Path(
        "mini-blip2-work"
    ),
    seed: Annotated[int, typer.Option(help="fixes every random choice")] = 0,
    tower_steps: Annotated[int, typer.Option(help="steps of stage 1")] = 800,
    qformer_steps: Annotated[int, typer.Option(help="steps of stage 2")] = 200,
    reader_steps: Annotated[int, typer.Option(help="steps of stage 3")] = 250,
    answers_steps: Annotated[int, typer.Option(help="steps of stage 4")] = 400,
    places_steps: Annotated[int, typer.Option(help="steps of stage 5, OPT's")] = 300,
    batch: Annotated[int, typer.Option(help="questions in a step, or half as many images")] = 128,
    train_limit: Annotated[int | None, typer.Option(help="first so many train questions")] = None,
    test_limit: Annotated[int | None, typer.Option(help="first so many test questions")] = None,
) -> None:
    """Train a mini BLIP-2 on easy-VQA and write it in Hugging Face format.

    Run it again with the same options to resume after an interruption.
    """
    config = mini_config(which)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder or delete it first")
    options = {
        "seed": seed,
        "tower_steps": tower_steps,
        "qformer_steps": qformer_steps,
        "reader_steps": reader_steps,
        "answers_steps": answers_steps,
        "places_steps": places_steps,
        "batch": batch,
        "train_limit": train_limit,
    }
    check_options(options, work)
    train_set, test_set = list(easy_vqa("train", train_limit)), list(easy_vqa("test", test_limit))
    tokenizer = make_tokenizer(which, train_set)
    text = make_text(tokenizer, config)
    composer = Composer(train_set, config.vision, seed)
    model = initialise(config, seed)
    shared, apart = work / "shared_log.jsonl", work / f"{which}_log.jsonl"

    def looks(step: int) -> LookBatch:
        return composer.looks(step, batch // 2)

    graph, tower = nnx.split(model.vision_model)
    heads = {
        "shape": jnp.zeros((config.vision.hidden_size, 1 + len(SHAPES))),
        "colour": jnp.zeros((config.vision.hidden_size, 1 + len(COLOURS))),
    }
    first = adamw_stage("tower", tower_steps, tower_loss(graph), looks, peak=2e-3, seed=seed)
    trained = train(first, {"tower": tower, **heads}, work / "tower", shared)
    nnx.update(model.vision_model, trained["tower"])

    is_text = nnx.Any(*map(nnx.PathContains, ("language_model", "language_projection")))
    is_frozen = nnx.Any(is_text, nnx.PathContains("vision_model"))
    graph, frozen, front = nnx.split(model, is_frozen, ...)
    heads = {
        "shape": jnp.zeros((config.qformer.hidden_size, len(SHAPES))),
        "colour": jnp.zeros((config.qformer.hidden_size, len(COLOURS))),
    }
    second = adamw_stage("qformer", qformer_steps, qformer_loss(graph), looks, peak=2e-3, seed=seed)
    trained = train(second, {"front": front, **heads}, work / "qformer", shared, frozen=frozen)
    nnx.update(model, trained["front"])
    words = [text.answer(word)[0] for word in (*SHAPES, *COLOURS)]
    reading = jnp.concatenate([trained["shape"], trained["colour"]], axis=1)
    say_what_is_seen(model, reading, words)

    parts = [("reader", reader_steps, True), ("answers", answers_steps, False)]
    if isinstance(model.language_model, Opt):
        parts.append(("places", places_steps, False))
    for name, steps, is_plain in parts:
        is_learned = is_text
        if name == "places" and isinstance(model.language_model, Opt):
            table = model.language_model.model.decoder.embed_positions.embedding
            table[...] = jnp.zeros_like(table[...])
            is_learned = nnx.All(is_text, nnx.Not(nnx.PathContains("embed_positions")))
        graph, params, frozen = nnx.split(model, is_learned, ...)

        def questions(step: int, is_plain: bool = is_plain) -> AskBatch:
            return composer.questions(step, batch // QUESTIONS, QUESTIONS, text, is_plain)

        next_stage = adamw_stage(name, steps, answers_loss(graph), questions, peak=2e-3, seed=seed)
        params = train(next_stage, params, work / f"{which}_{name}", apart, frozen=frozen)
        model = nnx.merge(graph, frozen, params)

    log = work / f"{which}_whole_log.jsonl"
    log.write_text(shared.read_text() + apart.read_text())
    processor = make_blip2_processor(tokenizer, config.vision.image_size, QUERIES)
    write(model, processor, out, dtype="float16")
    written: Any = convert.load(out)[0]  # its weights have been rounded
    figures = report(written, text, train_set, test_set)
    figures["minutes of training"] = minutes(log)
    typer.echo(json.dumps(figures, indent=2))
    test = json.dumps({"stage": "test", **figures}) + "\n"
    (out / "training_log.jsonl").write_text(log.read_text() + test)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    readme = card(config, figures, options, parameters, PAPERS_PROMPT, QUESTIONS)
    (out / "README.md").write_text(readme)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
