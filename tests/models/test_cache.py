"""Blocks and tails: what a new token reads, against a plain softmax over all keys in a row."""

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.models.cache import Block, KeysValues, Past, Read, attend_blocks, capacity, padded

PROMPTS, BEAMS, KV, GROUP, CHANNELS = 2, 3, 2, 3, 4
ROWS, HEADS = PROMPTS * BEAMS, KV * GROUP


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def made(rows: int, tokens: int, seed: int) -> KeysValues:
    shape = (rows, tokens, KV, CHANNELS)
    return KeysValues(
        keys=jnp.asarray(draw(*shape, seed=seed)), values=jnp.asarray(draw(*shape, seed=seed + 1))
    )


def plain(queries, columns, scale):
    """One row and head after the other; `columns`: (keys, values, seen, bias) by row and head."""
    out = np.zeros((ROWS, 1, HEADS, CHANNELS))
    for row in range(ROWS):
        for head in range(HEADS):
            keys, values, bias = columns(row, head)
            logits = keys.astype(np.float64) @ queries[row, 0, head] * scale + bias
            weights = np.exp(logits - logits.max())
            out[row, 0, head] = weights / weights.sum() @ values
    return out


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("tokens", [5, 131])
def test_beams_read_their_prompts_block_and_their_own_tails_under_one_softmax(tokens, scale):
    queries = draw(ROWS, 1, HEADS, CHANNELS, seed=0)
    prompt, before, new = made(PROMPTS, tokens, 1), made(ROWS, 2, 3), made(ROWS, 1, 5)
    valid = np.random.default_rng(7).random((PROMPTS, tokens)) < 0.6
    valid[:, 1] = True
    bias = draw(HEADS, 4, seed=8)
    tail = Block.empty(new, 4).write(before, jnp.asarray(0))
    past = Past(
        prompt=Read(block=Block.of(prompt), seen=padded(jnp.asarray(valid))),
        tail=tail,
        slot=jnp.asarray(2),
    )
    out, grown = past.attend(jnp.asarray(queries), new, jnp.asarray(bias), scale)

    def columns(row, head):
        own, kv, seen = row // BEAMS, head // GROUP, valid[row // BEAMS]
        keys, values = (
            np.concatenate([np.asarray(x)[own, seen, kv], *(np.asarray(y)[row, :, kv] for y in z)])
            for x, z in (
                (prompt.keys, (before.keys, new.keys)),
                (prompt.values, (before.values, new.values)),
            )
        )
        return keys, values, np.concatenate([np.zeros(seen.sum()), bias[head, :3]])

    expected = plain(queries, columns, CHANNELS**-0.5 if scale is None else scale)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(np.asarray(grown.keys)[:, :, 2], np.asarray(new.keys)[:, 0])
    np.testing.assert_array_equal(np.asarray(grown.keys)[:, :, 3], 0)


def test_a_row_that_sees_nothing_gives_numbers():
    prompt = made(PROMPTS, 5, 1)
    read = Read(block=Block.of(prompt), seen=jnp.zeros((PROMPTS, 5), bool))
    out = attend_blocks(jnp.ones((PROMPTS, 1, HEADS, CHANNELS)), [read])
    mean = np.asarray(prompt.values).mean(axis=1).repeat(GROUP, axis=1)[:, None]
    np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (127, 127), (128, 128), (6404, 6408)])
def test_long_blocks_have_a_multiple_of_eight_slots(tokens, slots):
    assert capacity(tokens) == slots
    prompt = made(1, tokens, 1)
    block, valid = Block.of(prompt), padded(jnp.ones((1, tokens), bool))
    assert block.keys.shape == block.values.shape == (1, KV, slots, CHANNELS)
    assert valid.shape == (1, slots)
    assert valid.sum() == tokens
    np.testing.assert_array_equal(block.values[0, 1, :tokens], np.asarray(prompt.values)[0, :, 1])
