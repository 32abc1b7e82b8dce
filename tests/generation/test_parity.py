"""Greedy generation against transformers' `generate`, token by token."""

import contextlib
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from catp_jax.generation import generate as programs
from catp_jax.generation.decoding import Stop
from catp_jax.generation.sampling import sampling
from catp_jax.models.cross_decoder import MaskMode
from tests.parity.tiny import CONFIGS, batch, hf_inputs, meta_masks, our_inputs, tiny

NEW, PAD = 32, 0


@functools.cache
def theirs(name: str, samples: str, is_meta: bool = False, end: int | None = None) -> np.ndarray:
    """transformers' new tokens, the prompts padded on the left as it wants them."""
    hf, _, config = tiny(name)
    inputs = hf_inputs(batch(samples), config, is_left_padded=True)
    hf.generation_config.eos_token_id = end
    hf.generation_config.pad_token_id = PAD
    # transformers takes the length of the text from the cache of layer 0, which must not be a
    # cross-attention layer
    has_cache = 0 not in config.text.cross_attention_layers
    with torch.no_grad(), meta_masks(hf) if is_meta else contextlib.nullcontext():
        out = hf.generate(**inputs, max_new_tokens=NEW, do_sample=False, use_cache=has_cache)
    return out[:, inputs["input_ids"].shape[1] :].numpy()


def ours(name: str, samples: str, mode: MaskMode, end: int | None = None) -> programs.Generated:
    """Our new tokens, the prompts padded on the right."""
    _, model, config = tiny(name)
    inputs = our_inputs(batch(samples), config, mode)
    return programs.generate(
        model,
        (),
        inputs,
        sampling(len(batch(samples))),
        Stop(
            ends=jnp.asarray([-1 if end is None else end], jnp.int32),
            pad=jnp.asarray(PAD, jnp.int32),
            max_new_tokens=NEW,
        ),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_mode_hf_gives_transformers_tokens_on_a_mixed_batch(name: str):
    # text before the image, an image in front, no image, several images, several tiles, padding
    expected = theirs(name, "everything")
    assert expected.shape == (5, NEW)
    assert len({tuple(row) for row in expected.tolist()}) > 1
    np.testing.assert_array_equal(ours(name, "everything", "hf").tokens, expected)


def test_mode_meta_gives_transformers_tokens_where_every_prompt_begins_with_its_image():
    np.testing.assert_array_equal(ours("gqa", "tiles", "meta").tokens, theirs("gqa", "tiles"))


def test_mode_meta_gives_the_tokens_of_transformers_with_metas_masks():
    expected = theirs("gqa", "everything", is_meta=True)
    np.testing.assert_array_equal(ours("gqa", "everything", "meta").tokens, expected)
    assert (expected != theirs("gqa", "everything")).any()


def test_without_images_the_tokens_are_transformers_in_both_modes():
    expected = theirs("gqa", "no image")
    for mode in ("meta", "hf"):
        np.testing.assert_array_equal(ours("gqa", "no image", mode).tokens, expected)


def test_the_end_token_ends_where_it_does_in_transformers():
    free = theirs("gqa", "everything")
    # a token that ends some samples early and others never
    end = next(
        token
        for token in np.unique(free)
        if token != PAD and 0 < (free == token).any(axis=1).sum() < 5
    )
    expected = theirs("gqa", "everything", end=int(end))
    out = ours("gqa", "everything", "hf", end=int(end))
    tokens = np.asarray(out.tokens)[:, : expected.shape[1]]
    np.testing.assert_array_equal(tokens, expected)
    for row, length in enumerate(out.lengths.tolist()):
        assert (length < NEW) == (end in expected[row])
        if length < NEW:
            assert expected[row, length - 1] == end
