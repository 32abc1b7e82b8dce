"""A model computes in the dtype of its weights; no part of it widens the rest."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import convert
from catp_jax.generation.generate import prefill, step
from catp_jax.models.mllama import Images, Inputs, MllamaConfig
from catp_jax.pruning import TrimmedLlama

ROWS, TILES, NEW = 16, 4, 3


def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def one_image(size):
    return Inputs(
        tokens=jnp.zeros((1, ROWS), jnp.int32),
        token_valid=jnp.ones((1, ROWS), bool),
        images=Images(
            pixels=jnp.zeros((1, TILES, 3, size, size)),
            aspect_ratio_ids=jnp.zeros(1, jnp.int32),
            aspect_ratio_mask=jnp.ones((1, TILES), bool),
            tile_index=jnp.zeros((1, TILES), jnp.int32),
            tile_valid=jnp.ones((1, TILES), bool),
            tile_seen=jnp.ones((1, ROWS, TILES), bool),
        ),
    )


LLAMA = MllamaConfig.llama_3_2_11b()
# One cross-attention layer between two of self-attention: the others are the same code again.
SHALLOW = dataclasses.replace(
    LLAMA,
    text=dataclasses.replace(LLAMA.text, num_hidden_layers=3, cross_attention_layers=(1,)),
)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_caches_and_logits_have_the_dtype_of_the_weights(dtype):
    config = SHALLOW
    model = convert.abstract(config)
    model = jax.tree.map(lambda leaf: abstract(leaf.shape, dtype), model)
    inputs = jax.eval_shape(lambda: one_image(config.vision.image_size))
    pruners = (TrimmedLlama(keep=100),)
    out = jax.eval_shape(
        lambda model, inputs: prefill(model, pruners, inputs, new_slots=NEW),
        model,
        inputs,
    )
    again = jax.eval_shape(
        lambda model, cache: step(model, (), jnp.zeros(1, jnp.int32), cache)[:2],
        model,
        out.cache,
    )
    for logits, cache in ((out.logits, out.cache), again):
        assert logits.dtype == dtype
        assert {
            leaf.dtype
            for part in (*cache.text, *cache.cross, cache.tail)
            for leaf in jax.tree.leaves(part.blocks)
        } == {jnp.dtype(dtype)}


def test_a_visual_token_of_the_11b_takes_32_kib_of_cross_attention_cache():
    config = LLAMA
    model = convert.abstract(config)
    model = jax.tree.map(lambda leaf: abstract(leaf.shape, jnp.bfloat16), model)
    features = abstract((1, 10, config.text.hidden_size), jnp.bfloat16)
    layers = [model.language_model.layers[i] for i in config.text.cross_attention_layers]
    caches = [
        jax.eval_shape(lambda layer, x: layer.cross_attn.project(x), layer, features)
        for layer in layers
    ]
    assert sum(leaf.size * 2 for leaf in jax.tree.leaves(caches)) == 10 * 32 * 1024
