"""Reads all weights of a folder, as they are stored, and says what is wrong with their values."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from catp_jax import checkpoint
from convert.converted import (
    MANIFEST,
    PART,
    WEIGHTS,
    Manifest,
    config_digest,
    different,
)
from convert.reader import Pair, by_position, file_bytes, open_source
from convert.rules import listed
from convert.streams import ahead, parts

AT_ONCE = 2**24  # numbers that are looked at as one


def faults(folder: Path, ignore_config: Sequence[str] = ()) -> Iterator[str]:
    """A line for each kind of fault: bytes that changed since the conversion, values that are no
    finite numbers. `ignore_config` is as in `load`.

    Raises ValueError if the folder cannot be read at all.
    """
    if (folder / MANIFEST).exists():
        yield from _faults_of_converted(folder)
        return
    source = open_source(folder, ignore_config)
    pairs = [[pair] for pair in by_position(source)]

    def is_finite_pair(pair: Pair) -> bool:
        return is_finite(pair[1].read(lambda mapped: mapped, pair[1].dtype))

    endless = [
        pair[0].source
        for found in ahead(pairs, is_finite_pair, file_bytes)
        for pair, good in found
        if not good
    ]
    if endless:
        yield _not_finite(endless)


def _faults_of_converted(folder: Path) -> Iterator[str]:
    manifest = Manifest.read(folder)
    if config_digest(folder) != manifest.config:
        yield "config.json was changed after the conversion"
    stored = checkpoint.contents(folder / WEIGHTS)

    def nbytes(name: str) -> int:
        shape, dtype = stored[name]
        return math.prod(shape) * dtype.itemsize

    changed, endless = [], []
    for run in parts([*stored], nbytes, PART):
        arrays = checkpoint.read(folder / WEIGHTS, {name: stored[name] for name in run})
        changed += different(arrays, manifest.checksums)
        endless += [name for name, array in arrays.items() if not is_finite(array)]
        del arrays
    if missing := sorted(manifest.checksums.keys() - stored.keys()):
        yield f"{len(missing)} parameters are missing: {listed(missing)}; convert again"
    if changed:
        yield (
            f"{len(changed)} parameters are not those that were converted: {listed(changed)}; "
            "check the disk and convert again"
        )
    if endless:
        yield _not_finite(endless)


def is_finite(array: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity in it."""
    flat = array.reshape(-1)
    return all(
        bool(np.isfinite(flat[start : start + AT_ONCE]).all())
        for start in range(0, flat.size, AT_ONCE)
    )


def _not_finite(names: Sequence[str]) -> str:
    return f"{len(names)} tensors have NaN or infinity in them: {listed(names)}"
