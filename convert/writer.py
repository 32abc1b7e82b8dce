"""Writes a model of ours as a Hugging Face folder.

Tensors are written one after the other, so that host memory stays near the largest of them.
config.json comes last.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from catp_jax import leaves
from convert.dtypes import parse_dtype
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
    the number type that weights are stored in (None: their own); config.json then says that they
    are read as their own, the widest if they have several. Raises ValueError if `config_json` does
    not describe the model, or if `out` exists or cannot be written.
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
    if stored is not None:
        widest = max((array.dtype for array in arrays.values()), key=lambda one: one.itemsize)
        config_json = config_json | {"dtype": widest.name}
    known = [*DTYPES.values()]
    if wrong := sorted({str(x.dtype) for x in arrays.values() if x.dtype not in known}):
        raise ValueError(
            f"the weights are of type {', '.join(wrong)}; "
            f"safetensors are written of {', '.join(dtype.name for dtype in known)}"
        )
    matches = dict(sorted(family.names(arrays, model.config).wanted.items()))
    structs = {
        name: jax.ShapeDtypeStruct(array.shape, stored or array.dtype)
        for name, array in arrays.items()
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
                np.asarray(arrays[one.target]).astype(structs[one.target].dtype, copy=False)
                for one in found
            )
            write_shard(
                shard, (x.transform.inverse(own) for x, own in zip(found, parameters, strict=True))
            )
        if len(shards) > 1:
            write_index(folder, shards)
        if side_files is not None:
            copy_side_files(Path(side_files), folder, besides=("config.json", INDEX, MANIFEST))
        (folder / "config.json").write_text(
            json.dumps(config_json, indent=2, sort_keys=True) + "\n"
        )


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
