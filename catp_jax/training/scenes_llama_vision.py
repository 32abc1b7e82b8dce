"""Trains the mini Llama 3.2 Vision that answers questions about scenes, from nothing.

    python -m catp_jax.training.scenes_llama_vision --out DIR --seed 0
    python -m catp_jax.training.scenes_llama_vision --out DIR --seed 0 --size guide

With `--size guide` it is a smaller model of the same visual tokens, which guides the mini
(`catp_jax.guided`). Two stages:

1. tower: every visual token names what covers its own patch (shape or digit, colour, size), whether
   an object's middle is in it, and where its cell is. What there is to know about an object then
   sits in the tokens that show it.
2. decoder: the tower is frozen, what it makes of some thousand scenes is kept, and the rest learns
   to answer fresh questions about them, easy families first. Three quarters of the questions skip
   the first cross-attention layer, from the first step. That layer sees all tokens whatever is
   pruned after it; without the skip it answers everything, and even removing the needed tokens
   would cost nothing. The guide, of which nothing is pruned but to see how sure it is, has two such
   layers and needs both: a quarter of its questions skip the first. It also finds out later that
   there is something to see, and begins with lists of the easiest sort (see `scene_lists`).

Architecture, tokenizer and files are those of the large models; only the numbers are small.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from jaxtyping import Array, Float

from catp_jax.models.cache import Slots
from catp_jax.models.cross_decoder import Visual
from catp_jax.models.mllama import Mllama, MllamaConfig
from catp_jax.models.tiled_vit import TiledVit
from catp_jax.training.data import Text
from catp_jax.training.llama_answers import answer_logits, say_what_is_seen, write
from catp_jax.training.loop import Figures, adamw_stage, train
from catp_jax.training.mini_llama_vision import initialise, mini_config
from catp_jax.training.photos import normalise
from catp_jax.training.scene_bank import Asking, Bank, Mix, Rows, SceneBatch, evaluate, texts_about
from catp_jax.training.scene_batches import SEEN, cut
from catp_jax.training.scene_card import card
from catp_jax.training.scene_questions import questions_of
from catp_jax.training.scene_tower import empty_heads, sines, tower_stage
from catp_jax.training.scenes import Scene, make_scene
from catp_jax.training.scoring import answer_loss, check_options, is_answered, minutes
from catp_jax.training.tokenizer import make_processor, train_tokenizer

VOCABULARY, POSITIONS = 512, 512
TEXT_LENGTH = 16  # the longest question, its answer and the marks around them, in tokens
LAYOUT = (2, 2)
SHARP = 1.5  # where the scales of query and key norms start


def scenes_config() -> MllamaConfig:
    """About 1.4 M parameters; 2×2 tiles of 64 px, 65 tokens each.

    Three layers look at the image. Two more after them have what was found compared and counted.
    """
    config = mini_config()
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=64, patch_size=8),
        text=dataclasses.replace(
            config.text,
            vocab_size=VOCABULARY,
            num_hidden_layers=8,
            cross_attention_layers=(1, 3, 5),
        ),
        image_token_index=VOCABULARY,
    )


def guide_config() -> MllamaConfig:
    """About a third of the parameters for the same visual tokens; two layers look at the image."""
    config = scenes_config()
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, hidden_size=48, intermediate_size=96),
        text=dataclasses.replace(
            config.text,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_hidden_layers=5,
            cross_attention_layers=(1, 3),
        ),
    )


@dataclasses.dataclass(frozen=True)
class Size:
    """A model to train: what its folder and its README are called, for how many steps, the share of
    the questions that skip the first cross-attention layer, and the share of stage 2 in which lists
    of the easiest sort fade out.
    """

    name: str
    title: str
    config: MllamaConfig
    tower_steps: int
    decoder_steps: int
    skip_first: float
    looking: float


SIZES = {
    "mini": Size(
        name="scenes-llama-vision",
        title="Mini Llama Vision for scenes",
        config=scenes_config(),
        tower_steps=1600,
        decoder_steps=2500,
        skip_first=0.75,
        looking=0.0,
    ),
    "guide": Size(
        name="scenes-llama-vision-guide",
        title="Mini Llama Vision for scenes, as a guide",
        config=guide_config(),
        tower_steps=1600,
        decoder_steps=2500,
        skip_first=0.25,
        looking=0.2,
    ),
}


def know_places(tower: TiledVit) -> None:
    """Starts a tower in which a token knows where it is, and attends to what is like it.

    Positions start as sines of row and column, within the tile and, for each layout, within the
    image; keys start as queries.
    """
    config, table = tower.config, tower.gated_positional_embedding
    rows, columns = np.divmod(np.arange(config.grid**2), config.grid)
    table.embedding[...] = sines(rows, columns, config.hidden_size)
    places = np.zeros((len(config.supported_aspect_ratios) + 1, config.max_num_tiles,
                       config.tokens_per_tile, config.hidden_size))  # fmt: skip
    for number, (down, across) in enumerate(config.supported_aspect_ratios, start=1):
        for tile in range(down * across):
            row, column = divmod(tile, across)
            where = rows + config.grid * row, columns + config.grid * column
            places[number, tile] = sines(*where, config.hidden_size)
    table.tile_embedding.embedding[...] = jnp.asarray(places.reshape(len(places), -1), jnp.float32)
    for layer in (*tower.transformer.layers, *tower.global_transformer.layers):
        layer.self_attn.k_proj.kernel[...] = layer.self_attn.q_proj.kernel[...]


def tiles_of(scenes: Sequence[Scene]) -> Float[np.ndarray, "i t c height width"]:
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


def tokens_of(grid: np.ndarray) -> np.ndarray:
    """A grid of patches in the order of the tokens; class tokens in front have no label."""
    tiles = cut(grid, LAYOUT)
    return np.pad(tiles.reshape(len(tiles), -1), ((0, 0), (1, 0)))


def rows_of(text: Text) -> Callable[[Asking, int], Rows]:
    """How questions become tokens."""

    def rows(asked: Asking, each: int) -> Rows:
        tokens, valid, targets = text.rows(asked, each, TEXT_LENGTH)
        return Rows(
            tokens=jnp.asarray(tokens),
            token_valid=jnp.asarray(valid),
            targets=jnp.asarray(targets),
        )

    return rows


def encoder(model: Mllama) -> Callable[[Sequence[Scene]], Array]:
    """What the model's tower makes of scenes."""
    graph, state = nnx.split(model.vision_model)
    tower = jax.jit(lambda state, pixels: see(nnx.merge(graph, state), pixels))

    def encode(scenes: Sequence[Scene]) -> Array:
        features = tower(state, jnp.asarray(tiles_of(scenes)))
        return features.reshape(len(scenes), -1, features.shape[-1])

    return encode


def decoder_loss(graph: nnx.GraphDef, skip_first: float) -> Any:
    """Loss of stage 2; the share `skip_first` skips the first cross-attention layer."""

    def loss(
        params: Any, frozen: Any, batch: SceneBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        model = nnx.merge(graph, frozen, params)
        rows = batch.rows
        is_open = jax.random.bernoulli(key, 1 - skip_first, (rows.tokens.shape[1],))
        visual = show(model, batch.features)
        logits = answer_logits(model, visual, rows.tokens, rows.token_valid, is_open)
        return answer_loss(logits, rows.targets)

    return loss


def answered(model: Mllama) -> Callable[[SceneBatch], Array]:
    """1 where greedy decoding would give exactly the answer."""
    graph, state = nnx.split(model)

    @jax.jit
    def is_right(state: Any, batch: SceneBatch) -> Array:
        model, rows = nnx.merge(graph, state), batch.rows
        visual = show(model, batch.features)
        return is_answered(
            answer_logits(model, visual, rows.tokens, rows.token_valid), rows.targets
        )

    return lambda batch: is_right(state, batch)


def main(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint in Hugging Face format")],
    work: Annotated[Path, typer.Option(help="folder for checkpoints to resume from")] = Path(
        "scenes-llama-vision-work"
    ),
    size: Annotated[
        Literal["mini", "guide"], typer.Option(help="the mini, or a smaller model that guides it")
    ] = "mini",
    seed: Annotated[int, typer.Option(help="fixes every random choice")] = 0,
    tower_steps: Annotated[
        int | None, typer.Option(help="steps of stage 1, of 8 scenes", show_default="by size")
    ] = None,
    decoder_steps: Annotated[
        int | None, typer.Option(help="steps of stage 2, of 16 scenes", show_default="by size")
    ] = None,
    scenes: Annotated[int, typer.Option(help="scenes that stage 2 asks about")] = 4096,
    test_scenes: Annotated[int, typer.Option(help="scenes that the result is judged by")] = 400,
) -> None:
    """Train the mini Llama 3.2 Vision on scenes and write it in Hugging Face format.

    Run it again with the same options to resume after an interruption.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder or delete it first")
    made = SIZES[size]
    tower_steps = made.tower_steps if tower_steps is None else tower_steps
    decoder_steps = made.decoder_steps if decoder_steps is None else decoder_steps
    chosen = {} if size == "mini" else {"size": size}  # what the mini was trained with stays so
    options = {
        **chosen,
        "seed": seed,
        "tower_steps": tower_steps,
        "decoder_steps": decoder_steps,
        "scenes": scenes,
    }
    check_options(options, work)
    log = work / "training_log.jsonl"
    config = made.config
    model = initialise(config, seed)
    know_places(model.vision_model)

    graph, tower = nnx.split(model.vision_model)
    patch, heads = config.vision.patch_size, empty_heads(config.vision.output_size)
    stage = tower_stage(tower_steps, see, graph, tiles_of, tokens_of, patch, seed)
    trained = train(stage, {"tower": tower, **heads}, work / "tower", log)
    nnx.update(model.vision_model, trained["tower"])

    asked_about = [make_scene("train", number, seed=seed) for number in range(scenes)]
    tokenizer = make_tokenizer(asked_about[:600])
    text = Text.of(tokenizer)
    words = [text.answer(word)[0] for word in SEEN]
    reading = jnp.concatenate([trained[name][:, 1:] for name in ("name", "colour", "size")], axis=1)
    places = jnp.concatenate([trained["row"], trained["column"], trained["middle"][:, 1:]], axis=1)
    say_what_is_seen(model, reading, words, places)
    for index in config.text.cross_attention_layers:
        attention = model.language_model.layers[index].cross_attn
        for norm in (attention.q_norm, attention.k_norm):
            norm.scale[...] = SHARP * norm.scale[...]

    bank = Bank(asked_about, encoder(model), rows_of(text))
    graph, frozen, params = nnx.split(model, nnx.PathContains("vision_model"), ...)
    stage = adamw_stage(
        "decoder",
        decoder_steps,
        decoder_loss(graph, made.skip_first),
        lambda step: bank.draw(step, decoder_steps, seed, Mix(looking=made.looking)),
        peak=1.5e-3,
        seed=seed,
    )
    params = train(stage, params, work / "decoder", log, frozen=frozen)
    model = nnx.merge(graph, frozen, params)

    processor = make_processor(tokenizer, config.vision.image_size, config.vision.max_num_tiles)
    write(model, processor, out)
    test = questions_of("test", test_scenes, each=2)
    bank = Bank([scene for scene, _ in test], encoder(model), rows_of(text))
    figures = evaluate(answered(model), bank, [asked for _, asked in test])
    figures |= {"scenes": test_scenes, "minutes of training": minutes(log)}
    line = json.dumps({"stage": "test", **figures}) + "\n"
    (out / "training_log.jsonl").write_text(log.read_text() + line)
    readme = card(
        made.title,
        "A Llama 3.2 Vision",
        "mllama",
        sum(x.size for x in jax.tree.leaves(nnx.state(model))),
        "scenes_llama_vision",
        {"out": made.name, **chosen, "seed": seed},
        {"tower": tower_steps, "decoder": decoder_steps},
        figures,
    )
    (out / "README.md").write_text(readme)
    typer.echo(json.dumps(figures, indent=2))


def make_tokenizer(scenes: list[Scene]) -> Any:
    """A tokenizer of the words of all questions about some scenes."""
    return train_tokenizer(texts_about(scenes), VOCABULARY, POSITIONS)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
