"""Number types of weights: those that are read, and as which of them a parameter is loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from catp_jax import leaves
from convert.configs import note, read_json
from convert.family import Family
from convert.shards import DTYPES

READ = tuple(DTYPES.values())
KEYS = ("dtype", "torch_dtype")  # of config.json; the second is the older


def parse_dtype(dtype: DTypeLike | None) -> np.dtype | None:
    """A number type by name or object. Raises ValueError if weights cannot be of that type."""
    if dtype is None:
        return None
    names = ", ".join(known.name for known in READ)
    try:
        parsed = np.dtype(jnp.dtype(dtype))
    except TypeError as error:
        raise ValueError(f"dtype is {dtype!r}; wanted: {names}") from error
    if parsed not in READ:
        raise ValueError(f"dtype is {parsed.name}; wanted: {names}")
    return parsed


def cast(family: Family, parameter: str, dtype: np.dtype) -> np.dtype:
    """`dtype`, or float32 for a parameter that is used in float32 only."""
    is_wide = parameter.startswith(family.float32)
    return np.dtype(np.float32) if is_wide else with_room(family, parameter, dtype)


def with_room(family: Family, parameter: str, dtype: np.dtype) -> np.dtype:
    """`dtype`, or float32 for a parameter whose numbers get too large for float16."""
    is_wide = dtype == np.float16 and parameter.endswith(family.not_float16)
    return np.dtype(np.float32) if is_wide else dtype


def one_dtype(
    folder: Path, family: Family, stored: Mapping[str, jax.ShapeDtypeStruct]
) -> np.dtype | None:
    """The number type that parameters are read as: float32 if config.json says so, as transformers
    reads them. Else None, as they are, if all are of one type, and of several the one that
    config.json says, or that most bytes are of. Those that stay float32 anyway do not count.
    """
    raw = read_json(folder)
    if next((raw[key] for key in KEYS if raw.get(key) is not None), None) == "float32":
        return parse_dtype("float32")
    nbytes: dict[str, int] = {}
    for name, struct in stored.items():
        if not name.startswith(family.float32):
            kind = struct.dtype.name
            nbytes[kind] = nbytes.get(kind, 0) + leaves.nbytes(struct)
    if len(nbytes) < 2:
        return None
    parts = [part for part in (raw, raw.get("text_config")) if isinstance(part, dict)]
    stated = [part[key] for part in parts for key in KEYS if part.get(key) is not None]
    if wrong := [one for one in stated if not isinstance(one, str)]:
        raise ValueError(f"{folder}: config.json has dtype {wrong[0]!r}; a type's name is wanted")
    stated = [one for one in stated if one in nbytes]
    chosen = stated[0] if stated else max(nbytes, key=lambda kind: nbytes[kind])
    note(f"{folder} has weights of {' and '.join(sorted(nbytes))}; all are read as {chosen}")
    return parse_dtype(chosen)


def with_dtypes(model: Any, dtypes: Mapping[str, np.dtype]) -> Any:
    """An abstract model with these number types."""
    structs = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtypes[name])
        for name, leaf in leaves.named(model).items()
    }
    return leaves.fill(model, structs)


def name_dtype(path: Path, dtype: np.dtype) -> None:
    """Makes a config.json name the number type of weights that were cast."""
    content = json.loads(path.read_bytes())
    for part in (content, *content.values()):
        for key in KEYS:
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = dtype.name
    path.write_text(json.dumps(content, indent=2) + "\n")
