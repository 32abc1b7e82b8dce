"""What methods have learned of a model: a folder that `catp-jax calibrate` makes.

learned.json   the method, the model that it was learned of, how, and figures
arrays.npz     the arrays, by name
model/         where a model was trained along: that model, which the arrays are for
"""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
RECORD, ARRAYS = "learned.json", "arrays.npz"

DAMAGES = (
    *(ValueError, TypeError, KeyError),  # what is said in JSON, and of an array
    *(OSError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile),  # a zip's own bytes
)


@dataclasses.dataclass(frozen=True)
class Learned:
    """What `method` has learned of a `model`, which its record describes; `settings` are those that
    shape the arrays.
    """

    method: str
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How it was learned, and figures."""

    def write(self, folder: Path, beside: Sequence[Path] = ()) -> None:
        """Makes the new folder, whole or not at all; folders `beside` move into it. Raises
        ValueError if it exists.
        """
        check_new(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
            whole = Path(place) / "whole"
            whole.mkdir()
            arrays: dict[str, Any] = {**self.arrays}
            np.savez(whole / ARRAYS, **arrays)
            fields = {"method": self.method, "model": self.model, "settings": self.settings}
            text = json.dumps({"format": FORMAT, **fields, **self.record}, indent=2)
            (whole / RECORD).write_text(text + "\n")
            for other in beside:
                shutil.move(other, whole / other.name)
            os.rename(whole, folder)


def check_new(folder: Path) -> None:
    """Raises ValueError if there is such a folder already, or none could be made."""
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} exists already; choose another folder or delete it first")
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not parent.is_dir():
        raise ValueError(f"{folder} cannot be made: {parent} is not a folder")


def read(folder: str | Path, method: str) -> Learned:
    """What a method has learned.

    Raises ValueError if the folder is none, of another method or of another version of the format.
    """
    make = f"make it with catp-jax calibrate MODEL --method {method} --out"
    if not str(folder):
        raise ValueError(
            f"{method} wants the folder with what it has learned ({method}:DIR); {make} DIR"
        )
    folder = Path(os.path.expanduser(folder))
    record = folder / RECORD
    if not record.is_file():
        raise ValueError(
            f"{method} wants what it has learned, and {folder} has no {RECORD}; {make} {folder}"
        )
    return _read(folder, method, record.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(folder: Path, method: str, _: int) -> Learned:
    try:
        found = json.loads((folder / RECORD).read_text())
        version, name, model, settings = (
            found[key] for key in ("format", "method", "model", "settings")
        )
        checksum = model["checksum"]
        # NumPy leaves a file open in which it finds no arrays
        with (folder / ARRAYS).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except DAMAGES as error:
        raise ValueError(
            f"{folder} is damaged ({type(error).__name__}: {error}); calibrate anew"
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"{folder} has format {version!r}, and this version reads {FORMAT}; calibrate anew"
        )
    if name != method:
        raise ValueError(f"{folder} is what {name} has learned, not {method}")
    if not isinstance(checksum, str) or not isinstance(settings, dict):
        raise ValueError(f"{folder} is damaged (model or settings in {RECORD}); calibrate anew")
    return Learned(name, model, settings, arrays, found)
