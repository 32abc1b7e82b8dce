"""The kernel for one new token a row, compiled for an H100: it reads a cache once, in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from catp_jax import targets
from catp_jax.models import one_row
from catp_jax.models.attention import attend_blocks
from catp_jax.models.blocks import Block, Read

pytestmark = [
    pytest.mark.skipif(
        not targets.is_available(),
        reason="JAX's CUDA compiler (jax-cuda13-pjrt, jax-cuda13-plugin) is not installed",
    ),
    # jax, from 0.11 on: the kernel's module says so, too
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]
KERNEL = "__gpu$xla.gpu.triton"

# prompts, rows of each, key-value heads, query heads of each, channels, slots of each block
SIZES = {
    "11B, images": (64, 1, 8, 4, 128, (6432,)),
    "11B, text": (64, 1, 8, 4, 128, (64, 64)),
    "11B, beams": (8, 5, 8, 4, 128, (6432,)),
    "OPT, beams": (16, 5, 32, 1, 80, (96, 320)),
    "T5": (64, 1, 32, 1, 64, (65,)),
}


@jax.jit
def attend(queries, blocks):
    reads = [
        Read(block=Block(keys=keys, values=values), seen=seen) for keys, values, seen in blocks
    ]
    return attend_blocks(queries, reads)


def arguments(sizes, sharding=None):
    batch, own, kv, group, channels, many = sizes
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    blocks = [
        (
            shape((batch, kv, slots, channels), jnp.bfloat16),
            shape((batch, kv, slots, channels), jnp.bfloat16),
            shape((batch * own if number else batch, slots), bool),
        )
        for number, slots in enumerate(many)
    ]
    return shape((batch * own, 1, kv * group, channels), jnp.bfloat16), blocks


@pytest.mark.parametrize("name", SIZES)
def test_keys_and_values_are_read_once_in_place(name, monkeypatch):
    queries, blocks = arguments(SIZES[name])
    cache = sum(2 * x.size for keys, values, _ in blocks for x in (keys, values))
    floor = cache + 4 * queries.size
    monkeypatch.setattr(one_row, "USE_KERNEL", True)
    program = targets.compile_for("h100", attend, queries, blocks)
    (kernel,) = [one for one in program.kernels if one.kind == KERNEL]
    assert kernel.read > cache
    assert program.moved < 1.06 * floor
    assert program.temporaries < 0.06 * floor


def test_on_a_mesh_nothing_is_sent(monkeypatch):
    mesh = Mesh(np.asarray(targets.devices_of("h100", 8)).reshape(4, 2), ("data", "tensor"))
    sizes = SIZES["11B, text"]
    monkeypatch.setattr(one_row, "USE_KERNEL", True)
    whole = targets.compile_for("h100", attend, *arguments(sizes))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    program = targets.compile_for("h100", attend, *arguments(sizes, sharding))
    assert any(one.kind == KERNEL for one in program.kernels)
    assert program.sent == 0
    assert program.moved < 0.26 * whole.moved
