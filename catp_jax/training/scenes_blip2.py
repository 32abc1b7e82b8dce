"""Trains the two mini BLIP-2s that answer questions about scenes, from nothing.

    python -m catp_jax.training.scenes_blip2 --out DIR --kind opt --seed 0

1. tower: every patch names what covers it, as for the mini Llama Vision (`scene_tower`).
2. qformer: the tower is frozen, and the queries learn to tell the whole scene. Sixteen probes, one
   for each cell, attend to the queries' last states and name what is in their cell, or that nothing
   is. No query is given a place or a task: probes ask all of them, and what a query looks at is
   found in training.
3. answers: the Q-Former is frozen, what it makes of some thousand scenes is kept, and the language
   model and the projection in front of it learn to answer fresh questions about them: the easiest
   lists first (`scene_lists`), easy families next. On the way there, words learn what is to be
   known of the objects that they name (`scene_words`). An OPT's positions are sines, and each
   step begins to count somewhere else: what matters is how far words are apart, since pruning moves
   all of them.

Both kinds share stages 1 and 2: with the same --work the second kind finds them done.
Architecture, tokenizer and files are those of the large models; only the numbers are small.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from jaxtyping import Array, Float, Int

from catp_jax.models.blip2 import Blip2, Blip2Config
from catp_jax.models.opt import Opt, OptConfig
from catp_jax.models.t5 import T5
from catp_jax.models.vit import Vit
from catp_jax.struct import pytree
from catp_jax.training.blip2_start import QUERIES, WORD, initialise, mini_config, say_what_is_seen
from catp_jax.training.loop import Figures, Stage, adamw_stage, train
from catp_jax.training.mini_blip2 import make_text, write
from catp_jax.training.photos import normalise
from catp_jax.training.scene_answers import answered, rows_of
from catp_jax.training.scene_bank import Bank, Mix, SceneBatch, evaluate, texts_about
from catp_jax.training.scene_batches import LABELS, SEEN
from catp_jax.training.scene_card import card
from catp_jax.training.scene_questions import questions_of
from catp_jax.training.scene_tower import empty_heads, sines, tower_stage
from catp_jax.training.scene_words import labels_of, look_along, word_heads, words_loss
from catp_jax.training.scenes import Scene, make_scene
from catp_jax.training.scoring import check_options, minutes
from catp_jax.training.tokenizer import (
    OPT_SPECIAL,
    T5_SPECIAL,
    make_blip2_processor,
    train_blip2_tokenizer,
)

VOCABULARY = 512
CELLS = 16
IN_CELL = ("name", "colour", "size")  # what a probe says
SHARP = 2.0  # queries and keys of cross-attention start this much larger: queries look apart
PROBED = 32  # scenes in a step of stage 2
ANSWERS_STEPS = {"opt": 5500, "t5": 3400}  # a step of an OPT takes half as long
MIX = {
    # with fewer questions about attributes an OPT confused large and small
    "opt": Mix(hard=(2.0, 2.0, 2.5, 3.0, 1.0, 0.5), looking=0.2),
    "t5": Mix(  # lists, which its decoder answers, teach its encoder little
        easy=(3.0, 2.0, 2.0, 3.0, 2.0, 2.0),
        hard=(1.0, 1.5, 4.0, 2.5, 1.0, 0.5),
        lists=(0.3, 0.2),
        looking=0.2,
    ),
}
EYES = 1.0  # how much half the heads of an OPT are drawn to visual tokens at the start


def scenes_config(which: str) -> Blip2Config:
    """1.5 M parameters ("opt") or 1.8 M ("t5"); images of 128 px in patches of 8."""
    config = mini_config(which)
    text = (
        dataclasses.replace(config.text, vocab_size=VOCABULARY, num_hidden_layers=6, ffn_dim=256)
        if isinstance(config.text, OptConfig)
        else dataclasses.replace(config.text, vocab_size=VOCABULARY, d_ff=192, num_layers=6)
    )
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, image_size=128),
        text=text,
        image_token_index=VOCABULARY - 1,
    )


def know_places(tower: Vit) -> None:
    """Starts a tower in which a token knows where it is, and attends to what is like it."""
    config = tower.config
    places = sines(*np.divmod(np.arange(config.grid**2), config.grid), config.hidden_size)
    tower.embeddings.position_embedding[...] = places[None]
    for layer in tower.encoder.layers:
        kernel = layer.self_attn.qkv.kernel[...]
        layer.self_attn.qkv.kernel[...] = kernel.at[:, 1].set(kernel[:, 0])


def look_apart(model: Blip2, features: Float[Array, "i n d"]) -> None:
    """Starts a Q-Former whose queries differ in what they look at and in what they get.

    What all `features` have in common is taken out of the values. It would make all queries alike
    before they have learned anything.
    """
    for layer in model.qformer.encoder.layer:
        if layer.has_cross_attention:
            attention = layer.crossattention.attention
            for project in (attention.query, attention.key):
                project.kernel[...] = SHARP * project.kernel[...]
            kernel = attention.value.kernel[...]
            bias: Any = attention.value.bias
            bias[...] = -features.mean(axis=(0, 1)) @ kernel


def places_in_line(count: int, width: int) -> Float[Array, "count width"]:
    """Where words are: sines, as large as words at the start."""
    frequencies = 64.0 ** -(np.arange(width // 2) / (width // 2))
    angles = np.arange(count)[:, None] * frequencies
    return WORD * jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)


def count_from(start: Int[Array, ""] | int, model: Opt) -> None:
    """Makes an OPT's positions sines that begin at `start`."""
    positions: Any = model.model.decoder.embed_positions
    rows, width = positions.embedding.shape
    places = places_in_line(rows + QUERIES, width)
    positions.embedding = positions.embedding.replace(
        jax.lax.dynamic_slice_in_dim(places, start, rows)
    )


def have_eyes(model: Opt, word: Float[Array, " d"]) -> None:
    """Starts an OPT in which half the heads are drawn to what has the `word` in it that projected
    queries have in common. Without this, words look at themselves for very long.
    """
    word = (word - word.mean()) / word.std()
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        keys = word @ attention.k_proj.kernel[...]
        is_drawn = jnp.arange(attention.heads, dtype=jnp.int32) % 2 == 1
        heads = jnp.repeat(is_drawn.astype(jnp.float32), keys.size // attention.heads)
        bias: Any = attention.q_proj.bias
        bias[...] = EYES * heads * keys


def pixels_of(scenes: Sequence[Scene]) -> Float[np.ndarray, "i c height width"]:
    """Pixels as the image processor hands them to the model."""
    return np.stack([normalise(scene.pixels) for scene in scenes])


def tokens_of(grid: np.ndarray) -> np.ndarray:
    """A grid of patches in the order of the tokens; the class token in front has no label."""
    return np.pad(grid.reshape(-1), (1, 0))


def see(tower: Any, pixels: Float[Array, "i c height width"]) -> Float[Array, "i n d"]:
    """What the tower makes of scenes."""
    return tower(pixels)[0]


@pytree
class CellBatch:
    """What the tower makes of scenes, and what is in their cells."""

    features: Float[Array, "i n d"]
    labels: dict[str, Int[Array, "i cells"]]


def cell_labels(scenes: Sequence[Scene]) -> dict[str, Int[np.ndarray, "i cells"]]:
    """What is in each cell, row by row."""
    out = {name: np.zeros((len(scenes), CELLS), np.int32) for name in IN_CELL}
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            for name, labels in out.items():
                cell = 4 * thing.row + thing.column
                labels[number, cell] = LABELS[name].index(getattr(thing, name))
    return out


def probes(
    labels: dict[str, Int[np.ndarray, "i cells"]], width: int, seed: int
) -> dict[str, dict[str, Array]]:
    """What stage 2 learns besides the Q-Former: probes that ask, keys of the queries to be found
    by, and a head for each sort of label.

    Heads start with how often each label is weighted in: else the queries would learn that first,
    and all the same.
    """
    ask, key = jax.random.split(jax.random.key(seed))
    often = {}
    for name, some in labels.items():
        counts = np.bincount(some[some > 0], minlength=len(LABELS[name])) / (some > 0).sum()
        counts[0] = 1  # empty cells weigh as much as all objects together
        often[name] = jnp.asarray(np.log(counts / 2 + 1e-4), jnp.float32)
    return {
        "probes": {
            "ask": jax.random.normal(ask, (CELLS, width)),
            "key": jax.random.normal(key, (width, width)) * width**-0.5,
        },
        "heads": {name: jnp.zeros((width, len(LABELS[name]))) for name in labels},
        "often": often,
    }


def in_lines(probes: dict[str, Array]) -> Float[Array, "d lines"]:
    """What reads off a query in which row and in which column of cells it was found."""
    ask, key = probes["ask"], probes["key"]
    cells = np.arange(CELLS, dtype=np.int32)
    lines = np.concatenate([np.eye(4)[cells // 4], np.eye(4)[cells % 4]], axis=1)
    return key @ ask.T @ jnp.asarray(lines, jnp.float32) * ask.shape[1] ** -0.5


def qformer_stage(steps: int, graph: nnx.GraphDef, features: Bank, seed: int) -> Stage:
    """What is in each cell, by the queries that its probe attends to."""
    labels = cell_labels(features.scenes)

    def batch(step: int) -> CellBatch:
        rng = np.random.default_rng((seed, step))
        numbers = rng.integers(len(features.scenes), size=PROBED)
        return CellBatch(
            features=jnp.asarray(features.features[numbers].astype(np.float32)),
            labels={name: jnp.asarray(some[numbers]) for name, some in labels.items()},
        )

    def loss(
        params: dict[str, Any], frozen: None, batch: CellBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        qformer, query_tokens = nnx.merge(graph, params["queries"])
        states = read(qformer, query_tokens[...], batch.features)
        width = states.shape[-1]
        found = states @ params["probes"]["key"]
        scores = jnp.einsum("cd,iqd->icq", params["probes"]["ask"], found) * 2 * width**-0.5
        attention = jax.nn.softmax(scores, axis=-1)
        is_object = (batch.labels["name"] > 0).astype(jnp.float32)
        weights = is_object / is_object.sum() + (1 - is_object) / (1 - is_object).sum()
        total, figures = jnp.zeros(()), {}
        for name, labels in batch.labels.items():
            said = jnp.einsum("icq,iqv->icv", attention, states @ params["heads"][name])
            logits = said + params["often"][name][None, None]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            total += (losses * weights).sum() / 2
            is_right = (logits.argmax(axis=-1) == labels).astype(jnp.float32)
            figures[name] = (is_right * is_object).sum() / is_object.sum()
        return total, {"loss": total, **figures}

    return adamw_stage("qformer", steps, loss, batch, peak=1e-3, seed=seed)


def read(
    qformer: Any, query_tokens: Float[Array, "1 q d"], features: Float[Array, "i n e"]
) -> Float[Array, "i q d"]:
    """The queries' last states."""
    queries = jnp.broadcast_to(query_tokens, (len(features), *query_tokens.shape[1:]))
    return qformer(queries, queries.shape[1], features)[0]


def answers_loss(graph: nnx.GraphDef) -> Any:
    """Loss of stage 3: the answers, and what words should know (`scene_words`). An OPT counts on
    from anywhere: as if fewer queries were in front of its words.
    """

    def loss(
        params: Any, frozen: Any, batch: SceneBatch, key: Array
    ) -> tuple[Float[Array, ""], Figures]:
        model = nnx.merge(graph, frozen, params["model"])
        if isinstance(model.language_model, Opt):
            count_from(jax.random.randint(key, (), 0, QUERIES + 1), model.language_model)
        return words_loss(model, params["heads"], batch)

    return loss


def main(
    out: Annotated[Path, typer.Option(help="folder for the checkpoint in Hugging Face format")],
    which: Annotated[str, typer.Option("--kind", help="language model: opt or t5")] = "opt",
    work: Annotated[Path, typer.Option(help="folder for checkpoints to resume from")] = Path(
        "scenes-blip2-work"
    ),
    seed: Annotated[int, typer.Option(help="fixes every random choice")] = 0,
    tower_steps: Annotated[int, typer.Option(help="steps of stage 1, of 8 scenes")] = 1600,
    qformer_steps: Annotated[int, typer.Option(help="steps of stage 2, of 32 scenes")] = 1200,
    answers_steps: Annotated[
        int | None,
        typer.Option(help="steps of stage 3, of 16 scenes; else 5500 (opt) or 3400 (t5)"),
    ] = None,
    scenes: Annotated[int, typer.Option(help="scenes that stages 2 and 3 see")] = 4096,
    test_scenes: Annotated[int, typer.Option(help="scenes that the result is judged by")] = 400,
) -> None:
    """Train a mini BLIP-2 on scenes and write it in Hugging Face format.

    Run it again with the same options to resume after an interruption.
    """
    config = scenes_config(which)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder or delete it first")
    options = {
        "seed": seed,
        "tower_steps": tower_steps,
        "qformer_steps": qformer_steps,
        "scenes": scenes,
    }
    check_options(options, work)
    last_steps = ANSWERS_STEPS[which] if answers_steps is None else answers_steps
    own = work / which  # stages 1 and 2 are those of both kinds
    check_options({"answers_steps": last_steps, "mix": repr(MIX[which])}, own)
    shared, apart = work / "shared_log.jsonl", own / "log.jsonl"
    model = initialise(config, seed)
    know_places(model.vision_model)

    graph, tower = nnx.split(model.vision_model)
    heads, patch = empty_heads(config.vision.hidden_size), config.vision.patch_size
    stage = tower_stage(tower_steps, see, graph, pixels_of, tokens_of, patch, seed)
    trained = train(stage, {"tower": tower, **heads}, work / "tower", shared)
    nnx.update(model.vision_model, trained["tower"])

    seen = [make_scene("train", number, seed=seed) for number in range(scenes)]
    graph, tower = nnx.split(model.vision_model)
    look = jax.jit(lambda tower, pixels: see(nnx.merge(graph, tower), pixels))
    tokenizer = make_tokenizer(which, seen[:600])
    text = make_text(tokenizer, config)
    features = Bank(seen, lambda some: look(tower, jnp.asarray(pixels_of(some))), rows_of(text))
    look_apart(model, jnp.asarray(features.features[:64].astype(np.float32)))
    graph, queries = nnx.split((model.qformer, model.query_tokens))
    probing = probes(cell_labels(seen), config.qformer.hidden_size, seed)
    stage = qformer_stage(qformer_steps, graph, features, seed)
    trained = train(stage, {"queries": queries, **probing}, work / "qformer", shared)
    nnx.update((model.qformer, model.query_tokens), trained["queries"])

    reading = jnp.concatenate([trained["heads"][name][:, 1:] for name in IN_CELL], axis=1)
    places = in_lines(trained["probes"])
    say_what_is_seen(model, reading, [text.answer(word)[0] for word in SEEN], places)
    is_learned = nnx.Any(*map(nnx.PathContains, ("language_model", "language_projection")))
    if isinstance(model.language_model, T5):
        look_along(model.language_model)
    if isinstance(model.language_model, Opt):
        word: Any = model.language_projection.bias
        have_eyes(model.language_model, word[...])
        count_from(QUERIES, model.language_model)
        is_learned = nnx.All(is_learned, nnx.Not(nnx.PathContains("embed_positions")))

    def encoder(model: Blip2) -> Callable[[Sequence[Scene]], Array]:
        graph, state = nnx.split(model)
        encode = jax.jit(lambda state, pixels: nnx.merge(graph, state).encode(pixels)[0])
        return lambda some: encode(state, jnp.asarray(pixels_of(some)))

    heads = word_heads(model.language_model)
    bank = Bank(seen, encoder(model), rows_of(text), labels_of(text))
    graph, params, frozen = nnx.split(model, is_learned, ...)
    stage = adamw_stage(
        "answers",
        last_steps,
        answers_loss(graph),
        lambda step: bank.draw(step, last_steps, seed, MIX[which]),
        peak=1.5e-3,
        seed=seed,
    )
    start = {"model": params, "heads": heads}
    trained = train(stage, start, own / "answers", apart, frozen=frozen)
    model = nnx.merge(graph, trained["model"], frozen)

    log = own / "whole_log.jsonl"
    log.write_text(shared.read_text() + apart.read_text())
    processor = make_blip2_processor(tokenizer, config.vision.image_size, QUERIES)
    write(model, processor, out)
    test = questions_of("test", test_scenes, each=2)
    bank = Bank([scene for scene, _ in test], encoder(model), rows_of(text))
    figures = evaluate(answered(model), bank, [asked for _, asked in test])
    figures |= {"scenes": test_scenes, "minutes of training": minutes(log)}
    line = json.dumps({"stage": "test", **figures}) + "\n"
    (out / "training_log.jsonl").write_text(log.read_text() + line)
    language = "OPT" if which == "opt" else "Flan-T5"
    readme = card(
        f"Mini BLIP-2 {language} for scenes",
        f"A BLIP-2 with {language}",
        "blip-2",
        sum(x.size for x in jax.tree.leaves(nnx.state(model))),
        "scenes_blip2",
        {"out": f"scenes-blip2-{which}", "kind": which, "seed": seed},
        {"tower": tower_steps, "qformer": qformer_steps, "answers": last_steps},
        figures,
    )
    (out / "README.md").write_text(readme)
    typer.echo(json.dumps(figures, indent=2))


def make_tokenizer(which: str, scenes: Sequence[Scene]) -> Any:
    """OPT's or T5's kind of tokenizer, from the words of all questions about some scenes."""
    special = OPT_SPECIAL if which == "opt" else T5_SPECIAL
    return train_blip2_tokenizer(texts_about(scenes), special, VOCABULARY, 512)


if __name__ == "__main__":
    try:
        typer.run(main)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
