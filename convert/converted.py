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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from catp_jax import checkpoint, leaves
from catp_jax.messages import listed
from convert.dtypes import cast, name_dtype, parse_dtype
from convert.families import Config, family_of
from convert.family import wrapper_of
from convert.folders import check_new, copy_side_files, forget, new_folder, refuse_unfinished
from convert.loading import Progress, abstract, counted
from convert.manifest import MANIFEST, File, Manifest, config_digest, read_config
from convert.reader import HfSource, open_hf
from convert.report import Report, make_report
from convert.rules import Match, Matching
from convert.shards import Shard, Tensor, write_shard
from convert.weights import INDEX, SINGLE, write_index

WEIGHTS = "weights"


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted folder, its manifest checked; no weights have been read."""

    folder: Path
    manifest: Manifest
    stored: dict[str, jax.ShapeDtypeStruct]
    config: Config

    def runs(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, Any]]:
        """Parameters, some at a time, see `convert.loading.Source`."""
        return checkpoint.read_runs(self.folder / WEIGHTS, wanted)

    def changed(self, arrays: Mapping[str, np.ndarray]) -> list[str]:
        """The names of parameters that are not those that were converted."""
        return different(arrays, self.manifest.checksums)


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
    return Converted(folder, manifest, stored, config)


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
    if (Path(hf_folder) / MANIFEST).exists():
        raise ValueError(f"{hf_folder} is converted already; `to_hf` (--to-hf) leads back")
    source = open_hf(Path(hf_folder), ignore_config, adapter)
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

    def see(name: str, array: np.ndarray) -> None:
        checksums[name] = checksum(array)

    with new_folder(Path(out)) as folder:
        _refuse_full_disk(folder, sum(map(leaves.nbytes, structs.values())))
        runs = counted(source.runs(structs, see), sizes, progress, 0, total)
        checkpoint.save_runs(folder / WEIGHTS, structs, runs)
        if verify:
            forget(folder)
            back = checkpoint.read_runs(folder / WEIGHTS, structs)
            _verify(counted(back, sizes, progress, read, total), checksums)
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
    kept = [
        (shard, [tensor for tensor in shard.tensors if tensor.name in matched])
        for shard in source.shards
    ]
    return Manifest(
        model_type=family_of(source.config).model_type,
        layout=source.layout.name,
        files={
            shard.path.name: File(shard.metadata, tuple(tensor.name for tensor in tensors))
            for shard, tensors in kept
        },
        dtypes={tensor.name: tensor.dtype.name for _, tensors in kept for tensor in tensors},
        ignored=tuple(matching.ignored),
        checksums=dict(sorted(checksums.items())),
        config=config,
        ignore_config=tuple(ignore_config),
    )


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of a contiguous array's bytes."""
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def different(arrays: Mapping[str, np.ndarray], checksums: Mapping[str, int]) -> list[str]:
    """The names of arrays that are not those of the checksums."""
    return [name for name, array in arrays.items() if checksum(array) != checksums.get(name)]


def _verify(runs: Iterator[dict[str, np.ndarray]], checksums: Mapping[str, int]) -> None:
    """Raises ValueError if weights that were read back are not those of the source."""
    if wrong := [name for run in runs for name in different(run, checksums)]:
        raise ValueError(
            f"{len(wrong)} of the tensors read back differently from what was written: "
            f"{listed(wrong)}; nothing was kept. Check the disk and convert again"
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
    with new_folder(Path(out)) as target:
        shards = [
            Shard(target / name, file.metadata, tuple(_tensors(source, matches, target / name)))
            for name, file in manifest.files.items()
        ]
        sizes = {tensor.name: tensor.nbytes for shard in shards for tensor in shard.tensors}
        done, total = 0, sum(sizes.values())
        for shard in shards:
            mine = {tensor.name: tensor.nbytes for tensor in shard.tensors}
            runs = counted(_read_back(source, matches, mine), sizes, progress, done, total)
            write_shard(shard, (array for run in runs for array in run.values()))
            done += sum(mine.values())
        copy_side_files(folder, target, besides=(MANIFEST, "config.json", INDEX))
        is_cast = any(
            tensor.dtype.name != manifest.dtypes[tensor.name]
            for shard in shards
            for tensor in shard.tensors
        )
        # the old index counts other bytes, or names tensors that were left out
        if (manifest.ignored or is_cast) and SINGLE not in manifest.files:
            write_index(target, shards)
        elif (folder / INDEX).exists():
            shutil.copyfile(folder / INDEX, target / INDEX)
        shutil.copyfile(folder / "config.json", target / "config.json")
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
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


def _tensors(source: Converted, matches: Mapping[str, Match], file: Path) -> Iterator[Tensor]:
    """The tensors of a file that is to be written."""
    for name in source.manifest.files[file.name].tensors:
        struct = source.stored[matches[name].target]
        shape = matches[name].transform.source_shape(struct.shape)
        yield Tensor(name, file, struct.dtype, shape, 0)


def _read_back(
    source: Converted, matches: Mapping[str, Match], sizes: Mapping[str, int]
) -> Iterator[dict[str, np.ndarray]]:
    """Tensors as they were, some at a time. Raises ValueError if their bytes have changed."""
    for names in leaves.runs(sizes):
        targets = {matches[name].target for name in names}
        wanted = {target: source.stored[target] for target in targets}
        arrays = checkpoint.read(source.folder / WEIGHTS, wanted)
        if wrong := source.changed(arrays):
            raise ValueError(
                f"{source.folder / WEIGHTS} is damaged: {listed(wrong)}; convert again"
            )
        run = {
            name: matches[name].transform.inverse(arrays[matches[name].target]) for name in names
        }
        del arrays
        yield run
        run.clear()


def _refuse_full_disk(folder: Path, wanted: int) -> None:
    """Raises OSError if a disk has no room for that many bytes; Orbax would find out halfway."""
    if shutil.disk_usage(folder).free < wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
