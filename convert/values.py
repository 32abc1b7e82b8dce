"""Reads all weights of a folder, as they are stored, and says what is wrong with their values."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from catp_jax import leaves
from catp_jax.files import is_there
from catp_jax.messages import listed
from convert.converted import Converted, open_converted
from convert.manifest import MANIFEST, config_digest
from convert.reader import open_hf

AT_ONCE = 2**24  # numbers that are looked at as one


def faults(folder: Path, ignore_config: Sequence[str] = ()) -> Iterator[str]:
    """A line for each kind of fault: bytes that changed since the conversion, values that are no
    finite numbers. `ignore_config` is as in `load`.

    Raises ValueError if the folder cannot be read at all.
    """
    is_converted = is_there(folder / MANIFEST)
    source = (open_converted if is_converted else open_hf)(folder, ignore_config)
    if isinstance(source, Converted) and config_digest(folder) != source.manifest.config:
        yield "config.json was changed after the conversion"

    def look(name: str) -> tuple[bool, bool]:
        array = np.asarray(source.read(name, source.stored[name]))
        return source.is_unchanged(name, array), is_finite(array)

    sizes = {name: leaves.nbytes(struct) for name, struct in source.stored.items()}
    found = {name: said for run in leaves.ahead(look, sizes) for name, said in run.items()}
    if changed := [name for name, (is_unchanged, _) in found.items() if not is_unchanged]:
        yield (
            f"{len(changed)} parameters are not those that were converted: "
            f"{listed(changed)}; check the disk and convert again"
        )
    if endless := [source.called(name) for name, (_, is_whole) in found.items() if not is_whole]:
        yield f"{len(endless)} tensors have NaN or infinity in them: {listed(endless)}"


def is_finite(array: np.ndarray) -> bool:
    """Whether an array has neither NaN nor infinity in it."""
    flat = array.reshape(-1)
    return all(
        bool(np.isfinite(flat[start : start + AT_ONCE]).all())
        for start in range(0, flat.size, AT_ONCE)
    )
