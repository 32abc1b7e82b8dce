"""Attention of one new token a row in one kernel, interpreted, against a softmax row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from catp_jax.models import one_row
from catp_jax.models.attention import attend_blocks
from catp_jax.models.blocks import Block, Read
from catp_jax.struct import replace

# prompts, rows of each, key-value heads, query heads of each, channels, slots of each block
SIZES = {
    "grouped": (2, 1, 3, 4, 128, (70, 33)),
    "beams": (2, 5, 3, 1, 80, (96, 40)),
    "grouped beams": (2, 3, 2, 6, 64, (130, 5)),
    "one block": (3, 1, 2, 1, 64, (65,)),
    "few slots": (2, 1, 2, 2, 16, (1, 3)),
    "parts": (1, 2, 2, 2, 64, (1000, 7)),
}
NUMBERS = [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)]
INTERPRETED = {"scale": 0.3, "is_interpreted": True}


def drawn(sizes, dtype, seed=0, has_bias=False, sees="of prompts"):
    """Queries and blocks. The first prompt's first row sees no slot."""
    batch, own, kv, group, channels, many = sizes
    random = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    blocks = []
    for number, slots in enumerate(many):
        shape = {
            "of prompts": (batch, slots),
            "of rows": (batch * own, slots),
            "of heads": (batch, kv, slots),
        }[sees]
        seen = random.random(shape) < 0.5
        seen[0] = False
        rows = (batch, batch * own)[number % 2]
        bias = draw(rows, kv * group, slots) if has_bias else None
        keys, values = draw(batch, kv, slots, channels), draw(batch, kv, slots, channels)
        block = Block(keys=keys, values=values)
        blocks.append(Read(block=block, seen=jnp.asarray(seen), bias=bias))
    return draw(batch * own, 1, kv * group, channels), blocks


def by_rows(queries, blocks, scale):
    """One row and head after the other, in float64."""
    rows, _, heads, channels = queries.shape
    batch, kv = blocks[0].block.keys.shape[:2]
    out = np.zeros((rows, 1, heads, channels))
    for row in range(rows):
        for head in range(heads):
            prompt, own = row * batch // rows, head * kv // heads
            logits, taken = [], []
            for read in blocks:
                pair, seen, bias = read.block, read.seen, read.bias
                keys, values = (
                    np.asarray(x[prompt, own], np.float64) for x in (pair.keys, pair.values)
                )
                logit = keys @ np.asarray(queries[row, 0, head], np.float64) * scale
                if bias is not None:
                    logit += np.asarray(bias[row * bias.shape[0] // rows, head], np.float64)
                visible = np.asarray(seen[row * seen.shape[0] // rows])
                logits.append(np.where(visible[own] if seen.ndim == 3 else visible, logit, -1e38))
                taken.append(values)
            weights = np.exp(np.concatenate(logits) - np.concatenate(logits).max())
            out[row, 0, head] = weights / weights.sum() @ np.concatenate(taken)
    return out


def close(out, expected, most):
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=most, rtol=most)


@pytest.mark.parametrize(("dtype", "most"), NUMBERS)
@pytest.mark.parametrize("name", SIZES)
def test_all_blocks_are_under_one_softmax(name, dtype, most):
    queries, blocks = drawn(SIZES[name], dtype)
    out = one_row.attend(queries, blocks, **INTERPRETED)
    assert out.dtype == dtype
    close(out, by_rows(queries, blocks, 0.3), most)


@pytest.mark.parametrize("sees", ["of prompts", "of rows", "of heads"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_slots_are_seen_and_biased_by_prompt_by_row_and_by_head(sees, has_bias):
    for name in ("grouped beams", "parts"):
        queries, blocks = drawn(SIZES[name], jnp.float32, 3, has_bias, sees)
        close(one_row.attend(queries, blocks, **INTERPRETED), by_rows(queries, blocks, 0.3), 1e-5)


def test_a_part_that_sees_nothing_adds_nothing():
    queries, blocks = drawn(SIZES["parts"], jnp.float32, 4)
    for start, stop in ((0, 700), (700, 1000)):
        some = blocks[0].seen.at[:, start:stop].set(True).at[:, : 1000 - stop].set(False)
        given = [replace(blocks[0], seen=some), blocks[1]]
        close(one_row.attend(queries, given, **INTERPRETED), by_rows(queries, given, 0.3), 1e-5)


@pytest.mark.parametrize(("batch", "kv", "group"), [(2, 4, 2), (8, 1, 1)])
def test_on_a_mesh_each_device_has_prompts_heads_and_rows_of_its_own(batch, kv, group):
    sizes = (batch, 1, kv, group, 16, (70, 5))
    queries, blocks = drawn(sizes, jnp.float32, 6, has_bias=True)
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), ("data", "kv", "group"))

    def put(array, *axes):
        sizes = [1 if axis is None else 2 for axis in axes]
        fits = all(size % each == 0 for size, each in zip(array.shape, sizes, strict=False))
        spec = PartitionSpec(*axes) if fits else PartitionSpec("data")
        return jax.device_put(array, NamedSharding(mesh, spec))

    placed = [
        Read(
            block=jax.tree.map(lambda x: put(x, "data", "kv"), read.block),
            seen=put(read.seen, "data"),
            bias=put(read.bias, "data"),
        )
        for read in blocks
    ]
    attend = jax.jit(lambda queries, blocks: one_row.attend(queries, blocks, **INTERPRETED))
    program = attend.lower(put(queries, "data", None, "kv"), placed).compile()
    assert "all-gather" not in program.as_text()
    out = program(put(queries, "data", None, "kv"), placed)
    close(out, by_rows(queries, blocks, 0.3), 1e-5)


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("grouped", jnp.bfloat16, None),
        ("beams", jnp.float16, None),
        ("grouped", jnp.float32, "these are float32"),
        ("many rows", jnp.bfloat16, "these are 68 × 8"),
        ("many channels", jnp.bfloat16, "these are 1 × 256"),
    ],
)
def test_what_it_refuses_it_says_why(name, dtype, reason, monkeypatch):
    more = {"many rows": (1, 17, 1, 4, 8, (4,)), "many channels": (1, 1, 1, 1, 256, (4,))}
    given = drawn((SIZES | more)[name], dtype)
    assert one_row.refuses(*given) == "USE_KERNEL is False"
    monkeypatch.setattr(one_row, "USE_KERNEL", True)
    refused = one_row.refuses(*given)
    assert refused is None if reason is None else refused.endswith(reason)


def test_a_cpus_program_has_no_kernel(monkeypatch):
    queries, reads = drawn(SIZES["beams"], jnp.bfloat16, has_bias=True, sees="of rows")
    expected = attend_blocks(queries, reads, 0.3)
    monkeypatch.setattr(one_row, "USE_KERNEL", True)
    assert one_row.refuses(queries, reads) is None
    out = jax.jit(lambda *given: attend_blocks(*given, 0.3))(queries, reads)
    close(out, np.asarray(expected, np.float64), 1e-2)
    close(out, by_rows(queries, reads, 0.3), 2e-2)
