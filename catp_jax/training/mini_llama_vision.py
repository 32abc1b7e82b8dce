"""Trains the mini Llama 3.2 Vision that ships with the package, from nothing, on easy-VQA.

    python -m catp_jax.training.mini_llama_vision --out DIR --seed 0

Three stages, because answers alone teach the vision tower colours but hardly shapes, and teach the
decoder to answer yes and no unseen:

1. tower: every visual token names the shape and the colour of what covers its own patch, or
   "background". What there is to know about a shape then sits in the tokens that show it.
2. reader: the tower is frozen and the rest learns to answer questions without "no" or "not". "is
   there not a red shape?" is answered by whether the words are negated xor what is seen is red, and
   neither alone says anything about the answer.
3. decoder: all questions. Half of them skip the first cross-attention layer, which sees every token
   whatever is pruned: the second one has to be able to read the image by itself, as in a model of
   many such layers.

Architecture, tokenizer and files are those of the large models; only the numbers are small.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

import convert
from catp_jax.models.cross_decoder import CrossDecoderConfig
from catp_jax.models.layers import Llama3Scaling, RopeConfig
from catp_jax.models.mllama import Mllama, MllamaConfig
from catp_jax.models.tiled_vit import TiledVitConfig
from catp_jax.study.tasks import Example, easy_vqa
from catp_jax.training.data import (
    Composer,
    DenseBatch,
    QuestionBatch,
    Text,
    evaluation_batches,
)
from catp_jax.training.llama_answers import (
    answer_logits,
    say_what_is_seen,
    write,
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
    make_processor,
    train_tokenizer,
)

VOCABULARY = 352
POSITIONS = 512
OPEN_GATE = 0.5  # where every gate starts; at the usual zero a branch learns late
SKIP_FIRST = 0.5  # share of stage 3's questions that skip the first cross-attention layer
QUESTIONS = 8  # per image in a training batch
KEPT = (4, 8, 16, 32, 65, 130)  # visual tokens, of 260, in the evaluation with random keeping

TOWER_LAYOUTS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))


def mini_config() -> MllamaConfig:
    """About 1.2 M parameters; 2×2 tiles of 32 px, 65 tokens each."""
    return MllamaConfig(
        vision=TiledVitConfig(
            hidden_size=96,
            hidden_act="gelu",
            num_hidden_layers=3,
            num_global_layers=1,
            attention_heads=3,
            num_channels=3,
            intermediate_size=192,
            image_size=32,
            patch_size=4,
            norm_eps=1e-5,
            max_num_tiles=4,
            intermediate_layers_indices=(1,),
            supported_aspect_ratios=TOWER_LAYOUTS,
            vision_mode="hf",  # so that transformers of today computes the same
        ),
        text=CrossDecoderConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            hidden_act="silu",
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=192,
            rope=RopeConfig(10000.0, Llama3Scaling(8.0, 1.0, 4.0, POSITIONS // 8)),
            rms_norm_eps=1e-5,
            max_position_embeddings=POSITIONS,
            cross_attention_layers=(1, 3),
        ),
        image_token_index=VOCABULARY,
    )


def initialise(config: MllamaConfig, seed: int) -> Mllama:
    """A model drawn anew: kernels by their fan-in, every gate open a little.

    In the decoder words start large and the branches that add to them small, so that a row keeps
    the word it stands for until layers have learned what to add.
    """
    model = Mllama(config, rngs=nnx.Rngs(seed))
    root = jax.random.key(seed)
    branch = (2 * config.text.num_hidden_layers) ** -0.5

    def draw(number: int, path: tuple, x: Array) -> Array:
        name = jax.tree_util.keystr(path)
        noise = jax.random.normal(jax.random.fold_in(root, number), x.shape)
        if "embed_tokens" in name:
            return noise
        if "gate_proj" not in name and "gate" in name:
            return jnp.full_like(x, OPEN_GATE) if "global_transformer" not in name else x
        if "kernel" in name:
            is_branch = "language_model" in name and ("o_proj" in name or "down_proj" in name)
            return noise * (x.shape[0] ** -0.5 * (branch if is_branch else 1.0))
        return x

    graph, state = nnx.split(model)
    leaves = jax.tree.leaves_with_path(state)
    drawn = [draw(number, path, x) for number, (path, x) in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), drawn))


def tower_loss(graph: nnx.GraphDef) -> Any:
    """Loss of stage 1: what covers each token, shape and colour read off by a head each."""

    def loss(
        params: dict[str, Any], frozen: None, batch: DenseBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        tower = nnx.merge(graph, params["tower"])
        features = tower(batch.pixels, batch.aspect_ratio_ids, batch.aspect_ratio_mask)
        total, figures = jnp.zeros(()), {}
        for name, labels in (("shape", batch.shapes), ("colour", batch.colours)):
            logits = features @ params[name]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            total += (losses * batch.weights).sum() / labels.shape[0]
            on_shape = batch.weights * (labels > 0).astype(jnp.float32)
            is_right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
            figures[name] = (is_right * on_shape).sum() / on_shape.sum()
        return total, {"loss": total, **figures}

    return loss


def logits_of(
    model: Mllama,
    batch: QuestionBatch,
    is_first_open: Bool[Array, " q"] | None = None,
    kept: Int[Array, "i q k"] | None = None,
) -> Float[Array, "i q s vocab"]:
    """`answer_logits` of a batch; its images are encoded once for all of their questions."""
    visual = model.encode(batch.images)
    return answer_logits(model, visual, batch.tokens, batch.token_valid, is_first_open, kept)


def decoder_loss(graph: nnx.GraphDef, skip_first: float) -> Any:
    """Loss of stages 2 and 3: the answer's tokens and the end after it.

    A share of `skip_first` questions skips the first cross-attention layer.
    """

    def loss(
        params: Any, frozen: Any, batch: QuestionBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        model = nnx.merge(graph, frozen, params)
        is_open = jax.random.bernoulli(key, 1 - skip_first, (batch.tokens.shape[1],))
        return answer_loss(logits_of(model, batch, is_open), batch.targets)

    return loss


def evaluate(
    model: Mllama, batches: list[QuestionBatch], kept: int | None = None, seed: int = 0
) -> list[float]:
    """For every question of the batches, 1.0 if it is answered right.

    With `kept`, each question's image keeps that many visual tokens, chosen at random, after the
    first cross-attention layer.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def answered(state: Any, batch: QuestionBatch, key: Array) -> Array:
        indices = None
        if kept is not None:
            questions = batch.tokens.shape[:2]
            tokens = batch.images.tile_index.shape[1] * model.config.vision.tokens_per_tile
            order = jnp.argsort(jax.random.uniform(key, (*questions, tokens)), axis=-1)
            indices = order[..., :kept]
        logits = logits_of(nnx.merge(graph, state), batch, kept=indices)
        return is_answered(logits, batch.targets)

    results = []
    for number, batch in enumerate(batches):
        right = answered(state, batch, jax.random.fold_in(jax.random.key(seed), number))
        is_question = np.asarray(batch.targets >= 0).any(axis=-1)
        results += np.asarray(right)[is_question].tolist()
    return results


def report(
    model: Mllama, text: Text, train_set: list[Example], test_set: list[Example]
) -> dict[str, Any]:
    """Accuracy on the test set: overall, by type, with random tokens kept, and without images."""
    groups = by_image(test_set)
    asked = [example for group in groups for example in group]
    batches = evaluation_batches(test_set, text, model.config.vision, size=min(50, len(groups)))
    right = np.array(evaluate(model, batches))
    kinds = np.array([kind(example.answer) for example in asked])
    kept = {k: round(float(np.mean(evaluate(model, batches, kept=k))), 4) for k in KEPT}
    return {
        "questions": len(asked),
        "accuracy": round(float(right.mean()), 4),
        **{f"accuracy {k}": round(float(right[kinds == k].mean()), 4) for k in sorted(set(kinds))},
        "accuracy blind": round(blind_accuracy(train_set, test_set), 4),
        "accuracy with random tokens kept": kept,
    }


def main(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint in Hugging Face format")],
    work: Annotated[Path, typer.Option(help="folder for checkpoints to resume from")] = Path(
        "mini-llama-vision-work"
    ),
    seed: Annotated[int, typer.Option(help="fixes every random choice")] = 0,
    tower_steps: Annotated[int, typer.Option(help="steps of stage 1")] = 700,
    reader_steps: Annotated[int, typer.Option(help="steps of stage 2")] = 250,
    decoder_steps: Annotated[int, typer.Option(help="steps of stage 3")] = 350,
    batch: Annotated[int, typer.Option(help="images in a step")] = 32,
    train_limit: Annotated[int | None, typer.Option(help="first so many train questions")] = None,
    test_limit: Annotated[int | None, typer.Option(help="first so many test questions")] = None,
) -> None:
    """Train the mini Llama 3.2 Vision on easy-VQA and write it in Hugging Face format.

    Run it again with the same options to resume after an interruption.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder or delete it first")
    options = {
        "seed": seed,
        "tower_steps": tower_steps,
        "reader_steps": reader_steps,
        "decoder_steps": decoder_steps,
        "batch": batch,
        "train_limit": train_limit,
    }
    check_options(options, work)
    log = work / "training_log.jsonl"
    train_set, test_set = list(easy_vqa("train", train_limit)), list(easy_vqa("test", test_limit))
    config = mini_config()
    tokenizer = train_tokenizer(
        (f"{e.question} {e.answer}" for e in train_set), VOCABULARY, POSITIONS
    )
    text = Text.of(tokenizer)
    composer = Composer(train_set, config.vision, seed)
    model = initialise(config, seed)

    tower_graph, tower = nnx.split(model.vision_model)
    heads = {
        "shape": jnp.zeros((config.vision.output_size, 1 + len(SHAPES))),
        "colour": jnp.zeros((config.vision.output_size, 1 + len(COLOURS))),
    }
    stage = adamw_stage(
        "tower",
        tower_steps,
        tower_loss(tower_graph),
        lambda step: composer.dense(step, batch),
        peak=2e-3,
        seed=seed,
    )
    trained = train(stage, {"tower": tower, **heads}, work / "tower", log)
    nnx.update(model.vision_model, trained["tower"])
    words = [tokenizer.encode(f" {word}")[0] for word in (*SHAPES, *COLOURS)]
    reading = jnp.concatenate([trained["shape"][:, 1:], trained["colour"][:, 1:]], axis=1)
    say_what_is_seen(model, reading, words)

    graph, frozen, params = nnx.split(model, nnx.PathContains("vision_model"), ...)
    for name, steps, is_plain, skip_first in (
        ("reader", reader_steps, True, 0.0),
        ("decoder", decoder_steps, False, SKIP_FIRST),
    ):
        stage = adamw_stage(
            name,
            steps,
            decoder_loss(graph, skip_first),
            lambda step, plain=is_plain: composer.questions(
                step, batch, QUESTIONS, text, is_plain=plain
            ),
            peak=1e-3,
            seed=seed,
        )
        params = train(stage, params, work / name, log, frozen=frozen)
    model = nnx.merge(graph, frozen, params)

    processor = make_processor(tokenizer, config.vision.image_size, config.vision.max_num_tiles)
    write(model, processor, out, dtype="float16")
    written: Any = convert.load(out)[0]  # its weights have been rounded
    figures = report(written, text, train_set, test_set)
    figures["minutes of training"] = minutes(log)
    test = json.dumps({"stage": "test", **figures}) + "\n"
    (out / "training_log.jsonl").write_text(log.read_text() + test)
    typer.echo(json.dumps(figures, indent=2))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
