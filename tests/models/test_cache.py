"""Blocks and tails: what a new token reads, against a plain softmax over all keys in a row."""

import jax.numpy as jnp
import numpy as np
import pytest

from catp_jax.contract import Room, keep_all
from catp_jax.models.attention import attend_blocks
from catp_jax.models.blocks import Block, KeysValues, Read, capacity
from catp_jax.models.cache import Prompt, Tail, by_layer

PROMPTS, BEAMS, KV, GROUP, CHANNELS = 2, 3, 2, 3, 4
ROWS, HEADS = PROMPTS * BEAMS, KV * GROUP


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def made(rows: int, tokens: int, seed: int) -> KeysValues:
    shape = (rows, tokens, KV, CHANNELS)
    return KeysValues(
        keys=jnp.asarray(draw(*shape, seed=seed)), values=jnp.asarray(draw(*shape, seed=seed + 1))
    )


def whole(made: KeysValues, valid: np.ndarray) -> Prompt:
    """One layer's prompt, all of it visual tokens."""
    numbers = jnp.broadcast_to(jnp.arange(valid.shape[1], dtype=jnp.int32), valid.shape)
    return Prompt.of({0: made}, numbers, jnp.asarray(valid), valid.shape[1])


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
def test_beams_read_their_prompt_and_what_their_own_answer_wrote_under_one_softmax(tokens, scale):
    prompt = made(PROMPTS, tokens, 1)
    valid = np.random.default_rng(7).random((PROMPTS, tokens)) < 0.6
    valid[:, 1] = True
    stored = whole(prompt, valid)
    lengths = np.asarray([4, 9])
    tail = Tail.empty([stored], jnp.asarray(lengths, jnp.int32), Room(new=4))
    # a token before the beams part
    first, answers = made(PROMPTS, 1, 3), [[] for _ in range(ROWS)]
    (past,) = (opened := tail.opened()).pasts(by_layer([stored], keep_all))
    tail = opened.closed([past.tail.write(first, past.slot)]).spread(BEAMS)
    for row in range(ROWS):
        answers[row].append((first.keys[row // BEAMS, 0], first.values[row // BEAMS, 0]))

    for step, parents in enumerate([[0, 1, 2, 3, 4, 5], [1, 1, 0, 5, 3, 5], [2, 0, 0, 3, 3, 4]]):
        tail = tail.reorder(jnp.asarray(parents))
        answers = [[*answers[parent]] for parent in parents]
        queries, new = draw(ROWS, 1, HEADS, CHANNELS, seed=20 + step), made(ROWS, 1, 30 + step)
        for row in range(ROWS):
            answers[row].append((new.keys[row, 0], new.values[row, 0]))
        tail = tail.opened()
        by_distance = draw(HEADS, 5, seed=8)
        distance = np.asarray(tail.next_position).reshape(PROMPTS, -1)[:, :1] - tail.positions
        bias = np.moveaxis(by_distance[:, np.clip(distance, 0, 4)], 0, 1)
        (past,) = tail.pasts(by_layer([stored], keep_all))
        out, grown = past.attend(jnp.asarray(queries), new, jnp.asarray(bias), scale)
        tail = tail.closed([grown])

        def columns(row, head, answers=answers, by_distance=by_distance):
            prompt_row, kv, seen = row // BEAMS, head // GROUP, valid[row // BEAMS]
            keys, values = (
                np.concatenate(
                    [
                        np.asarray(of_prompt)[prompt_row, seen, kv],
                        [np.asarray(token[part])[kv] for token in answers[row]],
                    ]
                )
                for part, of_prompt in enumerate((prompt.keys, prompt.values))
            )
            own = by_distance[head, len(answers[row]) - 1 :: -1][: len(answers[row])]
            return keys, values, np.concatenate([np.zeros(seen.sum()), own])

        expected = plain(queries, columns, CHANNELS**-0.5 if scale is None else scale)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    assert tail.next_position.tolist() == (lengths.repeat(BEAMS) + 4).tolist()
    assert tail.next_slot.tolist() == [4 * BEAMS] * PROMPTS


def test_each_prompt_writes_at_its_own_slot():
    block = Block.empty(Block.of(made(PROMPTS, 1, 0)), 8)
    new = made(ROWS, 1, 5)
    written = block.write(new, jnp.asarray([4, 1]))
    for prompt, slot in enumerate([4, 1]):
        own = np.asarray(new.keys)[prompt * BEAMS : (prompt + 1) * BEAMS, 0]
        np.testing.assert_array_equal(
            np.asarray(written.keys)[prompt, :, slot : slot + BEAMS], np.swapaxes(own, 0, 1)
        )
        left = np.delete(np.asarray(written.keys)[prompt], np.s_[slot : slot + BEAMS], axis=1)
        assert not left.any()


def test_a_row_that_sees_nothing_gives_numbers():
    prompt = made(PROMPTS, 5, 1)
    read = Read(block=Block.of(prompt), seen=jnp.zeros((PROMPTS, 5), bool))
    out = attend_blocks(jnp.ones((PROMPTS, 1, HEADS, CHANNELS)), [read])
    mean = np.asarray(prompt.values).mean(axis=1).repeat(GROUP, axis=1)[:, None]
    np.testing.assert_allclose(out, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (127, 127), (128, 128), (6404, 6432)])
def test_long_blocks_have_a_multiple_of_32_slots(tokens, slots):
    assert capacity(tokens) == slots
    prompt = made(1, tokens, 1)
    stored = whole(prompt, np.ones((1, tokens), bool))
    (block,) = stored.blocks
    assert block.keys.shape == block.values.shape == (1, KV, slots, CHANNELS)
    assert stored.valid.shape == stored.numbers.shape == (1, slots)
    assert stored.valid.sum() == (stored.numbers >= 0).sum() == tokens
    np.testing.assert_array_equal(block.values[0, 1, :tokens], np.asarray(prompt.values)[0, :, 1])


ROOMS = [
    Room(new=40, tail=1),
    Room(new=40, tail=4),
    Room(new=40, tail=4, point=1),
    Room(new=40, tail=5, point=4),
    Room(new=40, tail=4, point=1).after(1),
    Room(new=3, tail=4, point=1),
    Room(new=40),
]


@pytest.mark.parametrize("room", ROOMS, ids=str)
def test_rows_see_the_first_tokens_and_the_latest_of_their_own_answer(room: Room):
    """Beams part after the first token, and go on from each other."""
    prompt = whole(made(PROMPTS, 3, 1), np.ones((PROMPTS, 3), bool))
    tail = Tail.empty([prompt], jnp.asarray([3, 7], jnp.int32), room)
    rng, stays = np.random.default_rng(3), room.point
    most = room.new if room.tail is None else room.tail
    rows = [[] for _ in range(PROMPTS)]  # what each row has, as (position, its value)
    for step in range(min(room.new, 17)):
        if step == 1:
            tail, rows = tail.spread(BEAMS), [[*row] for row in rows for _ in range(BEAMS)]
        if step > 1:
            own = rng.integers(0, BEAMS, (PROMPTS, BEAMS))
            parents = (own + BEAMS * np.arange(PROMPTS)[:, None]).ravel()
            tail, rows = tail.reorder(jnp.asarray(parents)), [[*rows[row]] for row in parents]
        new = made(len(rows), 1, 10 + step)
        (past,) = (opened := tail.opened()).pasts(by_layer([prompt], keep_all))
        tail = opened.closed([past.tail.write(new, past.slot)])
        for number, row in enumerate(rows):
            start = 3 if number < len(rows) // 2 else 7
            row.append((start + step, np.asarray(new.values[number, 0])))
            if len(row) > most:
                del row[stays]
        values = np.asarray(tail.blocks[0].values)
        for number, row in enumerate(rows):
            each, seen = len(rows) // PROMPTS, np.flatnonzero(tail.seen[number])
            positions = np.asarray(tail.positions)[number // each, seen]
            order = np.argsort(positions)
            assert positions[order].tolist() == [position for position, _ in row]
            np.testing.assert_array_equal(
                np.swapaxes(values[number // each][:, seen[order]], 0, 1),
                np.stack([value for _, value in row]),
            )
    assert tail.seen.shape[1] == capacity(min(most, room.new) * BEAMS)
