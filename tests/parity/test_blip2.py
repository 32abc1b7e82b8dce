"""Our BLIP-2 against transformers' in float32: part by part, then whole."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import T5Config as HfT5Config
from transformers.models.t5.modeling_t5 import T5Attention as HfT5Attention

from catp_jax.contract import Attention, Room, keep_all
from catp_jax.models.cache import Slots
from catp_jax.models.t5 import T5Attention, T5Config
from tests.parity.tiny import relative_difference
from tests.parity.tiny_blip2 import CONFIGS, GENERATING, QUERIES, RETRIEVING, Prompts, Side, tiny

TOLERANCE = 1e-5  # of the reference's scale
OPTS = [name for name in GENERATING if name.startswith("opt")]
T5S = [name for name in GENERATING if name.startswith("t5")]


@jax.jit
def weights(attention: Attention) -> jax.Array:
    """What an attention layer puts on each column, [b, h, s, n]."""
    logits = jnp.einsum("bshd,bnhd->bhsn", attention.queries, attention.keys)
    return jax.nn.softmax(logits, axis=-1)


@contextlib.contextmanager
def self_attention(qformer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the weights of each layer; in `attentions` transformers mixes cross-attention in."""
    found: list[torch.Tensor] = []
    hooks = [
        layer.attention.attention.register_forward_hook(
            lambda module, arguments, output: found.append(output[1])
        )
        for layer in qformer.encoder.layer
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def embedded(config, lengths: tuple[int, ...], side: Side) -> tuple[np.ndarray, np.ndarray, Slots]:
    """Random embeddings, which of them are no padding, and our slots for them."""
    text = config.text
    width = text.hidden_size if hasattr(text, "hidden_size") else text.d_model
    longest = max(lengths)
    x = np.random.default_rng(0).normal(size=(len(lengths), longest, width)).astype(np.float32)
    number, own = np.arange(longest)[None], np.asarray(lengths)[:, None]
    valid = number < own if side == "right" else number >= longest - own
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)
    return x, valid, Slots(positions=jnp.asarray(positions), valid=jnp.asarray(valid))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_parameter_is_at_rest(name: str):
    """What would let a wrong model pass: zeros, ones, or numbers too small to matter."""
    hf, _, _ = tiny(name)
    for key, value in hf.named_parameters():
        assert value.abs().max() > 0.1, key
        assert value.std() > 0.02, key
        if "norm" in key.lower() and key.endswith("weight"):
            assert (value - 1).abs().max() > 0.1, key


@pytest.mark.parametrize("name", CONFIGS)
def test_vision_model_and_its_last_attention(name: str):
    hf, ours, config = tiny(name)
    pixels = Prompts(config, 0).pixels()
    with torch.no_grad():
        theirs = hf.vision_model(torch.from_numpy(pixels), output_attentions=True)
    tokens, attention = jax.jit(ours.vision_model.__call__)(pixels)
    assert relative_difference(tokens, theirs.last_hidden_state) < TOLERANCE
    assert len(theirs.attentions) == config.vision.num_hidden_layers
    assert relative_difference(weights(attention), theirs.attentions[-1]) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_qformer_and_the_attention_of_its_layers(name: str):
    hf, ours, config = tiny(name)
    shape = (3, config.vision.tokens, config.vision.hidden_size)
    image = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    with torch.no_grad(), self_attention(hf.qformer) as references:
        theirs = hf.qformer(
            query_embeds=hf.query_tokens.expand(3, -1, -1),
            encoder_hidden_states=torch.from_numpy(image),
            output_attentions=True,
        )
    queries = jnp.broadcast_to(ours.query_tokens[...], (3, QUERIES, config.qformer.hidden_size))
    x, among, cross = jax.jit(lambda q, i: ours.qformer(q, QUERIES, i))(queries, image)
    assert relative_difference(x, theirs.last_hidden_state) < TOLERANCE
    assert len(among) == len(references) == config.qformer.num_hidden_layers
    assert len(cross) == len(theirs.cross_attentions) == len(config.qformer.cross_layers)
    for mine, reference in zip(among, references, strict=True):
        assert relative_difference(weights(mine), reference) < TOLERANCE
    for mine, reference in zip(cross, theirs.cross_attentions, strict=True):
        assert relative_difference(weights(mine), reference) < TOLERANCE


@pytest.mark.parametrize("name", GENERATING)
def test_evidence_of_prompts_is_that_of_their_images(name: str):
    """Prompts 0 and 2 share image 1; the view shows each its own image's attention."""
    hf, ours, config = tiny(name)
    prompts = Prompts(config, 2)
    index = [1, 0, 1]
    inputs = dataclasses.replace(prompts.ours("right"), image_index=jnp.asarray(index, jnp.int32))
    view = jax.jit(ours.front)(inputs).view
    with torch.no_grad(), self_attention(hf.qformer) as references:
        pixels = torch.from_numpy(prompts.pixels()[index])
        vision = hf.vision_model(pixels, output_attentions=True)
        theirs = hf.qformer(
            query_embeds=hf.query_tokens.expand(3, -1, -1),
            encoder_hidden_states=vision.last_hidden_state,
            output_attentions=True,
        )
    assert relative_difference(view.tokens, theirs.last_hidden_state) < TOLERANCE
    evidence = view.evidence
    pairs = [
        *zip(evidence.cross, theirs.cross_attentions, strict=True),
        *zip(evidence.among, references, strict=True),
        (evidence.vision, vision.attentions[-1]),
    ]
    for mine, reference in pairs:
        assert relative_difference(weights(mine), reference) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", OPTS)
def test_opt(name: str, side: Side):
    hf, ours, config = tiny(name)
    x, valid, slots = embedded(config, (5, 11, 8), side)
    with torch.no_grad():
        theirs = hf.language_model(
            inputs_embeds=torch.from_numpy(x), attention_mask=torch.from_numpy(valid.astype(int))
        ).logits
    mine = jax.jit(ours.language_model.__call__)(x, slots)
    assert relative_difference(np.asarray(mine)[valid], theirs[torch.from_numpy(valid)]) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", T5S)
def test_t5_encoder_and_decoder(name: str, side: Side):
    hf, ours, config = tiny(name)
    x, valid, slots = embedded(config, (5, 14, 8), side)
    mask = torch.from_numpy(valid.astype(int))
    with torch.no_grad():
        encoded = hf.language_model.encoder(
            inputs_embeds=torch.from_numpy(x), attention_mask=mask
        ).last_hidden_state
    mine = jax.jit(ours.language_model.encode)(x, slots)
    own = torch.from_numpy(valid)
    assert relative_difference(np.asarray(mine)[valid], encoded[own]) < TOLERANCE

    tokens = np.random.default_rng(2).integers(2, 40, (3, 13)).astype(np.int32)
    tokens[:, 0] = 0
    with torch.no_grad():
        theirs = hf.language_model(
            inputs_embeds=torch.from_numpy(x),
            attention_mask=mask,
            decoder_input_ids=torch.from_numpy(tokens.astype(np.int64)),
        ).logits
    mine = jax.jit(ours.language_model.__call__)(x, slots, tokens)
    assert relative_difference(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize(("number", "farthest"), [(32, 128), (8, 9), (6, 20), (4, 3), (20, 50)])
def test_bias_of_every_distance(number: int, farthest: int, is_decoder: bool):
    """Of as many tokens as have twice the farthest distance that is told apart."""
    sizes = {
        "relative_attention_num_buckets": number,
        "relative_attention_max_distance": farthest,
        "num_heads": 3,
        "d_model": 8,
        "d_kv": 4,
    }
    hf = HfT5Attention(HfT5Config(**sizes, is_decoder=is_decoder), True, layer_idx=0)
    table = np.random.default_rng(0).normal(size=(number, 3)).astype(np.float32)
    hf.relative_attention_bias.weight.data = torch.from_numpy(table)
    length = 2 * farthest + 1
    with torch.no_grad():
        theirs = hf.compute_bias(length, length).numpy()

    config = dataclasses.replace(T5Config.flan_t5_xl(), **sizes)
    ours = T5Attention(config, True, rngs=nnx.Rngs(0))
    ours.relative_attention_bias.embedding[...] = jnp.asarray(table)
    places = jnp.arange(length, dtype=jnp.int32)[None]
    mine = np.asarray(ours.bias(places, places, not is_decoder))
    if is_decoder:  # later tokens are masked
        theirs, mine = np.tril(theirs), np.tril(mine)
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", OPTS)
def test_logits_of_every_row_with_opt(name: str, side: Side):
    hf, ours, config = tiny(name)
    prompts = Prompts(config, 3)
    inputs = prompts.hf(side)
    with torch.no_grad():
        theirs = hf(**inputs).logits
    mine = jax.jit(lambda model, inputs: model(inputs))(ours, prompts.ours(side))
    own = np.concatenate([np.ones((3, QUERIES), bool), prompts.tokens(side)[1]], axis=1)
    reference = theirs[inputs["attention_mask"].bool()]
    assert relative_difference(np.asarray(mine)[own], reference) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", T5S)
def test_logits_of_every_row_with_t5(name: str, side: Side):
    hf, ours, config = tiny(name)
    prompts = Prompts(config, 3)
    tokens = np.random.default_rng(4).integers(2, 40, (3, 5)).astype(np.int32)
    tokens[:, 0] = 0
    with torch.no_grad():
        theirs = hf(
            **prompts.hf(side), decoder_input_ids=torch.from_numpy(tokens.astype(np.int64))
        ).logits
    mine = jax.jit(lambda model, inputs, tokens: model(inputs, decoder_tokens=tokens))(
        ours, prompts.ours(side), tokens
    )
    assert relative_difference(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", GENERATING)
def test_logits_of_cached_steps(name: str, side: Side):
    """A prefill, then three tokens one by one, against transformers without a cache."""
    hf, ours, config = tiny(name)
    prompts, steps = Prompts(config, 5), 3
    new = np.random.default_rng(6).integers(2, 40, (3, steps)).astype(np.int32)
    inputs = prompts.hf(side)
    after = torch.from_numpy(new.astype(np.int64))
    with torch.no_grad():
        if name in T5S:
            start = torch.zeros((3, 1), dtype=torch.int64)
            theirs = hf(**inputs, decoder_input_ids=torch.cat([start, after], 1)).logits
        else:
            rows = []
            for row in range(3):  # one by one, without padding
                own = inputs["attention_mask"][row].bool()
                tokens = torch.cat([inputs["input_ids"][row][own], after[row]])[None]
                pixels = inputs["pixel_values"][row : row + 1]
                logits = hf(pixel_values=pixels, input_ids=tokens).logits
                rows.append(logits[0, -steps - 1 :])
            theirs = torch.stack(rows)

    def first(model, inputs):
        return model.back(model.front(inputs), keep_all, Room(new=steps))

    logits, cache = jax.jit(first)(ours, prompts.ours(side))
    found, step = (
        [logits],
        jax.jit(lambda model, tokens, cache: model.step(tokens, cache, keep_all)),
    )
    for number in range(steps):
        logits, cache = step(ours, new[:, number], cache)
        found.append(logits)
    assert relative_difference(jnp.stack(found, axis=1), theirs) < TOLERANCE


def texts(config) -> tuple[np.ndarray, np.ndarray]:
    """Texts of different lengths, padded on the right, as many as images."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(2, 40, (3, 8)).astype(np.int32)
    valid = np.arange(8)[None] < np.asarray([[8], [3], [5]])
    return np.where(valid, tokens, 0), valid


def hf_texts(config, tokens: np.ndarray, valid: np.ndarray) -> dict[str, torch.Tensor]:
    """For transformers, which cuts placeholders off if the configuration knows of any."""
    if config.image_token_index is not None:
        marks = np.full((len(tokens), QUERIES), config.image_token_index)
        tokens = np.concatenate([marks, tokens], axis=1)
        valid = np.concatenate([np.ones_like(marks), valid], axis=1)
    return {
        "input_ids": torch.from_numpy(tokens.astype(np.int64)),
        "attention_mask": torch.from_numpy(valid.astype(np.int64)),
    }


@pytest.mark.parametrize("name", RETRIEVING)
def test_image_text_matching(name: str):
    hf, ours, config = tiny(name)
    pixels, (tokens, valid) = Prompts(config, 8).pixels(), texts(config)
    with torch.no_grad():
        theirs = hf(
            pixel_values=torch.from_numpy(pixels),
            **hf_texts(config, tokens, valid),
            use_image_text_matching_head=True,
        ).logits_per_image
    mine = jax.jit(ours.itm)(pixels, tokens, valid)
    assert relative_difference(mine, theirs) < TOLERANCE


@pytest.mark.parametrize("name", RETRIEVING)
def test_image_text_contrast(name: str):
    """Two images and three texts, so that a transposed table cannot pass."""
    hf, ours, config = tiny(name)
    pixels, (tokens, valid) = Prompts(config, 9, (1, 1)).pixels(), texts(config)
    with torch.no_grad():
        theirs = hf(pixel_values=torch.from_numpy(pixels), **hf_texts(config, tokens, valid))
    scores, *features = jax.jit(
        lambda model, pixels, tokens, valid: (
            model.itc(pixels, tokens, valid),
            model.image_features(pixels),
            model.text_features(tokens, valid),
        )
    )(ours, pixels, tokens, valid)
    assert scores.shape == (2, 3)
    assert relative_difference(scores, theirs.logits_per_image) < TOLERANCE
    assert relative_difference(features[0], theirs.image_embeds) < TOLERANCE
    assert relative_difference(features[1], theirs.text_embeds) < TOLERANCE
