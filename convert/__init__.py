"""Hugging Face checkpoints in, Orbax and JAX models out — and back. No torch.

model, config = load("Llama-3.2-11B-Vision-Instruct")           # a Hugging Face folder
to_orbax("Llama-3.2-11B-Vision-Instruct", "llama-orbax")        # with all that belongs to it
model, config = load("llama-orbax", dtype="bfloat16")
to_hf("llama-orbax", "llama-again")                             # byte-equal tensors
"""

import os
from collections.abc import Sequence
from pathlib import Path

from jax.typing import DTypeLike

from catp_jax.files import is_there
from catp_jax.models.narrow import Weights, check
from convert.adapter import alone
from convert.converted import open_converted, to_hf, to_orbax
from convert.families import Config, Model, config_json
from convert.folders import refuse_unfinished
from convert.loading import Place, Source, abstract, abstract_as, load_model
from convert.manifest import MANIFEST, read_config
from convert.reader import load_hf, open_hf
from convert.report import Report, table
from convert.values import faults
from convert.writer import write_hf

__all__ = [
    "Config",
    "Model",
    "Report",
    "abstract",
    "config_json",
    "faults",
    "load",
    "load_abstract",
    "load_config",
    "load_hf",
    "read_config",
    "table",
    "to_hf",
    "to_orbax",
    "write_hf",
]


def load(
    folder: str | Path,
    dtype: DTypeLike | None = None,
    place: Place | None = None,
    weights: Weights | None = None,
    ignore_config: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> tuple[Model, Config]:
    """The model in a folder, Hugging Face or converted, whichever it is.

    `dtype` is the weights' number type (None: as the folder has them; if it has several, or
    config.json says float32, that of config.json, as in transformers); parts that compute in
    float32, as BLIP-2's Q-Former, have float32 weights whatever it is. `place` gives the abstract
    model's leaves the shardings that they are read onto: each process reads what its own shards
    need. `weights` has the language model's layers narrowed to 8 bits as they come, see
    `catp_jax.models.narrow`. A LoRA adapter, beside the weights or in the folder `adapter`, is
    merged into them, see `convert.adapter`. Keys of config.json in `ignore_config` are read as if
    they were not there. Raises ValueError if the folder is neither, or if config.json or the
    weights are damaged, unsupported or do not fit together.
    """
    check(weights)
    source = _opened(folder, ignore_config, adapter)
    return load_model(source, dtype, place, weights), source.config


def load_abstract(
    folder: str | Path, dtype: DTypeLike | None = None, ignore_config: Sequence[str] = ()
) -> Model:
    """The abstract model that `load` would fill: shapes and number types, nothing read. Raises
    ValueError as `load` does.
    """
    return abstract_as(_opened(folder, ignore_config), dtype)


def _opened(
    folder: str | Path, ignore_config: Sequence[str] = (), adapter: str | Path | None = None
) -> Source:
    """A folder of either kind, checked."""
    folder = _checked(folder)
    if not is_there(folder / MANIFEST):
        return open_hf(folder, ignore_config, adapter)
    if adapter is not None:
        raise ValueError(
            f"{folder} is converted; merge {adapter} as you convert (convert --adapter), or "
            "load the Hugging Face folder with it"
        )
    return open_converted(folder, ignore_config)


def load_config(folder: str | Path, ignore_config: Sequence[str] = ()) -> Config:
    """The configuration of what `load` would load, without its weights. Raises ValueError as
    `load` does.
    """
    return read_config(_checked(folder), ignore_config)


def _checked(folder: str | Path) -> Path:
    """The folder, if it is one that holds a model."""
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(f"a model is in a folder, got {folder!r}")
    folder = Path(folder)
    if not os.path.isdir(folder):
        kinds = "; GGUF files are not read" if folder.suffix.lower() == ".gguf" else ""
        raise ValueError(
            f"{folder} is not a folder{kinds}; a Hugging Face folder (config.json, *.safetensors) "
            f"or a converted one ({MANIFEST}, weights/) is wanted"
        )
    refuse_unfinished(folder)
    if not is_there(folder / MANIFEST) and not is_there(folder / "config.json"):
        raise ValueError(
            alone(folder)
            or f"{folder} holds no model: looked for config.json (a Hugging Face folder) and "
            f"{MANIFEST} (a converted one)"
        )
    return folder
