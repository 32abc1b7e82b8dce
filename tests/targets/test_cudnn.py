"""Attention of many rows, compiled for an H100: cuDNN's kernels at any number of rows and columns.

The calls are compiled, not run: neither a GPU nor cuDNN is needed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from catp_jax import targets
from catp_jax.models import attention

pytestmark = pytest.mark.skipif(
    not targets.is_available(),
    reason="JAX's CUDA compiler (jax-cuda13-pjrt, jax-cuda13-plugin) is not installed",
)
BATCH, HEADS, KV, CHANNELS = 2, 32, 8, 128  # of Llama 3.2 11B's cross-attention


@pytest.fixture(autouse=True)
def as_if_found(monkeypatch):
    """JAX asks for cuDNN's version as it traces; its compiler writes the calls without it."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "_cudnn_lacks", attention._cudnn_lacks.__wrapped__)


def arguments(rows: int, columns: int, is_masked: bool) -> tuple[Any, ...]:
    queries = jax.ShapeDtypeStruct((BATCH, rows, HEADS, CHANNELS), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((BATCH, columns, KV, CHANNELS), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((BATCH, rows, columns), bool) if is_masked else None
    return queries, keys, keys, mask


@jax.jit
def forward(queries, keys, values, mask):
    return attention.attend(queries, keys, values, mask)


@jax.jit
def backward(queries, keys, values, mask):
    def total(*floats):
        return attention.attend(*floats, mask).astype(jnp.float32).sum()

    return jax.grad(total, (0, 1, 2))(queries, keys, values)


@pytest.mark.parametrize(("function", "calls"), [(forward, 1), (backward, 2)])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(64, 400), (64, 401), (63, 400), (63, 401)])
def test_no_logits_are_written(rows, columns, is_masked, function, calls):
    """A prefill that is pruned to an odd number of tokens has the kernels of an even one."""
    program = targets.compile_for("h100", function, *arguments(rows, columns, is_masked))
    assert sum(kernel.times for kernel in program.kernels if kernel.kind == "attention") == calls
    logits = 4 * BATCH * HEADS * rows * columns
    assert max(kernel.written for kernel in program.kernels) < logits


def test_an_odd_number_moves_no_more_than_padding(monkeypatch):
    """One more row and column: keys and values are copied once; XLA's way moves logits."""
    even, odd = (
        targets.compile_for("h100", forward, *arguments(*size, is_masked=True)).moved
        for size in ((64, 402), (64, 401))
    )
    copies = 2 * 2 * 2 * BATCH * 402 * KV * CHANNELS  # keys and values, read and written
    assert even < odd < even + 1.05 * copies
    monkeypatch.setattr(attention, "USE_CUDNN", False)
    jax.clear_caches()
    xla = targets.compile_for("h100", forward, *arguments(64, 401, is_masked=True)).moved
    assert xla > odd


@pytest.mark.parametrize("is_masked", [False, True])
def test_on_meshes_the_gradient_is_taken_where_the_rows_lie(is_masked):
    mesh = jax.sharding.Mesh(targets.devices_of("h100", 2), ("data",))
    lies = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        arguments(63, 401, is_masked),
    )
    program = targets.compile_for("h100", backward, *shapes)
    assert sum(kernel.times for kernel in program.kernels if kernel.kind == "attention") == 2
    assert not program.collectives
