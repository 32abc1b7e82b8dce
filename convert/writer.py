"""Writes a model of ours as a Hugging Face folder.

Tensors are written one after the other, so that host memory stays near the largest of them.
config.json comes last.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from catp_jax import leaves
from convert.dtypes import name_dtype, parse_dtype, with_room
from convert.families import Model, family_of, parse_config
from convert.folders import copy_side_files, new_folder
from convert.manifest import MANIFEST, File
from convert.rules import Match
from convert.shards import DTYPES, Shard, Tensor, write_shard
from convert.weights import INDEX, SINGLE, write_index


def write_hf(
    model: Model,
    config_json: dict[str, Any],
    out: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    side_files: str | Path | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a model as the new Hugging Face folder `out`, which transformers loads.

    `side_files` is a folder whose tokenizer, processor and the like are copied along. `dtype` is
    the number type that the weights of a float32 model are stored in (None: their own), but for
    those that need float32's room, as T5's `wo` in float16; config.json then says that all are read
    as float32. Raises ValueError if `config_json` does not describe the model, if the model is not
    of float32 or a weight is too large for `dtype`, or if `out` exists or cannot be written.
    """
    family = family_of(model.config)
    config = parse_config(config_json)
    if model.config == family.with_own_head(model.config):
        config = family_of(config).with_own_head(config)
    if config != model.config:
        raise ValueError(
            "the config.json to be written describes another model than the one to be written; "
            "convert.config_json(model.config) makes one that fits"
        )
    arrays, stored = leaves.named(model), parse_dtype(dtype)
    known = [*DTYPES.values()]
    if wrong := sorted({str(x.dtype) for x in arrays.values() if x.dtype not in known}):
        raise ValueError(
            f"the weights are of type {', '.join(wrong)}; "
            f"safetensors are written of {', '.join(dtype.name for dtype in known)}"
        )
    own = sorted({array.dtype.name for array in arrays.values()})
    if stored is not None and own != ["float32"]:
        raise ValueError(
            f"dtype is {stored.name}, which is for models of float32 weights, and this one's are "
            f"{' and '.join(own)}; leave dtype out, or load the model with dtype='float32'"
        )
    matches = dict(sorted(family.names(arrays, model.config).wanted.items()))
    dtypes = {
        name: with_room(family, name, stored) if stored is not None else array.dtype
        for name, array in arrays.items()
    }
    structs = {
        name: jax.ShapeDtypeStruct(array.shape, dtypes[name]) for name, array in arrays.items()
    }
    sizes = {name: leaves.nbytes(structs[one.target]) for name, one in matches.items()}
    files = {
        file: File({"format": "pt"}, tuple(names))
        for file, names in split(sizes, max_shard_bytes).items()
    }
    with new_folder(Path(out)) as folder:
        shards = plan(folder, files, matches, structs)
        for shard in shards:
            found = [matches[tensor.name] for tensor in shard.tensors]
            parameters = (
                stored_as(dtypes[one.target], np.asarray(arrays[one.target]), one.source)
                for one in found
            )
            write_shard(
                shard, (x.transform.inverse(own) for x, own in zip(found, parameters, strict=True))
            )
        if len(shards) > 1:
            write_index(folder, shards)
        if side_files is not None:
            copy_side_files(Path(side_files), folder, besides=("config.json", INDEX, MANIFEST))
        said = config_json if stored is None else config_json | {"dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
        if stored is not None:
            name_dtype(folder / "config.json", np.dtype(np.float32))


def stored_as(dtype: np.dtype, array: np.ndarray, name: str) -> np.ndarray:
    """The numbers of the tensor `name`, of another type. Raises ValueError if it has no room."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise ValueError(
            f"{name} has values up to {np.abs(array).max():g}, and {dtype.name} holds finite ones "
            f"up to {float(jnp.finfo(dtype).max):g}; leave dtype out, or choose one with room"
        )
    return cast


def plan(
    folder: Path, files: Mapping[str, File], matches: Mapping[str, Match], parameters: Any
) -> list[Shard]:
    """Files to be written of parameters, which may be abstract: tensors as a checkpoint has them,
    in the parameters' number types.
    """

    def tensor(name: str, path: Path) -> Tensor:
        one = matches[name]
        parameter = parameters[one.target]
        shape = one.transform.source_shape(parameter.shape)
        return Tensor(name, path, np.dtype(parameter.dtype), shape, 0)

    return [
        Shard(path, file.metadata, tuple(tensor(name, path) for name in file.tensors))
        for name, file in files.items()
        for path in [folder / name]
    ]


def split(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Distributes tensors over files of at most that many bytes, or of a single tensor."""
    runs = leaves.runs(sizes, max_shard_bytes)
    if len(runs) == 1:
        return {SINGLE: runs[0]}
    return {
        f"model-{number:05d}-of-{len(runs):05d}.safetensors": run
        for number, run in enumerate(runs, start=1)
    }
