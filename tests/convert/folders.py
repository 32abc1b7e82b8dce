"""Hugging Face folders to convert: tiny random models, saved by transformers in every way."""

import atexit
import copy
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.parity.tiny import tiny
from tests.parity.tiny_blip2 import CONFIGS as BLIP2
from tests.parity.tiny_blip2 import tiny_hf

SIDE_FILES = {
    "tokenizer.json": '{"version": "1.0"}\n',
    "chat_template.jinja": "{{ messages }}\r\n",
    "preprocessor_config.json": '{"max_image_tiles": 4}',
}
SAVES: dict[str, dict[str, Any]] = {
    "hub": {},
    "transformers 5": {"save_original_format": False},
    "sharded": {"max_shard_size": "20KB"},
}


@functools.cache
def _saved(name: str, kind: str, dtype: torch.dtype) -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    hf = tiny_hf(name) if name in BLIP2 else tiny(name)[0]
    copy.deepcopy(hf).to(dtype).save_pretrained(folder, **SAVES[kind])
    return folder


def hf_folder(
    folder: Path, kind: str = "hub", dtype: torch.dtype = torch.float32, name: str = "gqa"
) -> Path:
    """Makes `folder` a Hugging Face folder of a tiny model, with files beside the weights."""
    shutil.copytree(_saved(name, kind, dtype), folder, dirs_exist_ok=True)
    for name, content in SIDE_FILES.items():
        (folder / name).write_bytes(content.encode())
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.pth").write_bytes(b"weights once more")
    return folder


def edit_config(folder: Path, part: str, **changes: Any) -> None:
    """Changes keys of config.json, of its top level ("") or of one of its parts."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(changes)
    path.write_text(json.dumps(config))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by safetensors itself."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Replaces tensors of an unsharded folder; None removes one. Dots in names are written `__`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file, {"format": "pt"})
