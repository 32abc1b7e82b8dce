"""Looks at an installation, a machine and a model before a job is sent: one line a question.

Every check gives findings; a later one does not depend on an earlier one. What fails would stop
`generate`; what is warned of makes it slow, or only might.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from packaging.requirements import Requirement

import convert
from catp_jax.families import find_config, find_folder
from catp_jax.models import one_row
from catp_jax.models.attention import attend, attend_padded, cudnn_refuses, xla
from catp_jax.models.blocks import Block, KeysValues, Read
from catp_jax.plan import abstract_model, shard_bytes
from catp_jax.pruning.scores import keep_best
from catp_jax.sharding.mesh import AXES, find_devices, make_mesh, parse_mesh
from catp_jax.sharding.place import kv_heads, place
from convert.report import readable

Level = Literal["ok", "warn", "fail"]

NEEDED = ("jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "numpy")
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")

CLUSTERS = {
    "Slurm": ("SLURM_JOB_ID", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
}
"""Schedulers that JAX knows, and what they leave in a process's environment."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: what was examined, how it is, and — unless ok — what to do."""

    level: Level
    subject: str
    text: str


Findings = Iterator[Finding]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The model that is looked at: its configuration, its folder if it has one, and its abstract
    parameters in the number types that a load would give.
    """

    config: Any
    folder: Path | None
    abstract: Any


def examine(
    model: str | Path | None = None,
    mesh: str | None = None,
    ignore_config: Sequence[str] = (),
    dtype: str | None = None,
) -> Findings:
    """All findings, in order. A check that itself breaks is a finding that fails.

    `model`, `dtype` and `ignore_config` are as in `api.load`; a model may also be one of
    `families.PRESETS`, in bfloat16 if no `dtype` is given.
    """
    checkpoint = None
    if model is not None:
        try:
            config = find_config(model, ignore_config)
            abstract = abstract_model(config, jnp.dtype(dtype or jnp.bfloat16))
            checkpoint = Checkpoint(config, None, abstract)  # should its weights not do
            if (folder := find_folder(model)) is not None:
                abstract = convert.load_abstract(folder, dtype, ignore_config)
                checkpoint = Checkpoint(config, folder, abstract)
        except (ValueError, TypeError, OSError) as error:
            yield Finding("fail", "model", str(error))
    checks: dict[str, Callable[[], Findings]] = {
        "versions": lambda: versions(installed()),
        "devices": devices,
        "processes": lambda: processes(os.environ),
        "mesh": lambda: meshes(checkpoint, mesh),
        "attention": lambda: backends(heads(checkpoint)),
        "top-k": top_k,
        "memory": lambda: memory(checkpoint, mesh),
        "disk": lambda: disk(checkpoint),
        "weights": lambda: weights(checkpoint and checkpoint.folder, ignore_config),
    }
    for subject, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # whatever it is, the other lines count too
            text = (str(error).strip() or type(error).__name__).replace("\n", " ")
            yield Finding("fail", subject, text)


def installed() -> dict[str, str]:
    """Versions of what is needed; of a package that is missing, an empty text."""
    numbers = {"python": platform.python_version()}
    for package in (*NEEDED, *PLUGINS):
        try:
            numbers[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            numbers[package] = ""
    return numbers


def required() -> list[Requirement]:
    """What this package asks of those that are needed, as it was installed."""
    every = map(Requirement, importlib.metadata.requires("catp-jax") or ())
    here = (one for one in every if one.marker is None or one.marker.evaluate({"extra": ""}))
    return [Requirement(f"{one.name}{one.specifier}") for one in here if one.name in NEEDED]


def versions(packages: Mapping[str, str]) -> Findings:
    """Whether the packages are there and known to work with each other."""

    def number(package: str) -> tuple[int, ...]:
        parts = packages[package].split(".")[:3]
        return tuple(int(part) for part in parts if part.isdecimal())

    text = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    yield Finding("ok", "versions", text)
    for package in NEEDED:
        if not packages[package]:
            yield Finding("fail", "versions", f"{package} is missing: pip install catp-jax")
            return
    if number("jax") != number("jaxlib"):
        yield Finding(
            "warn",
            "versions",
            f"jax {packages['jax']} goes with jaxlib {packages['jax']}, not {packages['jaxlib']}: "
            f"pip install -U jax jaxlib",
        )
    for plugin in PLUGINS:
        if packages[plugin] and number(plugin) != number("jaxlib"):
            yield Finding(
                "fail",
                "versions",
                f"{plugin} {packages[plugin]} does not go with jaxlib {packages['jaxlib']}, and "
                f"JAX may find no GPU: pip install -U jax jaxlib {plugin}",
            )
    wrong = [one for one in required() if not one.specifier.contains(packages[one.name], True)]
    for one in wrong:
        yield Finding(
            "fail",
            "versions",
            f"catp-jax requires {one}, not {packages[one.name]}: pip install '{one}'",
        )
    if not wrong and number("flax") < (0, 12, 12) and number("jax") >= (0, 11, 1):
        yield Finding(
            "fail",
            "versions",
            f"flax {packages['flax']} breaks on jax {packages['jax']}: pip install 'flax>=0.12.12' "
            "(Python 3.12), or 'jax<0.11'",
        )


def devices() -> Findings:
    """What JAX sees, and how much memory each device has."""
    every = find_devices()
    there = device_memory()
    size = f", {readable(there)} each" if there else ""
    text = f"{len(every)} × {every[0].device_kind} ({every[0].platform}){size}"
    if every[0].platform != "cpu":
        yield Finding("ok", "devices", text)
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "fail",
            "devices",
            f"{text}; there is an NVIDIA driver, but JAX has no CUDA: "
            "pip install 'catp-jax[cuda]', or [cuda12] for drivers before release 580",
        )
    else:
        yield Finding("warn", "devices", f"{text}; no accelerator: real models will be slow here")


def device_memory() -> int | None:
    """Bytes of memory that JAX may use on a device; of the host's for a CPU."""
    try:
        if jax.devices()[0].platform == "cpu":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    except (ValueError, OSError, AttributeError):
        return None


def processes(environment: Mapping[str, str]) -> Findings:
    """Whether several hosts are there, or could be."""
    if jax.process_count() > 1:
        yield Finding(
            "ok", "processes", f"this is {jax.process_index()} of {jax.process_count()}, connected"
        )
        return
    for name, (there, several) in CLUSTERS.items():
        if there in environment and several in environment and environment[several] != "1":
            yield Finding(
                "warn",
                "processes",
                f"{name} started this one among others ({several}={environment[several]}), but "
                "they are not connected: catp-jax --distributed …",
            )
            return
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        advice = "if its job has several pods, connect them: see docs/clusters.md"
        yield Finding("warn", "processes", f"a pod of an indexed job; {advice}")
        return
    yield Finding("ok", "processes", "one, by itself")


def meshes(checkpoint: Checkpoint | None, mesh: str | None) -> Findings:
    """The mesh that was asked for, or the one that would be made, and whether it divides."""
    sizes = choose(checkpoint, mesh)
    if checkpoint is None:
        make_mesh(sizes, 1)
        yield Finding("ok", "mesh", f"{in_words(sizes)}; name a model to see whether it divides")
        return
    place(checkpoint.abstract, make_mesh(sizes, kv_heads(checkpoint.abstract)))
    yield Finding("ok", "mesh", f"{in_words(sizes)} divides the model")


def choose(checkpoint: Checkpoint | None, mesh: str | None) -> dict[str, int]:
    """The mesh that was asked for; else of all devices, with the largest `tensor` that the model
    allows.
    """
    number = jax.device_count()
    if mesh is not None:
        return parse_mesh(mesh)
    if checkpoint is None:
        return parse_mesh({"data": number})
    abstract, sizes = checkpoint.abstract, parse_mesh({"data": number})
    for tensor in sorted((n for n in range(1, number + 1) if number % n == 0), reverse=True):
        sizes = parse_mesh({"data": number // tensor, "tensor": tensor})
        with contextlib.suppress(ValueError):
            place(abstract, make_mesh(sizes, kv_heads(abstract)))
            break
    return sizes


def in_words(sizes: Mapping[str, int]) -> str:
    """A mesh as --mesh takes it."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1) or "tensor=1"


def heads(checkpoint: Checkpoint | None) -> set[tuple[int, str]]:
    """Channels of an attention head and number type in each part of a model; two common ones
    without a model.
    """
    if checkpoint is None:
        return {(64, "bfloat16"), (128, "bfloat16")}
    return {
        (leaf.get_value().shape[-1] // names["heads"], str(leaf.get_value().dtype))
        for leaf in _variables(checkpoint.abstract)
        for names in [leaf.get_metadata()]
        if names.get("heads") and names["axes"][-1].endswith("heads")
    }


def _variables(abstract: Any) -> list[nnx.Variable[Any]]:
    return jax.tree.leaves(abstract, is_leaf=lambda node: isinstance(node, nnx.Variable))


def textbook(
    queries: np.ndarray, keys: np.ndarray, values: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """Attention of rows to what they see."""
    logits = np.einsum("bshd,bnhd->bhsn", queries, keys) * queries.shape[-1] ** -0.5
    weights = np.where(seen, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
    return np.einsum("bhsn,bnhd->bshd", weights / weights.sum(axis=-1, keepdims=True), values)


def backends(kinds: set[tuple[int, str]]) -> Findings:
    """Which kernels compute attention as NumPy does, for heads of these sizes and number types."""
    for size, dtype in sorted(kinds):
        kernels, unused = _kernels(size, dtype)
        states = kernels.values()
        good = all(state == "works" or state.startswith("is not taken") for state in states)
        text = ", ".join(f"{name} {state}" for name, state in (kernels | unused).items())
        advice = (
            ""
            if good
            else (
                "; report it with these versions. catp_jax.models.attention.USE_CUDNN = False does "
                "without cuDNN"
            )
        )
        level = "ok" if good else "fail"
        yield Finding(level, "attention", f"heads of {size} in {dtype}: {text}{advice}")


def _kernels(size: int, dtype: str) -> tuple[dict[str, str], dict[str, str]]:
    """How each kernel does by its name; then those that nothing uses unless it is asked to, which
    may fail.
    """
    rng = np.random.default_rng(size)
    queries, keys, values = (rng.normal(size=(2, 16, 4, size)).astype(np.float32) for _ in range(3))
    arrays = [jnp.asarray(x, dtype) for x in (queries, keys, values)]
    every = textbook(queries, keys, values, np.ones((16, 16), bool))

    def state(compute: Callable[[], jax.Array], expected: np.ndarray = every) -> str:
        try:
            out = np.asarray(compute(), np.float32)
        except Exception as error:  # no such kernel, or none for this size
            message = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"does not work ({message})"
        # as far apart as rounding takes them, in float32 that of a GPU's matrix units
        bound = 0.01 if dtype == "float32" else 0.1
        return "works" if np.abs(out - expected).max() < bound else "is wrong"

    kernels = {"XLA's": state(functools.partial(xla, *arrays, None))}
    if jax.devices()[0].platform != "gpu":
        return kernels, {}
    if refused := cudnn_refuses(arrays[0], arrays[1]):
        kernels["cuDNN's"] = f"is not taken ({refused})"
    else:
        kernels["cuDNN's"] = state(functools.partial(attend, *arrays, None))
        tiles = functools.partial(attend_padded, *arrays, jnp.full(2, 16, jnp.int32))
        kernels["cuDNN's for tiles"] = state(tiles)
        # two heads read one, and each row what stands before it
        shared, seen = (keys[:, :, ::2], values[:, :, ::2]), np.tri(16, dtype=bool)
        by_head = [x.repeat(2, axis=2) for x in shared]
        masked = textbook(queries, by_head[0], by_head[1], seen)
        grouped = [jnp.asarray(x, dtype) for x in shared]
        mask = jnp.broadcast_to(jnp.asarray(seen), (2, 16, 16))
        kernels["cuDNN's with a mask"] = state(
            functools.partial(attend, arrays[0], grouped[0], grouped[1], mask), masked
        )
    pair = KeysValues(keys=arrays[1], values=arrays[2])
    reads = [Read(block=Block.of(pair), seen=jnp.ones((2, 16), bool))]
    last = functools.partial(one_row.attend, arrays[0][:, -1:], reads, size**-0.5)
    return kernels, {"the kernel for new tokens (off)": state(last, every[:, -1:])}


def top_k() -> Findings:
    """Whether tokens chosen on all devices are those that NumPy chooses."""
    number = jax.device_count()
    mesh = make_mesh({"data": number}, 1)
    scores = np.random.default_rng(0).permutation(number**2 * 40).reshape(number * 2, number * 20)
    expected = np.sort(np.argsort(-scores, axis=1)[:, :7], axis=1)
    wrong: set[Any] = set()
    for axes in (PartitionSpec("data"), PartitionSpec(None, "data")):  # prompts, and tokens
        batch = jax.make_array_from_callback(
            scores.shape,
            NamedSharding(mesh, axes),
            lambda index: scores[index].astype(np.float32),
        )
        keep = jax.jit(lambda x: keep_best(7, jnp.ones(x.shape, bool), x))(batch)
        wrong |= {
            shard.device
            for shard in keep.indices.addressable_shards
            if not np.array_equal(np.asarray(shard.data), expected[shard.index])
        }
    if wrong:
        text = f"{', '.join(map(str, wrong))} chose other tokens than NumPy; update jax and drivers"
        yield Finding("fail", "top-k", text)
    else:
        yield Finding("ok", "top-k", f"the same tokens as NumPy's, devices: {number}")


def memory(checkpoint: Checkpoint | None, mesh: str | None) -> Findings:
    """Whether a model's weights go into the devices' memory."""
    if checkpoint is None:
        return
    try:
        sizes = choose(checkpoint, mesh)
        placed = place(checkpoint.abstract, make_mesh(sizes, kv_heads(checkpoint.abstract)))
    except ValueError:
        return  # of the mesh, which has its own line
    values = [leaf.get_value() for leaf in _variables(checkpoint.abstract)]
    parameters = sum(value.size for value in values)
    types = " and ".join(sorted({str(value.dtype) for value in values}))
    each = shard_bytes(placed)
    there = device_memory()
    text = f"{parameters / 1e9:.3g} billion parameters, {readable(each)} on each device in {types}"
    if there is None:
        yield Finding("warn", "memory", f"{text}; JAX does not say how much memory there is")
    elif each * (len(jax.local_devices()) if jax.devices()[0].platform == "cpu" else 1) > there:
        advice = "more devices, or a mesh with larger tensor or fsdp; see catp-jax plan"
        yield Finding("fail", "memory", f"{text}, but it has {readable(there)}: {advice}")
    else:
        yield Finding("ok", "memory", f"{text}, of {readable(there)}; see catp-jax plan for all")


def disk(checkpoint: Checkpoint | None) -> Findings:
    """Whether a converted copy of a model's weights goes onto the disk."""
    if checkpoint is None:
        return
    values = [leaf.get_value() for leaf in _variables(checkpoint.abstract)]
    where = checkpoint.folder or Path.cwd()
    copy = sum(value.size * value.dtype.itemsize for value in values)
    free = shutil.disk_usage(where).free
    text = f"{readable(free)} free in {where.resolve()}, a converted copy takes {readable(copy)}"
    if free < copy:
        yield Finding("warn", "disk", f"{text}: load the Hugging Face folder as it is")
    else:
        yield Finding("ok", "disk", text)


def weights(folder: Path | None, ignore_config: Sequence[str] = ()) -> Findings:
    """Whether a folder's weights are finite numbers and, if it was converted, still the same."""
    if folder is None or jax.process_index() > 0:
        return
    wrong = False
    for fault in convert.faults(folder, ignore_config):
        wrong = True
        yield Finding("fail", "weights", fault)
    if not wrong:
        yield Finding("ok", "weights", "all read, all finite")
