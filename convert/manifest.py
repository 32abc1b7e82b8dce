"""What a converted folder says of itself in catp_jax.json: all that is needed to go back."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catp_jax import strict_json
from catp_jax.files import is_there
from convert.configs import listed_keys, read_json, short
from convert.families import FAMILIES, Config, parse_config
from convert.shards import DTYPES, is_text_by_text
from convert.weights import check_weights_file

MANIFEST = "catp_jax.json"
FORMAT = 3  # 2 had no checksums, 1 the parts of BLIP-2's `qkv` one after the other


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
        if not is_there(path):
            raise ValueError(f"{folder} is no converted folder: it has no {MANIFEST}")
        try:
            content = strict_json.read(path)
            _check(content)
            del content["format"]
            content["files"] = {
                name: File(file["metadata"], tuple(file["tensors"]))
                for name, file in content["files"].items()
            }
            for name in ("ignored", "ignore_config"):
                content[name] = tuple(content[name])
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); convert again") from error


def _check(content: dict[str, Any]) -> None:
    """Raises an error if a manifest is not one that this version wrote; takes off its digest."""
    written, kind = content["format"], content["model_type"]
    if written != FORMAT or kind not in FAMILIES:
        raise ValueError(
            f"it is of format {written} and model type {kind}, this version reads format "
            f"{FORMAT} and {', '.join(FAMILIES)}"
        )
    if content["layout"] not in FAMILIES[kind].layouts:
        raise ValueError(f"unknown layout {content['layout']!r}")
    files = content["files"]
    for name in files:
        check_weights_file(name)
    if not all(is_text_by_text(file["metadata"]) for file in files.values()):
        raise ValueError("the metadata of its files are not objects of texts")
    lists = {name: content[name] for name in ("ignored", "ignore_config")}
    for name, found in {**lists, **{file: files[file]["tensors"] for file in files}}.items():
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise ValueError(f"{name} is {short(found)}, no list of names")
    names = [name for file in files.values() for name in file["tensors"]]
    dtypes, known = content["dtypes"], {dtype.name for dtype in DTYPES.values()}
    if len({*names}) != len(names) or {*names} != dtypes.keys():
        raise ValueError("its files and dtypes do not name the same tensors, each once")
    if not known.issuperset(dtypes.values()):
        raise ValueError(f"its dtypes are not all of {', '.join(sorted(known))}")
    checksums, config = content["checksums"], content["config"]
    is_counted = isinstance(checksums, dict) and all(type(n) is int for n in checksums.values())
    if not is_counted or not isinstance(config, str):
        raise ValueError("its checksums are none")
    if content.pop("sha256", None) != _digest(content):
        raise ValueError("it was changed after it was written")


def _digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's content, order included."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def config_digest(folder: Path) -> str:
    """The SHA-256 of a folder's config.json."""
    return hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()


def read_config(folder: Path, ignore: Sequence[str] = ()) -> Config:
    """The configuration in a folder, Hugging Face or converted, read without the keys `ignore`.

    Raises ValueError listing everything in config.json that is not supported.
    """
    also = Manifest.read(folder).ignore_config if is_there(folder / MANIFEST) else ()
    where = str(folder / "config.json")
    return parse_config(read_json(folder), where, sorted({*also, *listed_keys(ignore)}))
