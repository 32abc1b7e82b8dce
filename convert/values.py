"""Reads all weights of a folder, as they are stored, and says what is wrong with their values."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from catp_jax.messages import listed
from convert.manifest import MANIFEST, config_digest
from convert.reader import open_hf

AT_ONCE = 2**24  # numbers that are looked at as one


def faults(folder: Path, ignore_config: Sequence[str] = ()) -> Iterator[str]:
    """A line for each kind of fault: bytes that changed since the conversion, values that are no
    finite numbers. `ignore_config` is as in `load`.

    Raises ValueError if the folder cannot be read at all.
    """
    endless: list[str] = []
    if not (folder / MANIFEST).exists():
        source = open_hf(folder, ignore_config)
        filled = source.matching.filled
        for run in source.runs(source.stored):
            endless += [filled[name].source for name in run if not is_finite(run[name])]
    else:
        from convert.converted import open_converted  # imports Orbax

        converted = open_converted(folder, ignore_config)
        manifest, changed = converted.manifest, list[str]()
        if config_digest(folder) != manifest.config:
            yield "config.json was changed after the conversion"
        for run in converted.runs(converted.stored):
            changed += converted.changed(run)
            endless += [name for name in run if not is_finite(run[name])]
        if changed:
            yield (
                f"{len(changed)} parameters are not those that were converted: {listed(changed)}; "
                "check the disk and convert again"
            )
    if endless:
        yield f"{len(endless)} tensors have NaN or infinity in them: {listed(endless)}"


def is_finite(array: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity in it."""
    flat = array.reshape(-1)
    return all(
        bool(np.isfinite(flat[start : start + AT_ONCE]).all())
        for start in range(0, flat.size, AT_ONCE)
    )
