"""Finds every tensor of a Hugging Face folder: in which file, from which byte to which, how typed.

Only the headers of the safetensors files are read here; a tensor's bytes are mapped when they are
asked for. A safetensors file is 8 bytes of header length, a JSON header, and the tensors' bytes.

Read here and not by the safetensors library because each process wants just the byte ranges of its
own shards, in bfloat16 too, as views that cost nothing until they are read.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from catp_jax import strict_json
from convert import strided
from convert.names import check_weights_file

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The number types of weights that are read, by their name in safetensors."""

COUNTS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}
"""Those of buffers in old checkpoints, which no parameter is filled from."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
MOST_TENSORS = 50_000  # of a checkpoint; the largest that there are have 2,000
COMPARED = 2**24  # bytes that are compared at a time
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
UNQUANTISED = (
    "take the checkpoint that it was made of, in bf16, f16 or f32; weights='int8' (--weights int8) "
    "narrows that as it loads"
)
TO_SAFETENSORS = """make safetensors of them where torch and transformers are installed:

    import json, transformers
    name = json.load(open("FOLDER/config.json"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained("FOLDER", dtype="auto")
    model.save_pretrained("NEW_FOLDER")

then copy the tokenizer's and processor's files to NEW_FOLDER"""


class NotRead(ValueError):
    """The weights are whole, but of a kind that is not read."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies; `start` counts bytes from the beginning of the file."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    origin: ClassVar[str] = ""
    """Where its values come from, if not from the checkpoint alone."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, show: Callable[[np.ndarray], np.ndarray], dtype: np.dtype) -> np.ndarray:
        """What `show` makes of the mapped tensor, which is a view of it, read as type `dtype`.

        Just these bytes are read, a few rows at a time: mapped pages would count as ours, and the
        system reads more of them than are touched. Raises ValueError if the file is too short.
        """
        mapped = self.map()
        part = show(mapped)
        out = np.empty(part.shape, dtype)
        if part.size == 0:
            return out
        if not np.may_share_memory(part, mapped):
            raise RuntimeError(f"what is read of {self.name} is no view of it")
        start = self.start + part.ctypes.data - mapped.ctypes.data
        with self.file.open("rb") as file:
            strided.read(file, start, part, out)
        return out

    def map(self) -> np.ndarray:
        """The tensor, mapped: of the file, only those bytes are read that somebody touches."""
        if self.nbytes == 0:
            return np.zeros(self.shape, self.dtype)
        try:
            flat = np.memmap(self.file, self.dtype, "r", self.start, (math.prod(self.shape),))
        except ValueError as error:
            raise ValueError(
                f"{self.file} ended within {self.name}; is it being changed?"
            ) from error
        return flat.reshape(self.shape).view(np.ndarray)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file: its free-form metadata and its tensors in the order of their bytes."""

    path: Path
    metadata: dict[str, str]
    tensors: tuple[Tensor, ...]


def find_shards(folder: Path) -> list[Shard]:
    """The folder's weight files, headers read and checked.

    Raises ValueError naming every file that is missing, truncated or corrupt.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if os.path.lexists(folder / SINGLE):  # transformers, too, looks for it first
        shards = [read_header(folder / SINGLE)]
    elif os.path.lexists(folder / INDEX):
        shards = _find_listed(folder)
    else:
        raise ValueError(_no_weights(folder))
    _refuse_quantised(folder, (tensor.name for shard in shards for tensor in shard.tensors))
    return shards


def _find_listed(folder: Path) -> list[Shard]:
    """The weight files that an index names."""
    listed = _read_index(folder / INDEX)
    shards, problems = [], []
    for name in sorted(set(listed.values())):
        if not os.path.lexists(folder / name):
            problems.append(f"{folder / name} is missing, though {INDEX} names it")
            continue
        try:
            shards.append(read_header(folder / name))
        except NotRead:
            raise
        except ValueError as error:
            problems.append(str(error))
            continue
        here = {tensor.name for tensor in shards[-1].tensors}
        there = {tensor for tensor, file in listed.items() if file == name}
        problems += [
            f"{folder / name} has no {tensor}, though {INDEX} says so"
            for tensor in sorted(there - here)
        ]
        problems += [
            f"{folder / name} has {tensor}, which {INDEX} puts "
            + (f"in {listed[tensor]}" if tensor in listed else "nowhere")
            for tensor in sorted(here - there)
        ]
    if problems:
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"the weights in {folder} are not whole; download or copy them again\n  "
            + "\n  ".join(problems[:20])
            + more
        )
    return shards


def read_header(path: Path) -> Shard:
    """One file's header. Raises ValueError, naming the file, if it is truncated or corrupt."""
    if not path.is_file():
        raise ValueError(
            f"{path} is not a file that can be read, but {what(path)}; copy the file itself there"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if first + file.read(16) == b"version https://git-lfs.":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
        if len(first) < 8:
            raise ValueError(f"{path} is truncated: {size} bytes, too short for a safetensors file")
        length = int.from_bytes(first, "little")
        if length > min(LONGEST_HEADER, size - 8):
            raise ValueError(
                f"{path} is truncated or no safetensors file: its header claims {length} bytes, "
                f"the file has {size}"
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header = strict_json.parse(raw)
        metadata = header.pop("__metadata__", {})
        if not is_text_by_text(metadata):
            raise ValueError("its __metadata__ is not an object of texts")
        if len(header) > MOST_TENSORS:
            raise NotRead(f"{path} has {len(header)} tensors; at most {MOST_TENSORS} are read")
        tensors = [_tensor(name, entry, path, 8 + length) for name, entry in header.items()]
    except NotRead:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt: its header cannot be read ({error})") from error

    tensors.sort(key=lambda tensor: tensor.start)
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise ValueError(
                f"{path} is corrupt: {tensor.name} starts at byte {tensor.start}, expected {end}"
            )
        end += tensor.nbytes
    if end != size:
        state = "truncated" if end > size else "corrupt"
        raise ValueError(f"{path} is {state}: its tensors end at byte {end}, the file at {size}")
    return Shard(path, metadata, tuple(tensors))


def have_same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal byte by byte; reads no further than to the first difference."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (tensor.map().reshape(-1).view(np.uint8) for tensor in (one, other))
    return all(
        np.array_equal(first[start : start + COMPARED], second[start : start + COMPARED])
        for start in range(0, first.size, COMPARED)
    )


def _tensor(name: str, entry: Any, path: Path, data: int) -> Tensor:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has a shape or offset that is no count")
    known, kind = DTYPES | COUNTS, entry["dtype"]
    if not isinstance(kind, str):
        raise ValueError(f"{name} has a dtype that is no text")
    if kind not in known:
        quantised = "FP8: " if kind.startswith("F8") else ""
        raise NotRead(
            f"{path}: {name} is of type {kind} ({quantised}only {', '.join(DTYPES)} are read). "
            f"Of a quantised checkpoint, {UNQUANTISED}"
        )
    tensor = Tensor(name, path, known[kind], shape, data + start)
    if tensor.nbytes != stop - start:
        raise ValueError(f"{name} {list(shape)} needs {tensor.nbytes} bytes, has {stop - start}")
    return tensor


def is_text_by_text(content: Any) -> bool:
    """Whether it is an object whose values are texts that UTF-8 can hold."""
    if not isinstance(content, dict) or not all(isinstance(x, str) for x in content.values()):
        return False
    try:
        "".join((*content.keys(), *content.values())).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file that can be read, but {what(path)}")
    try:
        listed = strict_json.parse(path.read_bytes())["weight_map"]
        if not isinstance(listed, dict) or not listed:
            raise ValueError("its weight_map is empty")
        if len(listed) > MOST_TENSORS:
            raise ValueError(f"it lists {len(listed)} tensors; at most {MOST_TENSORS} are read")
        for file in listed.values():
            check_weights_file(file)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt: a weight_map is wanted ({error})") from error
    return listed


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
    return f"{folder} has no weights: looked for {SINGLE} and {INDEX}"


def what(path: Path) -> str:
    """What stands at a path where a file is wanted."""
    if path.is_symlink() and not path.exists():
        return f"a link to {path.readlink()}, which is not there"
    if path.is_dir():
        return "a folder"
    return "a pipe, socket or device" if path.exists() else "nothing"
