"""Meshes of devices, from what a user says: "data=2,tensor=4"."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")

MOST = 4096  # devices

MeshLike = str | Mapping[str, int]
"""Sizes of some of `AXES`, as a mapping or as "data=2,tensor=4"; those left out are 1."""


def parse_mesh(mesh: MeshLike) -> dict[str, int]:
    """The size of each of `AXES`. Raises ValueError for other axes and for sizes below 1."""
    given: dict[str, Any] = {}
    if isinstance(mesh, str):
        for part in mesh.split(","):
            name, _, size = part.strip().partition("=")
            if name in given:
                raise ValueError(f"a mesh names each axis once, got {mesh!r}")
            given[name] = int(size) if size.isdecimal() else size
    else:
        given = dict(mesh)
    wrong = [
        f"{name}={size}"
        for name, size in given.items()
        if name not in AXES or not isinstance(size, int) or not 1 <= size <= MOST
    ]
    if wrong:
        raise ValueError(
            f"a mesh is sizes of {', '.join(AXES)}, such as 'data=2,tensor=4'; "
            f"got {', '.join(wrong)}"
        )
    sizes = {name: given.get(name, 1) for name in AXES}
    if math.prod(sizes.values()) > MOST:
        raise ValueError(f"a mesh has at most {MOST} places, got {mesh!r}")
    return sizes


def find_devices() -> list[Any]:
    """The devices of all processes. Raises ValueError if JAX can start none."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # the former for a platform that is not there
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(
            f"JAX finds no device (JAX_PLATFORMS={asked}): install it for this machine's "
            f"(catp-jax[cuda] for NVIDIA's), or unset JAX_PLATFORMS. {error}".strip()
        ) from None


def make_mesh(mesh: MeshLike, kv_heads: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of these devices (all there are), for a language model of so many key-value heads.

    Raises ValueError if the devices are more or fewer than the mesh has places.
    """
    sizes = parse_mesh(mesh)
    devices = find_devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"the mesh {text} has {math.prod(sizes.values())} places, and JAX sees {len(devices)} "
            "devices; choose sizes whose product is their number, or show JAX other devices "
            "(CUDA_VISIBLE_DEVICES)"
        )
    kv = math.gcd(sizes["tensor"], kv_heads)
    shape = (sizes["data"], sizes["fsdp"], kv, sizes["tensor"] // kv)
    grid = np.asarray(devices, dtype=object).reshape(shape)
    return Mesh(grid, ("data", "fsdp", "kv", "group"), axis_types=(AxisType.Auto,) * 4)
