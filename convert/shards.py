"""Safetensors files, read and written: where each tensor lies, of which type and shape.

Only headers are read here; a tensor's bytes are mapped when they are asked for. A file is 8 bytes
of header length, a JSON header, and the tensors' bytes.

Not by the safetensors library, because each process wants just the byte ranges of its own shards,
in bfloat16 too, and writes tensor by tensor what no memory holds at once.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from catp_jax import strict_json
from catp_jax.files import what
from convert.rules import copy

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The number types of weights that are read, by their name in safetensors."""

COUNTS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}
"""Those of buffers in old checkpoints, which no parameter is filled from."""

LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
MOST_TENSORS = 50_000  # of a checkpoint; the largest that there are have 2,000
COMPARED = 2**24  # bytes that are compared at a time
UNQUANTISED = (
    "take the checkpoint that it was made of, in bf16, f16 or f32; weights='int8' (--weights int8) "
    "narrows that as it loads"
)


class NotRead(ValueError):
    """The weights are whole, but of a kind that is not read."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file; `start` counts bytes from the beginning of the file."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    origin: str = ""  # where its values come from, if not from the checkpoint alone

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def values(self) -> np.ndarray:
        """The tensor, mapped: of the file, only those pages are read that somebody touches.

        Raises ValueError if the file is too short.
        """
        if self.nbytes == 0:
            return np.zeros(self.shape, self.dtype)
        try:
            flat = np.memmap(self.file, self.dtype, "r", self.start, (math.prod(self.shape),))
        except ValueError as error:
            raise ValueError(
                f"{self.file} ended within {self.name}; is it being changed?"
            ) from error
        return flat.reshape(self.shape).view(np.ndarray)

    def equals(self, other: "Tensor") -> bool:
        """Whether both are equal byte by byte; reads no further than to the first difference."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        one, two = (tensor.values().reshape(-1).view(np.uint8) for tensor in (self, other))
        return all(
            np.array_equal(one[start : start + COMPARED], two[start : start + COMPARED])
            for start in range(0, one.size, COMPARED)
        )


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file: its free-form metadata and its tensors in the order of their bytes."""

    path: Path
    metadata: dict[str, str]
    tensors: tuple[Tensor, ...]


def read_shard(path: Path) -> Shard:
    """A file's header. Raises ValueError, naming the file, if it is truncated or corrupt."""
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


def write_shard(shard: Shard, values: Iterable[np.ndarray]) -> None:
    """Writes a file; `values` are its tensors', in their order. `start` says nothing yet."""
    header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
    names, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    for tensor in shard.tensors:
        offsets = [end, end := end + tensor.nbytes]
        kind = names[tensor.dtype]
        header[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with shard.path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor, value in zip(shard.tensors, values, strict=True):
            if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
                raise RuntimeError(f"{tensor} cannot be written of {value.dtype} {value.shape}")
            file.write(copy(value, tensor.dtype).reshape(-1).view(np.uint8).data)


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


def checksum(array: Any) -> int:
    """The CRC-32 of a contiguous array's bytes."""
    return zlib.crc32(array.reshape(-1).view(np.uint8).data)


def is_text_by_text(content: Any) -> bool:
    """Whether it is an object whose values are texts that UTF-8 can hold."""
    if not isinstance(content, dict) or not all(isinstance(x, str) for x in content.values()):
        return False
    try:
        "".join((*content.keys(), *content.values())).encode()
    except UnicodeEncodeError:
        return False
    return True
