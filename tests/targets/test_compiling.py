"""Programs compiled for GPUs that are not there, small enough to count by hand."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from catp_jax import targets
from catp_jax.targets import compiling

compiler = pytest.mark.skipif(
    not targets.is_available(),
    reason="JAX's CUDA compiler (jax-cuda13-pjrt, jax-cuda13-plugin) is not installed",
)
struct = jax.ShapeDtypeStruct


@compiler
@pytest.mark.parametrize("name", targets.GPUS)
def test_an_elementwise_program_reads_and_writes_each_array_once(name: str):
    x = struct((64, 256), jnp.bfloat16)
    program = targets.compile_for(name, jax.jit(lambda x, y: jnp.tanh(x) * y), x, x)
    size = 64 * 256 * 2
    assert (program.moved, program.launches, program.flops) == (3 * size, 1, 0)
    assert (program.arguments, program.outputs, program.temporaries) == (2 * size, size, 0)
    assert program.floor(targets.find_gpu(name)).seconds > 0


@compiler
def test_a_matrix_product_has_its_bytes_and_flops():
    x, w = struct((64, 512), jnp.bfloat16), struct((512, 256), jnp.bfloat16)
    program = targets.compile_for("h100", jax.jit(jnp.matmul), x, w)
    product = [kernel for kernel in program.kernels if kernel.kind == "matrix product"]
    assert program.flops == 2 * 64 * 512 * 256
    # operands once; the sum over 512 may be split in parts, which a second kernel adds
    assert sum(kernel.read for kernel in product) == 2 * (64 * 512 + 512 * 256)


@compiler
def test_a_donated_cache_is_written_at_one_slot_and_rows_are_gathered():
    def put(cache: jax.Array, table: jax.Array, ids: jax.Array, slot: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(cache, table[ids][:, None], (0, slot, 0))

    program = targets.compile_for(
        "h100",
        jax.jit(put, donate_argnums=0),
        struct((8, 128, 256), jnp.bfloat16),
        struct((1000, 256), jnp.bfloat16),
        struct((8,), jnp.int32),
        struct((), jnp.int32),
    )
    rows = 8 * 256 * 2
    # read from the table and put into the cache, in one kernel or in two
    assert 2 * rows <= program.moved <= 4 * rows + 100


@compiler
def test_a_loop_reads_every_layer_once():
    def scan(x: jax.Array, layers: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x + w), None), x, layers)[0]

    layers = struct((7, 512, 512), jnp.float32)
    program = targets.compile_for("h100", jax.jit(scan), struct((512, 512), jnp.float32), layers)
    size = 512 * 512 * 4
    assert program.open_loops == ()
    body = [k for k in program.kernels if k.times == 7 and k.read > size]
    # of each layer one read; of what is carried one read and one write
    assert sum(kernel.moved for kernel in body) == pytest.approx(7 * 3 * size, rel=1e-3)


@compiler
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_product_split_over_eight_devices_sums_once(hosts: int):
    devices = targets.devices_of("h100", 8, hosts)
    assert len({device.process_index for device in devices}) == hosts
    mesh = Mesh(np.array(devices), ("tensor",))

    def over(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return struct(shape, jnp.float32, sharding=sharding)

    program = targets.compile_for(
        "h100",
        jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, PartitionSpec())),
        over((64, 1024), None, "tensor"),
        over((1024, 128), "tensor", None),
    )
    (exchange,) = program.collectives
    assert (exchange.kind, exchange.group, exchange.nbytes) == ("all-reduce", 8, 64 * 128 * 4)
    assert program.sent == 2 * 7 * 64 * 128 * 4 // 8
    # of a host's four, each sends a fourth of what the other host lacks, and gets as much back
    assert program.between_hosts == (64 * 128 * 4 // 4 if hosts == 2 else 0)
    gpu = targets.find_gpu("h100")
    assert program.floor(gpu).network == program.between_hosts / gpu.network
    assert program.flops == 2 * 64 * 1024 * 128 // 8
    assert program.arguments == (64 * 1024 + 1024 * 128) * 4 // 8


@compiler
def test_kernels_in_a_row_are_one_graph_and_few_are_none():
    def rows(x: jax.Array, times: int) -> jax.Array:
        for _ in range(times):  # each sum needs all of the one before
            x = jnp.cumsum(jnp.sin(x @ x), axis=0)
        return x

    x = struct((512, 512), jnp.float32)
    program = jax.jit(rows, static_argnames="times")
    assert targets.compile_for("h100", program, x, times=8).graphs == 1
    assert targets.compile_for("h100", jax.jit(jnp.tanh), x).graphs == 0


@compiler
def test_without_a_tiling_for_triton_the_product_is_cublas(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def refusing(lowered: Any, options: dict[str, Any]) -> Any:
        tried.append(options)
        if options.get("xla_gpu_enable_triton_gemm", True):
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes")
        return compiled(lowered, options)

    compiled = compiling.compiled
    monkeypatch.setattr(compiling, "compiled", refusing)
    x = struct((64, 512), jnp.bfloat16)
    program = targets.compile_for("h100", jax.jit(lambda x: x @ x.T), x)
    assert (len(tried), program.has_triton) == (2, False)
    assert program.flops == 2 * 64 * 512 * 64
    monkeypatch.setattr(compiling, "compiled", compiled)
    assert targets.compile_for("h100", jax.jit(lambda x: x @ x.T), x).has_triton


def test_a_program_from_the_cache_tells_of_no_graphs(tmp_path: Path):
    assert compiling.graphs_in(tmp_path) is None


def test_without_the_compiler_its_install_command_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiling, "is_available", lambda: False)
    wanted = f"pip install --no-deps --target gpu-compiler jax-cuda13-pjrt=={jax.__version__} "
    with pytest.raises(ValueError, match=wanted):
        targets.devices_of("h100")


def test_whether_the_compiler_is_there_is_looked_up(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert not targets.is_available()


def test_a_target_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"one of h100, h200, a100, b200, got 'h1000'"):
        targets.devices_of("h1000")


@pytest.mark.parametrize(("number", "hosts"), [(0, 1), (8, 3), (1, 0)])
def test_devices_that_are_not_even_over_hosts_are_refused(number: int, hosts: int):
    with pytest.raises(ValueError, match="same number on each"):
        targets.devices_of("h100", number, hosts)
