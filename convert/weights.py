"""The weights of a Hugging Face folder: one safetensors file, or several and an index."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from catp_jax import strict_json
from catp_jax.files import what
from catp_jax.messages import listed
from convert.shards import MOST_TENSORS, UNQUANTISED, NotRead, Shard, read_shard

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FOREIGN = {
    "PyTorch pickles": (".bin", ".pt", ".pth", ".ckpt"),
    "GGUF, the quantised form of llama.cpp": (".gguf",),
    "files of Flax, TensorFlow or ONNX": (".msgpack", ".h5", ".onnx"),
}
QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
}
"""How names of tensors end that only quantised checkpoints have, and which."""
LONGEST = 255  # bytes of a file's name, on nearly all file systems
TO_SAFETENSORS = """make safetensors of them where torch and transformers are installed:

    import json, transformers
    name = json.load(open("FOLDER/config.json"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained("FOLDER", dtype="auto")
    model.save_pretrained("NEW_FOLDER")

then copy the tokenizer's and processor's files to NEW_FOLDER"""


def find_shards(folder: Path) -> list[Shard]:
    """The folder's weight files, headers read and checked.

    Raises ValueError naming every file that is missing, truncated or corrupt.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if os.path.lexists(folder / SINGLE):  # transformers, too, looks for it first
        shards = [read_shard(folder / SINGLE)]
    elif os.path.lexists(folder / INDEX):
        shards = _find_listed(folder)
    else:
        raise ValueError(_no_weights(folder))
    _refuse_quantised(folder, (tensor.name for shard in shards for tensor in shard.tensors))
    return shards


def _find_listed(folder: Path) -> list[Shard]:
    """The weight files that an index names."""
    index = _read_index(folder / INDEX)
    shards: dict[str, Shard] = {}
    problems = []
    for name in sorted({*index.values()}):
        if not os.path.lexists(folder / name):
            problems.append(f"{folder / name} is missing, though {INDEX} names it")
            continue
        try:
            shards[name] = read_shard(folder / name)
        except NotRead:
            raise
        except ValueError as error:
            problems.append(str(error))
    there = {(name, file) for name, file in index.items() if file in shards}
    here = {(tensor.name, file) for file, shard in shards.items() for tensor in shard.tensors}
    for name, file in sorted(there - here):
        problems.append(f"{folder / file} has no {name}, though {INDEX} says so")
    for name, file in sorted(here - there):
        place = f"in {index[name]}" if name in index else "nowhere"
        problems.append(f"{folder / file} has {name}, which {INDEX} puts {place}")
    if problems:
        raise ValueError(
            f"the weights in {folder} are not whole; download or copy them again\n  "
            + listed(problems, between="\n  ")
        )
    return [*shards.values()]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file that can be read, but {what(path)}")
    try:
        index = strict_json.parse(path.read_bytes())["weight_map"]
        if not isinstance(index, dict) or not index:
            raise ValueError("its weight_map is empty")
        if len(index) > MOST_TENSORS:
            raise ValueError(f"it lists {len(index)} tensors; at most {MOST_TENSORS} are read")
        for file in index.values():
            check_weights_file(file)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt: a weight_map is wanted ({error})") from error
    return index


def check_weights_file(name: object) -> str:
    """The name that an index or a manifest gives, if it is that of a file right in its folder.

    Raises ValueError for anything but a plain `….safetensors`: other paths lead out of the folder,
    other names are those of files with a meaning of their own.
    """
    if not isinstance(name, str):
        raise ValueError(f"it names {name!r} as a weights file, which is no text")
    if any(mark in name for mark in "/\\:"):
        raise ValueError(f"it names a file outside its folder: {name!r}")
    if not name.isprintable():
        raise ValueError(f"it names {name!r} as a weights file, in letters that cannot be printed")
    if not name.endswith(".safetensors") or name.startswith("."):
        raise ValueError(f"it names {name!r} as a weights file; *.safetensors is wanted")
    if len(name.encode()) > LONGEST:
        raise ValueError(f"it names a file with more than {LONGEST} bytes: {name!r}")
    return name


def _refuse_quantised(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        for ending, kind in QUANTISED.items():
            if name.endswith(ending):
                raise NotRead(f"{folder} is quantised ({kind}: it has {name}); {UNQUANTISED}")


def _no_weights(folder: Path) -> str:
    for kind, endings in FOREIGN.items():
        files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in endings)
        if files:
            way = UNQUANTISED if ".gguf" in endings else TO_SAFETENSORS
            return f"{folder} has weights only as {kind} ({', '.join(files[:3])}), not read; {way}"
    if (folder / "weights").is_dir():
        return (
            f"{folder} has weights/, as catp-jax convert makes it; its catp_jax.json is missing, "
            "copy it, or convert again"
        )
    return f"{folder} has no weights: looked for {SINGLE} and {INDEX}"


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes the index that says which file each tensor is in."""
    tensors = sorted(
        (tensor for shard in shards for tensor in shard.tensors), key=lambda tensor: tensor.name
    )
    total = sum(tensor.nbytes for tensor in tensors)
    files = {tensor.name: tensor.file.name for tensor in tensors}
    content = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
