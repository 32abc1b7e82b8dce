"""Writes Hugging Face folders: a model of ours, or a converted folder back as it was.

Tensors are written one after the other in the layout of safetensors, so that host memory stays
near the largest of them. config.json comes last.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from catp_jax import checkpoint
from convert.families import Model, family_of, parse_config
from convert.folders import copy_side_files, new_folder
from convert.rules import sources
from convert.shards import DTYPES, INDEX, SINGLE
from convert.streams import copy

NAMES = {dtype: name for name, dtype in DTYPES.items()}

Spec = tuple[str, np.dtype, tuple[int, ...]]
"""Name, number type and shape of a tensor to be written."""


def write_hf(
    model: Model,
    config_json: dict[str, Any],
    out: str | Path,
    max_shard_bytes: int = 5_000_000_000,
    side_files: str | Path | None = None,
) -> None:
    """Writes a model as the new Hugging Face folder `out`, which transformers loads.

    `side_files` is a folder whose tokenizer, processor and the like are copied along. Raises
    ValueError if `config_json` does not describe the model, or if `out` exists or cannot be
    written.
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
    arrays = checkpoint.names(model)
    matches = {one.source: one for one in sources(arrays, family.rules(model.config))}
    specs = [
        (name, np.dtype(array.dtype), one.transform.source_shape(array.shape))
        for name, one in sorted(matches.items())
        for array in [arrays[one.target]]
    ]
    if wrong := sorted({dtype.name for _, dtype, _ in specs if dtype not in NAMES}):
        raise ValueError(
            f"the weights are of type {', '.join(wrong)}; "
            f"safetensors are written of {', '.join(dtype.name for dtype in NAMES)}"
        )

    def values(names: Sequence[str]) -> Iterator[np.ndarray]:
        for name in names:
            one = matches[name]
            yield one.transform.inverse(np.asarray(arrays[one.target]))

    files = split(specs, max_shard_bytes)
    with new_folder(Path(out)) as folder:
        for file, inside in files.items():
            names = [name for name, _, _ in inside]
            write_safetensors(folder / file, inside, values(names), {"format": "pt"})
        if len(files) > 1:
            write_index(folder, files)
        if side_files is not None:
            copy_side_files(Path(side_files), folder, besides=("config.json", INDEX))
        (folder / "config.json").write_text(
            json.dumps(config_json, indent=2, sort_keys=True) + "\n"
        )


def split(specs: Sequence[Spec], max_shard_bytes: int) -> dict[str, list[Spec]]:
    """Distributes tensors over files of at most that many bytes, or of a single tensor."""
    groups: list[list[Spec]] = [[]]
    room = max_shard_bytes
    for spec in specs:
        if groups[-1] and nbytes(spec) > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(spec)
        room -= nbytes(spec)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def write_safetensors(
    path: Path, specs: Sequence[Spec], values: Iterator[np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes one safetensors file; `values` yields the tensors in the order of `specs`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for spec in specs:
        name, dtype, shape = spec
        start, end = end, end + nbytes(spec)
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, dtype, shape), value in zip(specs, values, strict=True):
            if value.dtype != dtype or value.shape != shape:
                raise RuntimeError(f"{name} is {value.dtype} {value.shape}, not {dtype} {shape}")
            file.write(copy(value, dtype).reshape(-1).view(np.uint8).data)


def write_index(
    folder: Path, files: Mapping[str, Sequence[Spec]], metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes the index that says which file each tensor is in."""
    total = sum(nbytes(spec) for specs in files.values() for spec in specs)
    where = {name: file for file, specs in files.items() for name, _, _ in specs}
    content = {
        "metadata": {**(metadata or {}), "total_size": total},
        "weight_map": dict(sorted(where.items())),
    }
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def nbytes(spec: Spec) -> int:
    """Bytes that a tensor takes in its file."""
    _, dtype, shape = spec
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
