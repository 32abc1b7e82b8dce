"""Trains the mini Llama 3.2 Vision that answers questions about scenes, from nothing.

    python -m catp_jax.training.scenes_llama_vision --out DIR --seed 0

Two stages:

1. tower: every visual token names what covers its own patch (shape or digit, colour, size), whether
   an object's middle is in it, and where its cell is. What there is to know about an object then
   sits in the tokens that show it.
2. decoder: the tower is frozen, what it makes of some thousand scenes is kept, and the rest learns
   to answer fresh questions about them, easy families first. Three quarters of the questions skip
   the first cross-attention layer, from the first step. That layer sees all tokens whatever is
   pruned after it; without the skip it answers everything, and even removing the needed tokens
   would cost nothing.

Architecture, tokenizer and files are those of the large models; only the numbers are small.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from catp_jax.models.cache import Slots
from catp_jax.models.cross_decoder import Visual
from catp_jax.models.mllama import Mllama, MllamaConfig
from catp_jax.models.tiled_vit import TiledVit
from catp_jax.struct import pytree
from catp_jax.training.data import Text
from catp_jax.training.llama_answers import answer_logits, answer_loss, say_what_is_seen, write
from catp_jax.training.loop import Figures, adamw_stage, train
from catp_jax.training.mini_llama_vision import initialise, mini_config
from catp_jax.training.photos import normalise
from catp_jax.training.scene_batches import LABELS, SEEN, cut, patch_labels
from catp_jax.training.scene_questions import FAMILIES, Asked, drawn, questions_of
from catp_jax.training.scenes import Dice, Scene, make_scene
from catp_jax.training.scoring import check_options, is_answered, minutes
from catp_jax.training.tokenizer import make_processor, train_tokenizer

VOCABULARY, POSITIONS = 512, 512
TEXT_LENGTH = 22  # the longest question, its answer and the marks around them, in tokens
LAYOUT = (2, 2)
SKIP_FIRST = 0.75  # share of the questions that skip the first cross-attention layer
SHARP = 1.5  # where the scales of query and key norms start
EASY = (3.0, 3.0, 1.0, 1.0, 3.0)  # how often each family is asked at first …
HARD = (1.0, 2.0, 2.5, 3.0, 1.0)  # … and at last
EACH = 8  # questions about a scene in a step


def scenes_config() -> MllamaConfig:
    """About 1.2 M parameters; 2×2 tiles of 64 px, 65 tokens each."""
    config = mini_config()
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=64, patch_size=8),
        text=dataclasses.replace(
            config.text, vocab_size=VOCABULARY, cross_attention_layers=(1, 3, 5)
        ),
        image_token_index=VOCABULARY,
    )


def know_places(tower: TiledVit) -> None:
    """Starts a tower in which a token knows where it is, and attends to what is like it.

    Positions start as sines of row and column, within the tile and, for each layout, within the
    image; keys start as queries.
    """
    config, table = tower.config, tower.gated_positional_embedding
    rows, columns = np.divmod(np.arange(config.grid**2), config.grid)
    table.embedding[...] = _sines(rows, columns, config.hidden_size)
    places = np.zeros((len(config.supported_aspect_ratios) + 1, config.max_num_tiles,
                       config.tokens_per_tile, config.hidden_size))  # fmt: skip
    for number, (down, across) in enumerate(config.supported_aspect_ratios, start=1):
        for tile in range(down * across):
            row, column = divmod(tile, across)
            where = rows + config.grid * row, columns + config.grid * column
            places[number, tile] = _sines(*where, config.hidden_size)
    table.tile_embedding.embedding[...] = jnp.asarray(places.reshape(len(places), -1), jnp.float32)
    for layer in (*tower.transformer.layers, *tower.global_transformer.layers):
        layer.self_attn.k_proj.kernel[...] = layer.self_attn.q_proj.kernel[...]


def _sines(rows: np.ndarray, columns: np.ndarray, width: int) -> Float[Array, "n d"]:
    """A vector for each place, zeros for the class token in front of them."""
    frequencies = 64.0 ** -(np.arange(width // 4) / (width // 4))
    angles = [place[:, None] * frequencies for place in (rows, columns)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return jnp.asarray(np.pad(np.concatenate(waves, axis=1), ((1, 0), (0, 0))), jnp.float32)


def tiles_of(scenes: list[Scene]) -> Float[np.ndarray, "i t c height width"]:
    """Pixels as the image processor hands them to the model."""
    images = [cut(normalise(scene.pixels).transpose(1, 2, 0), LAYOUT) for scene in scenes]
    return np.stack(images).transpose(0, 1, 4, 2, 3)


def see(tower: TiledVit, pixels: Float[Array, "i t c height width"]) -> Float[Array, "i t n out"]:
    """What the tower makes of scenes."""
    images, layouts = pixels.shape[0], tower.config.supported_aspect_ratios
    ids = jnp.full((images,), layouts.index(LAYOUT) + 1, jnp.int32)
    return tower(pixels, ids, jnp.ones(pixels.shape[:2], bool))


def show(model: Mllama, features: Float[Array, "i n out"]) -> Visual:
    """Visual tokens that every row of a question sees."""
    images, tokens, _ = features.shape
    numbers = jnp.arange(tokens, dtype=jnp.int32)
    return Visual(
        features=model.multi_modal_projector(features),
        slots=Slots(
            positions=jnp.broadcast_to(numbers, (images, tokens)),
            valid=jnp.ones((images, tokens), bool),
        ),
        sees=jnp.ones((images, TEXT_LENGTH, tokens), bool),
    )


@pytree
class PatchBatch:
    """Scenes, and what each token of theirs is labelled with (see `scene_batches`)."""

    pixels: Float[Array, "i t c height width"]
    labels: dict[str, Int[Array, "i t n"]]
    weights: Float[Array, "i t n"]


@pytree
class SceneBatch:
    """What the tower makes of scenes, with `q` questions each, as in `data.QuestionBatch`."""

    features: Float[Array, "i n out"]
    tokens: Int[Array, "i q s"]
    token_valid: Bool[Array, "i q s"]
    targets: Int[Array, "i q s"]


def patches(step: int, size: int, patch: int, seed: int) -> PatchBatch:
    """Batch number `step`, of scenes of its own."""
    scenes = [make_scene("train", step * size + n, seed=seed) for n in range(size)]
    labelled = [patch_labels(scene, patch) for scene in scenes]

    def by_token(grid: np.ndarray) -> np.ndarray:  # class tokens in front have no label
        tiles = cut(grid, LAYOUT)
        return np.pad(tiles.reshape(len(tiles), -1), ((0, 0), (1, 0)))

    return PatchBatch(
        pixels=jnp.asarray(tiles_of(scenes)),
        labels={
            name: jnp.asarray(np.stack([by_token(labels[name]) for labels, _ in labelled]))
            for name in LABELS
        },
        weights=jnp.asarray(np.stack([by_token(weights) for _, weights in labelled])),
    )


def tower_loss(graph: nnx.GraphDef) -> Any:
    """Loss of stage 1: what each token is labelled with, read off by a head each."""

    def loss(
        params: dict[str, Any], frozen: None, batch: PatchBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        features = see(nnx.merge(graph, params["tower"]), batch.pixels)
        total, figures = jnp.zeros(()), {}
        on_objects = batch.weights * (batch.labels["name"] > 0).astype(jnp.float32)
        for name, labels in batch.labels.items():
            logits = features @ params[name]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            total += (losses * batch.weights).sum() / labels.shape[0]
            is_right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
            figures[name] = (is_right * on_objects).sum() / on_objects.sum()
        return total, {"loss": total, **figures}

    return loss


class Bank:
    """Scenes with what the tower makes of them, and batches of questions about them."""

    def __init__(self, model: Mllama, split: str, scenes: list[Scene], text: Text) -> None:
        self.scenes, self.text = scenes, text
        graph, state = nnx.split(model.vision_model)
        tower = jax.jit(lambda state, pixels: see(nnx.merge(graph, state), pixels))
        made = [
            np.asarray(tower(state, jnp.asarray(tiles_of(scenes[start : start + 16]))), np.float16)
            for start in range(0, len(scenes), 16)
        ]
        self.features = np.concatenate(made).reshape(len(scenes), -1, made[0].shape[-1])

    def batch(self, numbers: Any, asked: list[list[Asked]]) -> SceneBatch:
        """These questions about the scenes of these numbers."""
        pairs = [[(one.question, one.answer) for one in some] for some in asked]
        tokens, valid, targets = self.text.rows(pairs, max(map(len, asked)), TEXT_LENGTH)
        return SceneBatch(
            features=jnp.asarray(self.features[numbers].astype(np.float32)),
            tokens=jnp.asarray(tokens),
            token_valid=jnp.asarray(valid),
            targets=jnp.asarray(targets),
        )

    def draw(self, step: int, steps: int, size: int, seed: int) -> SceneBatch:
        """Batch number `step` of `steps`: easy families fade out."""
        rng = np.random.default_rng((seed, step))
        share = step / steps
        weights = (1 - share) * np.array(EASY) + share * np.array(HARD)
        numbers = rng.integers(len(self.scenes), size=size)
        asked = []
        for number in numbers.tolist():
            dice, some = Dice(seed, step, number), []
            while len(some) < EACH:
                family = rng.choice(list(FAMILIES), p=weights / weights.sum())
                some += drawn(dice, self.scenes[number], [family])
            asked.append(some)
        return self.batch(numbers, asked)


def decoder_loss(graph: nnx.GraphDef) -> Any:
    """Loss of stage 2."""

    def loss(
        params: Any, frozen: Any, batch: SceneBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        model = nnx.merge(graph, frozen, params)
        is_open = jax.random.bernoulli(key, 1 - SKIP_FIRST, (batch.tokens.shape[1],))
        visual = show(model, batch.features)
        logits = answer_logits(model, visual, batch.tokens, batch.token_valid, is_open)
        return answer_loss(logits, batch.targets)

    return loss


def evaluate(model: Mllama, bank: Bank, asked: list[list[Asked]]) -> dict[str, float]:
    """The share of right answers by family and, within one, by kind."""
    graph, state = nnx.split(model)

    @jax.jit
    def answered(state: Any, batch: SceneBatch) -> Array:
        model = nnx.merge(graph, state)
        visual = show(model, batch.features)
        logits = answer_logits(model, visual, batch.tokens, batch.token_valid)
        return is_answered(logits, batch.targets)

    right = defaultdict(list)
    for start in range(0, len(asked), 32):
        some = asked[start : start + 32]
        is_right = np.asarray(answered(state, bank.batch(slice(start, start + len(some)), some)))
        for image, questions in enumerate(some):
            for row, one in enumerate(questions):
                right[one.family].append(is_right[image, row])
                right[f"{one.family}, {one.kind}"].append(is_right[image, row])
    return {name: round(float(np.mean(some)), 4) for name, some in sorted(right.items())}


def main(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint in Hugging Face format")],
    work: Annotated[Path, typer.Option(help="folder for checkpoints to resume from")] = Path(
        "scenes-llama-vision-work"
    ),
    seed: Annotated[int, typer.Option(help="fixes every random choice")] = 0,
    tower_steps: Annotated[int, typer.Option(help="steps of stage 1, of 8 scenes")] = 1000,
    decoder_steps: Annotated[int, typer.Option(help="steps of stage 2, of 16 scenes")] = 2500,
    scenes: Annotated[int, typer.Option(help="scenes that stage 2 asks about")] = 4096,
    test_scenes: Annotated[int, typer.Option(help="scenes that the result is judged by")] = 400,
) -> None:
    """Train the mini Llama 3.2 Vision on scenes and write it in Hugging Face format.

    Run it again with the same options to resume after an interruption.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder or delete it first")
    options = {
        "seed": seed,
        "tower_steps": tower_steps,
        "decoder_steps": decoder_steps,
        "scenes": scenes,
    }
    check_options(options, work)
    log = work / "training_log.jsonl"
    config = scenes_config()
    model = initialise(config, seed)
    know_places(model.vision_model)

    graph, tower = nnx.split(model.vision_model)
    heads = {
        name: jnp.zeros((config.vision.output_size, len(labels))) for name, labels in LABELS.items()
    }
    stage = adamw_stage(
        "tower",
        tower_steps,
        tower_loss(graph),
        lambda step: patches(step, 8, config.vision.patch_size, seed),
        peak=2e-3,
        seed=seed,
    )
    trained = train(stage, {"tower": tower, **heads}, work / "tower", log)
    nnx.update(model.vision_model, trained["tower"])

    asked_about = [make_scene("train", number, seed=seed) for number in range(scenes)]
    tokenizer = make_tokenizer(asked_about[:600])
    text = Text.of(tokenizer)
    words = [text.answer(word)[0] for word in SEEN]
    reading = jnp.concatenate([trained[name][:, 1:] for name in ("name", "colour", "size")], axis=1)
    say_what_is_seen(model, reading, words)
    for index in config.text.cross_attention_layers:
        attention = model.language_model.layers[index].cross_attn
        for norm in (attention.q_norm, attention.k_norm):
            norm.scale[...] = SHARP * norm.scale[...]

    bank = Bank(model, "train", asked_about, text)
    graph, frozen, params = nnx.split(model, nnx.PathContains("vision_model"), ...)
    stage = adamw_stage(
        "decoder",
        decoder_steps,
        decoder_loss(graph),
        lambda step: bank.draw(step, decoder_steps, 16, seed),
        peak=1e-3,
        seed=seed,
    )
    params = train(stage, params, work / "decoder", log, frozen=frozen)
    model = nnx.merge(graph, frozen, params)

    processor = make_processor(tokenizer, config.vision.image_size, config.vision.max_num_tiles)
    write(model, processor, out)
    test = questions_of("test", test_scenes, each=2)
    bank = Bank(model, "test", [scene for scene, _ in test], text)
    figures = evaluate(model, bank, [asked for _, asked in test])
    figures["minutes of training"] = minutes(log)
    line = json.dumps({"stage": "test", "scenes": test_scenes, **figures}) + "\n"
    (out / "training_log.jsonl").write_text(log.read_text() + line)
    typer.echo(json.dumps(figures, indent=2))


def make_tokenizer(scenes: list[Scene]) -> Any:
    """A tokenizer of the words of all questions about some scenes."""
    asked = (one for scene in scenes for make in FAMILIES.values() for one in make(scene))
    texts = (f"{one.question} {one.answer}" for one in asked)
    return train_tokenizer(texts, VOCABULARY, POSITIONS)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
