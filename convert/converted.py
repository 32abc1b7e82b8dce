"""Converted folders: Orbax weights, what is needed to go back, and the Hugging Face side files.

out/
  catp_jax.json      format, model type, key layout, every tensor's file and number type, and the
                     checksums of all parameters, of config.json and of itself
  weights/           the parameters, an Orbax checkpoint
  config.json, tokenizer.json, …   copied from the Hugging Face folder, byte by byte
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from catp_jax import checkpoint, strict_json
from catp_jax.models.narrow import Weights, with_scales
from convert import families
from convert.families import FAMILIES, Config, Model, family_of
from convert.folders import check_new, copy_side_files, forget, new_folder, refuse_unfinished
from convert.names import check_weights_file
from convert.reader import (
    DTYPE_KEYS,
    Pair,
    Place,
    Progress,
    Source,
    abstract,
    by_position,
    cast,
    file_bytes,
    narrowed,
    one_dtype,
    open_source,
    parse_dtype,
    read_part,
    with_dtypes,
)
from convert.report import Report, Row
from convert.rules import listed
from convert.shards import DTYPES, INDEX, SINGLE, is_text_by_text
from convert.streams import ahead, parts, trim
from convert.writer import Spec, nbytes, write_index, write_safetensors

MANIFEST, WEIGHTS = "catp_jax.json", "weights"
FORMAT = 3  # 2 had no checksums, 1 the parts of BLIP-2's `qkv` one after the other
FLOAT32 = np.dtype(np.float32)
PART = 384 * 2**20  # bytes of tensors that are written, or read back, as one; or a larger tensor


@dataclasses.dataclass(frozen=True)
class File:
    """One safetensors file of the original: its metadata, its tensors in order of their bytes."""

    metadata: dict[str, str]
    tensors: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What catp_jax.json holds.

    `dtypes` are those of the original tensors; `checksums` are CRC-32 of the parameters as they are
    stored, by their names; `config` is the SHA-256 of config.json, which is read without the keys
    `ignore_config`.
    """

    model_type: str
    layout: str
    files: dict[str, File]
    dtypes: dict[str, str]
    ignored: tuple[str, ...]
    checksums: dict[str, int]
    config: str
    ignore_config: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Writes it into a folder."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        content["sha256"] = _digest(content)
        (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads it from a folder. Raises ValueError if it is of another version, or was changed."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} is no converted folder: it has no {MANIFEST}")
        try:
            content = strict_json.parse(path.read_bytes())
            written, kind = content["format"], content["model_type"]
            if written != FORMAT or kind not in FAMILIES:
                raise ValueError(
                    f"it is of format {written} and model type {kind}, this version reads format "
                    f"{FORMAT} and {', '.join(FAMILIES)}"
                )
            if content["layout"] not in FAMILIES[kind].layouts:
                raise ValueError(f"unknown layout {content['layout']!r}")
            files = {
                check_weights_file(name): File(file["metadata"], tuple(file["tensors"]))
                for name, file in content["files"].items()
            }
            if not all(is_text_by_text(file.metadata) for file in files.values()):
                raise ValueError("the metadata of its files are not objects of texts")
            listed = [name for file in files.values() for name in file.tensors]
            dtypes, known = content["dtypes"], {dtype.name for dtype in DTYPES.values()}
            if len({*listed}) != len(listed) or {*listed} != dtypes.keys():
                raise ValueError("its files and dtypes do not name the same tensors, each once")
            if not known.issuperset(dtypes.values()):
                raise ValueError(f"its dtypes are not all of {', '.join(sorted(known))}")
            checksums, config = content["checksums"], content["config"]
            if not isinstance(checksums, dict) or not isinstance(config, str):
                raise ValueError("its checksums are none")
            if content.pop("sha256", None) != _digest(content):
                raise ValueError("it was changed after it was written")
            return cls(
                model_type=kind,
                layout=content["layout"],
                files=files,
                dtypes=dtypes,
                ignored=tuple(content["ignored"]),
                checksums=checksums,
                config=config,
                ignore_config=tuple(content["ignore_config"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); convert again") from error


def _digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's content, order included."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def config_digest(folder: Path) -> str:
    """The SHA-256 of a folder's config.json."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


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
    `verify` reads all back and compares checksums, in up to one such tensor more. Raises
    ValueError if the input is damaged or unsupported, if `out` exists or cannot be written, or if
    it reads back differently; nothing is left of it then.
    """
    wanted = parse_dtype(dtype)
    check_new(Path(out))
    if (Path(hf_folder) / MANIFEST).exists():
        raise ValueError(f"{hf_folder} is converted already; `to_hf` (--to-hf) leads back")
    source = open_source(Path(hf_folder), ignore_config, adapter)
    matching = source.matching
    dtypes = {match.target: source.stored(match, wanted) for match in matching.matches}
    weights = checkpoint.names(with_dtypes(source.abstract, dtypes))
    pairs = by_position(source)
    done, total = 0, sum(map(file_bytes, pairs)) * (2 if verify else 1)
    checksums: dict[str, int] = {}
    under_way: list[Pair] = []  # the run that is being written

    def read(pair: Pair) -> np.ndarray:
        array = read_part(*pair, dtypes[pair[0].target])
        checksums[pair[0].target] = checksum(array)
        return array

    def stored_bytes(pair: Pair) -> int:
        match, tensor = pair
        return tensor.nbytes // tensor.dtype.itemsize * dtypes[match.target].itemsize

    def count(run: Sequence[Pair]) -> None:
        nonlocal done
        done += sum(map(file_bytes, run))
        if progress is not None:
            progress(done, total)

    runs = parts(pairs, stored_bytes, PART)
    runs.sort(key=len)  # a large tensor, alone, at first: at the end nothing goes on beside it

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for found in ahead(runs, read, stored_bytes, behind=1):
            run = {match.target: array for (match, _), array in found}
            yield run
            run.clear()
            trim()
            if under_way:
                count(under_way)
            under_way[:] = [pair for pair, _ in found]

    with new_folder(Path(out)) as folder:
        _refuse_full_disk(folder, sum(map(stored_bytes, pairs)))
        checkpoint.save_runs(folder / WEIGHTS, weights, stream())
        count(under_way)
        if verify:
            _verify(folder, runs, checksums, count)
        copy_side_files(source.folder, folder)
        if wanted is not None:
            name_dtype(folder / "config.json", wanted)
        manifest = _manifest(source, checksums, config_digest(folder), tuple(ignore_config))
        manifest.write(folder)
    return source.report(dtypes)


def _manifest(
    source: Source, checksums: dict[str, int], config: str, ignore_config: tuple[str, ...]
) -> Manifest:
    """What leads back from a converted folder to its source."""
    matching = source.matching
    matched = {match.source for match in (*matching.matches, *matching.twins)}
    return Manifest(
        model_type=family_of(source.config).model_type,
        layout=source.layout,
        files={
            shard.path.name: File(
                shard.metadata, tuple(t.name for t in shard.tensors if t.name in matched)
            )
            for shard in source.shards
        },
        dtypes={
            tensor.name: tensor.dtype.name
            for shard in source.shards
            for tensor in shard.tensors
            if tensor.name in matched
        },
        ignored=tuple(matching.ignored),
        checksums={name: checksums[name] for name in sorted(checksums)},
        config=config,
        ignore_config=ignore_config,
    )


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of a contiguous array's bytes."""
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def different(arrays: Mapping[str, np.ndarray], checksums: Mapping[str, int]) -> list[str]:
    """The names of arrays that are not those of the checksums."""
    return [name for name, array in arrays.items() if checksum(array) != checksums.get(name)]


def _verify(
    folder: Path,
    runs: Sequence[Sequence[Pair]],
    checksums: Mapping[str, int],
    count: Callable[[Sequence[Pair]], None],
) -> None:
    """Reads weights back from the disk. Raises ValueError if they are not those of the source."""
    forget(folder)
    stored = checkpoint.contents(folder / WEIGHTS)
    wrong = []
    for run in runs:
        wanted = {match.target: stored[match.target] for match, _ in run}
        wrong += different(checkpoint.read(folder / WEIGHTS, wanted), checksums)
        trim()
        count(run)
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the tensors read back differently from what was written: "
            f"{listed(wrong)}; nothing was kept. Check the disk and convert again"
        )


def name_dtype(path: Path, dtype: np.dtype) -> None:
    """Makes a config.json name the number type of weights that were cast."""
    content = json.loads(path.read_bytes())
    for part in (content, *content.values()):
        for key in DTYPE_KEYS:
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = dtype.name
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_converted(
    folder: str | Path,
    dtype: DTypeLike | None = None,
    place: Place | None = None,
    weights: Weights | None = None,
    ignore_config: Sequence[str] = (),
) -> Model:
    """The model in a converted folder, its weights as `dtype` (None: as they are stored).

    Number types, `place`, `weights` and `ignore_config` are as in `load_hf`, but that all is read
    before the first kernel is narrowed. Raises ValueError if the folder is damaged.
    """
    wanted, folder = parse_dtype(dtype), Path(folder)
    refuse_unfinished(folder)
    Manifest.read(folder)
    stored = checkpoint.contents(folder / WEIGHTS)
    config = _config(folder, stored, ignore_config)
    model, family = abstract(config), family_of(config)
    wanted = wanted or one_dtype(
        folder,
        family,
        {name: (dtype, nbytes((name, dtype, shape))) for name, (shape, dtype) in stored.items()},
    )
    dtypes = {
        # `restore` lists what is missing
        name: cast(family, name, wanted or (stored[name][1] if name in stored else FLOAT32))
        for name in checkpoint.names(model)
    }
    model = with_dtypes(model, dtypes)
    if place is not None:
        model = place(model)
    restored = checkpoint.restore(folder / WEIGHTS, model)
    if weights is None:
        return restored
    arrays, wide = {}, checkpoint.names(restored)
    del restored
    for name in [*wide]:
        arrays |= narrowed(name, wide.pop(name), weights)
    return checkpoint.fill(with_scales(model, weights), arrays)


def read_config(folder: Path, ignore: Sequence[str] = ()) -> Config:
    """The configuration in a folder, Hugging Face or converted, read without the keys `ignore`.

    Raises ValueError listing everything in config.json that is not supported.
    """
    told = Manifest.read(folder).ignore_config if (folder / MANIFEST).exists() else ()
    return families.read_config(folder, sorted({*told, *ignore}))


def _config(folder: Path, stored: Container[str], ignore: Sequence[str] = ()) -> Config:
    """The configuration of the parameters that are stored in a converted folder."""
    config = read_config(folder, ignore)
    family = family_of(config)
    own = family.with_own_head(config)
    heads = checkpoint.names(abstract(own)).keys() - checkpoint.names(abstract(config)).keys()
    return own if heads and all(name in stored for name in heads) else config


def to_hf(converted: str | Path, out: str | Path, progress: Progress | None = None) -> Report:
    """Writes a converted folder back as the new Hugging Face folder `out`.

    Tensors have the names, files, order and — unless converted with a `dtype` — the bytes that
    they had. Raises ValueError if `converted` is damaged, or was changed since, or if `out` exists
    or cannot be written.
    """
    folder = Path(converted)
    check_new(Path(out))
    refuse_unfinished(folder)
    manifest = Manifest.read(folder)
    if config_digest(folder) != manifest.config:
        raise ValueError(
            f"{folder / 'config.json'} was changed after the conversion, and the weights were not; "
            "put the original back, and change what comes out"
        )
    stored = checkpoint.contents(folder / WEIGHTS)
    config = _config(folder, stored)
    family = family_of(config)
    names = {name for file in manifest.files.values() for name in file.tensors}
    matches = family.places(names, stored, config, family.layouts[manifest.layout])
    if names != matches.keys() or {one.target for one in matches.values()} != stored.keys():
        raise ValueError(
            f"{folder}: {MANIFEST} lists {len(names)} tensors, {WEIGHTS} holds {len(stored)}, "
            f"and they are not the same; convert again"
        )
    specs: dict[str, list[Spec]] = {
        file: [
            (name, dtype, matches[name].transform.source_shape(shape))
            for name in content.tensors
            for shape, dtype in [stored[matches[name].target]]
        ]
        for file, content in manifest.files.items()
    }
    total = sum(nbytes(spec) for inside in specs.values() for spec in inside)
    done = 0

    def values(inside: Sequence[Spec]) -> Iterator[np.ndarray]:
        nonlocal done
        for group in parts(inside, nbytes, PART):
            ones = [matches[name] for name, _, _ in group]
            arrays = checkpoint.read(
                folder / WEIGHTS, {one.target: stored[one.target] for one in ones}
            )
            if wrong := different(arrays, manifest.checksums):
                raise ValueError(f"{folder / WEIGHTS} is damaged: {listed(wrong)}; convert again")
            for one, spec in zip(ones, group, strict=True):
                yield one.transform.inverse(arrays[one.target])
                done += nbytes(spec)
                if progress is not None:
                    progress(done, total)

    with new_folder(Path(out)) as target:
        for file, inside in specs.items():
            write_safetensors(target / file, inside, values(inside), manifest.files[file].metadata)
        copy_side_files(folder, target, besides=(MANIFEST, "config.json", INDEX))
        is_cast = any(
            dtype.name != manifest.dtypes[name]
            for inside in specs.values()
            for name, dtype, _ in inside
        )
        # the old index counts other bytes, or names tensors that were left out
        if (manifest.ignored or is_cast) and SINGLE not in specs:
            write_index(target, specs)
        elif (folder / INDEX).exists():
            shutil.copyfile(folder / INDEX, target / INDEX)
        shutil.copyfile(folder / "config.json", target / "config.json")
    return Report(
        folder,
        manifest.layout,
        tuple(
            Row(
                source=name,
                target=matches[name].target,
                change=matches[name].transform.name,
                file=file,
                shape=shape,
                dtype=manifest.dtypes[name],
                stored_dtype=dtype.name,
                nbytes=nbytes((name, dtype, shape)),
            )
            for file, inside in specs.items()
            for name, dtype, shape in inside
        ),
        (),
    )


def _refuse_full_disk(folder: Path, wanted: int) -> None:
    """Raises OSError if a disk has no room for that many bytes; Orbax would find out halfway."""
    if shutil.disk_usage(folder).free < wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
