"""Compiling for GPUs on a machine that has none."""

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from catp_jax.targets.counting import count
from catp_jax.targets.gpus import Gpu, find_gpu
from catp_jax.targets.program import Program

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")

# Which of several kernels is fastest is measured on a device; without one, the first that does.
OPTIONS = {"xla_gpu_autotune_level": 0}


def is_available() -> bool:
    """Whether JAX's compiler for NVIDIA GPUs is installed; neither driver nor GPU is needed."""
    try:
        return any(importlib.util.find_spec(name) for name in PLUGINS)
    except ModuleNotFoundError:  # of jax_plugins, which all plugins share
        return False


def devices_of(target: str | Gpu, number: int = 1, hosts: int = 1) -> list[Any]:
    """So many GPUs, evenly on so many hosts, for which programs compile but do not run.

    Raises ValueError if the compiler is not installed or JAX does not take it.
    """
    gpu = find_gpu(target) if isinstance(target, str) else target
    if number < 1 or hosts < 1 or number % hosts:
        raise ValueError(
            f"{number} devices are not the same number on each of {hosts} hosts; both are at "
            "least 1, and the first is a multiple of the second"
        )
    if not is_available():
        version = jax.__version__
        raise ValueError(
            f"compiling for {gpu.name} takes JAX's CUDA compiler, best beside other packages: "
            f"pip install --no-deps --target gpu-compiler jax-cuda13-pjrt=={version} "
            f"jax-cuda13-plugin=={version}, then PYTHONPATH=gpu-compiler and JAX_PLATFORMS=cpu"
        )
    try:
        found = topologies.get_topology_desc(
            "", "cuda", target_config=gpu.config, topology=f"1 x {hosts} x {number // hosts}"
        )
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(
            f"JAX's CUDA compiler does not take {gpu.name}: it has to be of jax's version, "
            f"{jax.__version__}, and without a GPU wants JAX_PLATFORMS=cpu. {error}"
        ) from None
    return found.devices


def compile_for(target: str | Gpu, function: Any, *arguments: Any, **keywords: Any) -> Program:
    """Compiles a jitted function and counts what it does on one device; nothing is allocated.

    Arrays are jax.ShapeDtypeStruct, or anything of a shape and dtype. Those with a sharding over
    `devices_of` lie there; all others on one device, or on each of the others' mesh. Static
    arguments are given as they are, by keyword.

    Raises ValueError as `devices_of` does.
    """
    meshes = {
        leaf.sharding.mesh
        for leaf in jax.tree.leaves((arguments, keywords))
        if isinstance(getattr(leaf, "sharding", None), NamedSharding)
    }
    mesh = meshes.pop() if meshes else Mesh(np.array(devices_of(target)), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> Any:
        if isinstance(getattr(leaf, "sharding", None), NamedSharding):
            return leaf
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    arguments, keywords = jax.tree.map(placed, (arguments, keywords))
    return program_of(function.trace(*arguments, **keywords))


def program_of(traced: Any, options: Mapping[str, Any] = OPTIONS) -> Program:
    """What a traced function does on the devices that its arguments lie on, compiled for them with
    XLA's `options`.
    """
    lowered = traced.lower(lowering_platforms=("cuda",))
    try:
        executable, graphs = compiled(lowered, options)
        has_triton = True
    except jax.errors.JaxRuntimeError as error:
        if "tile sizes" not in str(error):
            raise
        # one of XLA's Triton kernels cannot be made: a device would have tried others
        executable, graphs = compiled(lowered, {**options, "xla_gpu_enable_triton_gemm": False})
        has_triton = False
    hosts = {
        device.process_index
        for sharding in jax.tree.leaves(executable.input_shardings)
        for device in sharding.device_set
    }
    kernels, collectives, open_loops = count(executable.as_text(), max(len(hosts), 1))
    memory = executable.memory_analysis()
    return Program(
        kernels=kernels,
        collectives=collectives,
        open_loops=open_loops,
        graphs=graphs,
        has_triton=has_triton,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
    )


def compiled(lowered: Any, options: Mapping[str, Any]) -> tuple[Any, int | None]:
    """An executable, and how many CUDA graphs it has."""
    with tempfile.TemporaryDirectory() as folder:
        # the only place where XLA tells of its graphs
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        executable = lowered.compile(compiler_options={**options, **dump})
        return executable, graphs_in(Path(folder))


def graphs_in(folder: Path) -> int | None:
    """The command buffers in what XLA wrote of a compilation; None if it wrote nothing."""
    if not any(folder.glob("*.thunk_sequence.txt")):  # JAX took the program from its cache
        return None
    changed = folder.glob("*.thunk_sequence_after_thunk_passes.txt")
    return sum(path.read_text().count(": kCommandBuffer") for path in changed)
