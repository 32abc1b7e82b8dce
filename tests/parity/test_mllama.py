"""Our Llama 3.2 Vision against transformers' in float32: part by part, then logits of every row."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catp_jax.models.cache import Slots, causal_mask
from catp_jax.models.cross_decoder import Branches, MaskMode
from catp_jax.models.layers import rope_angles
from catp_jax.models.mllama import Inputs, Mllama
from tests.parity.tiny import (
    CONFIGS,
    batch,
    hf_inputs,
    meta_masks,
    our_inputs,
    relative_difference,
    tiny,
)

TOLERANCE = 1e-5  # of the reference's scale; observed below 2e-6
read = jax.jit(lambda part, *given: part(*given))  # as one program: operation by operation is slow
project = jax.jit(lambda attention, features: attention.project(features))


def rows_of(samples) -> list[tuple[int, slice]]:
    """Where each sample's own tokens are, without the padding."""
    return [(row, slice(len(sample.tokens))) for row, sample in enumerate(samples)]


@pytest.mark.parametrize("name", CONFIGS)
def test_no_branch_is_idle(name: str):
    """What would let any model pass: a gate at zero, a norm at one."""
    hf, _, _ = tiny(name)
    for key, value in hf.state_dict().items():
        if "gate" in key and value.shape == (1,):
            assert 0.3 < abs(value.item()) < 1
        if "norm" in key and key.endswith("weight"):
            assert (value - 1).abs().max() > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_vision_tower(name: str):
    hf, ours, config = tiny(name)
    inputs = hf_inputs(batch("everything"), config)
    with torch.no_grad():
        theirs = hf.model.vision_model(
            pixel_values=inputs["pixel_values"],
            aspect_ratio_ids=inputs["aspect_ratio_ids"],
            aspect_ratio_mask=inputs["aspect_ratio_mask"],
        ).last_hidden_state
    samples, images = theirs.shape[:2]
    flat = {key: jnp.asarray(inputs[key].flatten(0, 1).numpy()) for key in inputs if "a" in key}
    features = read(
        ours.vision_model,
        flat["pixel_values"],
        flat["aspect_ratio_ids"].astype(jnp.int32),
        flat["aspect_ratio_mask"].astype(bool),
    )
    assert relative_difference(features, theirs.reshape(samples * images, *theirs.shape[2:])) < (
        TOLERANCE
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_self_attention_layer(name: str):
    hf, ours, config = tiny(name)
    text = hf.model.language_model
    index = next(i for i in range(5) if i not in config.text.cross_attention_layers)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, config.text.hidden_size)).astype(np.float32)
    valid = np.arange(7)[None] < np.asarray([[7], [4]])
    positions = np.broadcast_to(np.arange(7), (2, 7))
    with torch.no_grad():
        cos_sin = text.rotary_emb(torch.from_numpy(x), torch.from_numpy(positions.copy()))
        allowed = np.tril(np.ones((7, 7), bool))[None] & valid[:, None, :]
        bias = np.where(allowed, 0, np.finfo(np.float32).min).astype(np.float32)[:, None]
        theirs = text.layers[index](
            torch.from_numpy(x),
            attention_mask=torch.from_numpy(bias),
            position_embeddings=cos_sin,
        )
    slots = Slots(positions=jnp.asarray(positions, jnp.int32), valid=jnp.asarray(valid))
    rope = rope_angles(slots.positions, config.text.rope, config.text.head_dim)
    layer = ours.language_model.layers[index]
    result, _, _ = read(layer, x, rope, causal_mask(slots, slots))
    assert relative_difference(result, theirs) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_cross_attention_layer(name: str):
    hf, ours, config = tiny(name)
    index = config.text.cross_attention_layers[0]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, config.text.hidden_size)).astype(np.float32)
    features = rng.normal(size=(2, 11, config.text.hidden_size)).astype(np.float32)
    sees = rng.random((2, 7, 11)) < 0.5
    sees[1, 3] = False
    feeds = sees.any(-1)
    mask = sees | ~feeds[..., None]  # where transformers lets a row attend to everything
    bias = np.where(mask, 0, np.finfo(np.float32).min).astype(np.float32)[:, None]
    with torch.no_grad():
        theirs = hf.model.language_model.layers[index](
            torch.from_numpy(x),
            cross_attention_states=torch.from_numpy(features),
            cross_attention_mask=torch.from_numpy(bias),
            attention_mask=None,
            full_text_row_masked_out_mask=torch.from_numpy(
                feeds.astype(np.float32)[:, None, :, None]
            ),
        )
    layer = ours.language_model.layers[index]
    cache = project(layer.cross_attn, features)
    everyone = jnp.ones(feeds.shape, bool)
    result = read(layer, x, cache, mask, Branches(attends=everyone, feeds=jnp.asarray(feeds)))
    assert relative_difference(result, theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "batch_name", "mode"),
    [
        *((name, "everything", mode) for name in CONFIGS for mode in ("hf", "meta")),
        *(("gqa", "tiles", mode) for mode in ("hf", "meta")),
        *(("gqa", batch_name, "hf") for batch_name in ("one tile", "no image")),
    ],
)
def test_logits_of_every_row(name: str, batch_name: str, mode: MaskMode):
    hf, ours, config = tiny(name)
    samples = batch(batch_name)
    as_meta = meta_masks(hf) if mode == "meta" else contextlib.nullcontext()
    with torch.no_grad(), as_meta:
        theirs = hf(**hf_inputs(samples, config)).logits
    result = logits(ours, our_inputs(samples, config, mode))
    for row, own in rows_of(samples):
        assert relative_difference(result[row, own], theirs[row, own]) < TOLERANCE


def test_modes_differ_where_they_should():
    """Text before the image leaks in mode "hf"; a prompt with its image in front is the same."""
    _, ours, config = tiny("gqa")
    samples = batch("everything")
    hf, meta = (logits(ours, our_inputs(samples, config, mode)) for mode in ("hf", "meta"))
    apart = np.abs(np.asarray(hf - meta)).max(axis=-1)
    assert apart[0, 0] > 1e-2  # before the image
    assert apart[2, 0] > 1e-2  # no image
    assert apart[1, :3].max() < 1e-4


@jax.jit
def logits(model: Mllama, inputs: Inputs) -> jax.Array:
    return model(inputs)
