"""Converted folders: Orbax weights, what is needed to go back, and the Hugging Face side files.

out/
  catp_jax.json      format, model type, key layout, every tensor's file and number type, and the
                     checksums of all parameters, of config.json and of itself
  weights/           the parameters, an Orbax checkpoint
  config.json, tokenizer.json, …   copied from the Hugging Face folder, byte by byte
"""

import dataclasses
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from catp_jax import checkpoint, leaves
from catp_jax.files import is_there
from catp_jax.messages import listed
from convert.configs import listed_keys
from convert.dtypes import cast, name_dtype, parse_dtype
from convert.families import family_of
from convert.family import wrapper_of
from convert.folders import (
    check_new,
    copy_side_files,
    forget,
    new_folder,
    refuse_unfinished,
    side_files,
)
from convert.loading import Progress, Source, abstract, counted
from convert.manifest import MANIFEST, File, Manifest, config_digest, read_config
from convert.reader import HfSource, open_hf
from convert.report import Report, make_report
from convert.rules import Match, Matching
from convert.shards import checksum, write_shard
from convert.weights import INDEX, SINGLE, write_index
from convert.writer import plan

WEIGHTS = "weights"


@dataclasses.dataclass(frozen=True)
class Converted(Source):
    """A converted folder."""

    manifest: Manifest

    def read(self, name: str, struct: jax.ShapeDtypeStruct) -> np.ndarray | jax.Array:
        return checkpoint.read(self.folder / WEIGHTS, name, struct)

    def is_unchanged(self, name: str, array: np.ndarray) -> bool:
        return checksum(array) == self.manifest.checksums.get(name)


def open_converted(folder: Path, ignore_config: Sequence[str] = ()) -> Converted:
    """Checks a converted folder without reading its weights. Raises ValueError."""
    refuse_unfinished(folder)
    manifest = Manifest.read(folder)
    stored = checkpoint.contents(folder / WEIGHTS)
    config = read_config(folder, ignore_config)
    family = family_of(config)
    own = family.with_own_head(config)
    heads = leaves.named(abstract(own)).keys() - leaves.named(abstract(config)).keys()
    if heads and heads <= stored.keys():
        config = own
    checkpoint.compare(stored, leaves.named(abstract(config)), folder / WEIGHTS)
    return Converted(folder, config, stored, manifest)


def to_orbax(
    hf_folder: str | Path,
    out: str | Path,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
    verify: bool = False,
    ignore_config: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> Report:
    """Converts a Hugging Face folder into the new folder `out`; weights as `dtype` (None: as is).

    A LoRA adapter, beside the weights or in the folder `adapter`, is merged, see `convert.adapter`.
    Keys of config.json in `ignore_config` are read as if they were not there, by whoever loads what
    comes out, too.

    Threads read while others write; host memory stays below twice the largest tensor and 1 GiB.
    `verify` reads all back and compares checksums. Raises ValueError if the input is damaged or
    unsupported, if `out` exists or cannot be written, or if it reads back differently; nothing is
    left of it then.
    """
    wanted = parse_dtype(dtype)
    check_new(Path(out))
    if is_there(Path(hf_folder) / MANIFEST):
        raise ValueError(f"{hf_folder} is converted already; `to_hf` (--to-hf) leads back")
    source = open_hf(Path(hf_folder), ignore_config, adapter)
    side_files(source.folder)  # of which one may not be there, before weights are read
    family = family_of(source.config)
    structs = {
        name: struct.update(dtype=struct.dtype if wanted is None else cast(family, name, wanted))
        for name, struct in source.stored.items()
    }
    filled = source.matching.filled
    sizes = {name: source.tensors[one.source].nbytes for name, one in filled.items()}
    read = sum(sizes.values())
    total = 2 * read if verify else read
    checksums: dict[str, int] = {}

    def first(name: str) -> Any:
        array = source.read(name, structs[name])
        checksums[name] = checksum(array)
        return array

    def is_back(name: str) -> bool:
        return checksums[name] == checksum(checkpoint.read(weights, name, structs[name]))

    with new_folder(Path(out)) as folder:
        _refuse_full_disk(folder, sum(map(leaves.nbytes, structs.values())))
        weights = folder / WEIGHTS
        needed = {name: leaves.nbytes(struct) for name, struct in structs.items()}
        runs = counted(leaves.ahead(first, needed), sizes, progress, 0, total)
        checkpoint.save_runs(weights, structs, runs)
        if verify:
            forget(folder)
            found = counted(leaves.ahead(is_back, needed), sizes, progress, read, total)
            if wrong := [name for run in found for name in run if not run[name]]:
                raise ValueError(
                    f"{len(wrong)} of the tensors read back differently from what was written: "
                    f"{listed(wrong)}; nothing was kept. Check the disk and convert again"
                )
        copy_side_files(source.folder, folder)
        if wanted is not None:
            name_dtype(folder / "config.json", wanted)
        _manifest(source, checksums, config_digest(folder), ignore_config).write(folder)
    return source.report({name: struct.dtype for name, struct in structs.items()})


def _manifest(
    source: HfSource, checksums: Mapping[str, int], config: str, ignore_config: Sequence[str]
) -> Manifest:
    """What leads back from a converted folder to its source."""
    matching = source.matching
    matched = {one.source for one in (*matching.filled.values(), *matching.twins)}
    dtypes = {
        one.name: one.dtype.name
        for shard in source.shards
        for one in shard.tensors
        if one.name in matched
    }
    return Manifest(
        model_type=family_of(source.config).model_type,
        layout=source.layout.name,
        files={
            shard.path.name: File(
                shard.metadata, tuple(one.name for one in shard.tensors if one.name in matched)
            )
            for shard in source.shards
        },
        dtypes=dtypes,
        ignored=tuple(matching.ignored),
        checksums=dict(sorted(checksums.items())),
        config=config,
        ignore_config=listed_keys(ignore_config),
    )


def to_hf(converted: str | Path, out: str | Path, progress: Progress | None = None) -> Report:
    """Writes a converted folder back as the new Hugging Face folder `out`.

    Tensors have the names, files, order and — unless converted with a `dtype` — the bytes that
    they had. Raises ValueError if `converted` is damaged, or was changed since, or if `out` exists
    or cannot be written.
    """
    check_new(Path(out))
    source = open_converted(Path(converted))
    folder, manifest = source.folder, source.manifest
    if config_digest(folder) != manifest.config:
        raise ValueError(
            f"{folder / 'config.json'} was changed after the conversion, and the weights were not; "
            "put the original back, and change what comes out"
        )
    matches = _matches(source)

    def read(name: str) -> np.ndarray:
        one = matches[name]
        array = np.asarray(source.read(one.target, source.stored[one.target]))
        if not source.is_unchanged(one.target, array):
            raise ValueError(f"{folder / WEIGHTS} is damaged: {one.target}; convert again")
        return one.transform.inverse(array)

    with new_folder(Path(out)) as target:
        shards = plan(target, manifest.files, matches, source.stored)
        tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        done, total = 0, sum(sizes.values())
        for shard in shards:
            mine = {tensor.name: tensor.nbytes for tensor in shard.tensors}
            runs = counted(leaves.ahead(read, mine), sizes, progress, done, total)
            write_shard(shard, (array for run in runs for array in run.values()))
            done += sum(mine.values())
        copy_side_files(folder, target, besides=(MANIFEST, "config.json", INDEX))
        is_cast = any(one.dtype.name != manifest.dtypes[name] for name, one in tensors.items())
        # the old index counts other bytes, or names tensors that were left out
        if (manifest.ignored or is_cast) and SINGLE not in manifest.files:
            write_index(target, shards)
        elif is_there(folder / INDEX):
            shutil.copyfile(folder / INDEX, target / INDEX)
        shutil.copyfile(folder / "config.json", target / "config.json")
    matching = Matching({}, [matches[name] for name in tensors], {})
    dtypes = {name: struct.dtype for name, struct in source.stored.items()}
    return make_report(folder, manifest.layout, matching, tensors, dtypes)


def _matches(source: Converted) -> dict[str, Match]:
    """Which parameter is each tensor of the original, by its name. Raises ValueError."""
    manifest, family = source.manifest, family_of(source.config)
    names = [name for file in manifest.files.values() for name in file.tensors]
    layout = dataclasses.replace(family.layouts[manifest.layout], wrapper=wrapper_of(names))
    matches = family.names(source.stored, source.config, layout).places(names)
    if {*names} != matches.keys() or {one.target for one in matches.values()} != {*source.stored}:
        raise ValueError(
            f"{source.folder}: {MANIFEST} lists {len(names)} tensors, {WEIGHTS} holds "
            f"{len(source.stored)}, and they are not the same; convert again"
        )
    return matches


def _refuse_full_disk(folder: Path, wanted: int) -> None:
    """Raises OSError if a disk has no room for that many bytes; Orbax would find out halfway."""
    if shutil.disk_usage(folder).free < wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
